"""How much memory a run takes, by arithmetic."""
