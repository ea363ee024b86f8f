"""What `make bench` measures."""

import tui  # noqa: F401  # before textual, which then draws at the rate that lora-tui has
