"""Whether an adapter or a checkpoint does in other programs what it does in its own library."""
