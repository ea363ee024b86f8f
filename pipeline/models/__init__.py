"""MiniGPT, and any checkpoint as a model."""
