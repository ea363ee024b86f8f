"""The screens: pipeline, curves, calculator, adapters; help and messages above them."""
