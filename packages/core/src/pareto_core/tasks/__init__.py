"""Tasks that several packages share."""
