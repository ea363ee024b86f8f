"""Runs on other machines: units of work, and the exchange of their results."""
