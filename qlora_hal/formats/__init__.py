"""Formats of stored weights: what they look like in files, and how their numbers are meant."""
