"""Tasks over long sequences: generated, read from published files, or made of what is on every machine."""
