"""Plots in cells: pure functions from numbers to rows of styled text, and a widget that shows
them.
"""
