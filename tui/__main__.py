"""`python -m tui`: same as `lora-tui`."""

from tui.start import main

main()
