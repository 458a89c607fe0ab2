"""Cases about one run, opened in all as that run opens its trainer. They belong to no certificate."""
