"""One module a stage; stages meet through files."""
