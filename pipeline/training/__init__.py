"""The training loop and what it needs: batches, optimizer, checkpoints, signals."""
