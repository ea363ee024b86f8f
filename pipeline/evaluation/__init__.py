"""Measure a model on tasks, and decide whether it passes."""
