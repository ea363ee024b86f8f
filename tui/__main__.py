"""`python -m tui`: same as `lora-tui`."""

from tui.app import main

main()
