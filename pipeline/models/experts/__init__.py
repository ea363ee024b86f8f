"""The experts of a mixture: what computes them on each device."""
