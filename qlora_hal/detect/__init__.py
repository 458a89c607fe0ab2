"""Which backends exist, what this machine is, and which backend runs here."""
