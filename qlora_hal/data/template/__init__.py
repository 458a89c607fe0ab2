"""Chat templates: strangers' programs, rendered within bounds, and what of their text is trained."""
