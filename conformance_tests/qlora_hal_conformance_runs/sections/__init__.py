"""Cases about one run that are no part of the suite."""
