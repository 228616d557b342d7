"""Breaks suites on purpose, in every phase and from every side, and counts what is lost, duplicated or wedged."""
