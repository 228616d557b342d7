"""Tasks of the two chapters: data to text, and summaries of functions."""
