"""`lora`: parse, call, print."""
