"""Signals, child processes, and questions to them."""
