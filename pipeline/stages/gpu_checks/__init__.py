"""`lora doctor --gpu`: what only a GPU can show, each check in a process of its own."""
