"""A plot in cells: pure functions from series to rows of styled text, and the pane that shows them."""
