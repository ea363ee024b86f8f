"""One run in several processes: their start, their messages, and a base sharded over them."""
