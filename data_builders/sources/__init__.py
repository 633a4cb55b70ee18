"""One reader a source."""
