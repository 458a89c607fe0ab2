"""What a backend must be: all that the author of a plugin reads."""
