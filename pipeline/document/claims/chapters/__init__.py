"""The claims, a file a chapter of the document."""
