"""Section 35 for runs whose optimizer keeps moments in 8 bits."""
