"""Stands for a library that a probe looks for: `probe_without_fix` needs one that is installed everywhere."""
