"""One module per stage. Stages communicate only through files."""
