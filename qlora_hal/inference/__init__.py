"""An adapter's base opened again, and answers."""
