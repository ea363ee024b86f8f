"""What the screens are made of: widgets show, workers post, screens connect."""
