"""The benchmarks of `make bench`."""

import tui  # noqa: F401  # before textual, so that it draws at lora-tui's frame rate
