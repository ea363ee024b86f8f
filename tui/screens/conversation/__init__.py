"""A conversation with models, which the screens Chat and Models share."""
