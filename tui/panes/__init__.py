"""The four panes that screens are made of: a table, a text, a plot, a form; each in a frame."""
