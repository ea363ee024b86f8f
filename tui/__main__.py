"""`python -m tui`: the same as `lora-tui`."""

from tui.app import main

main()
