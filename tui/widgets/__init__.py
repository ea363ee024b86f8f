"""Widgets shared by the screens. Widgets show, workers post, screens connect."""
