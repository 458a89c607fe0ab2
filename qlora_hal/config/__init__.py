"""The configuration of a run: its tree, and how file, environment, keywords and flags become one."""
