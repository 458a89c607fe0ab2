"""The base model before it is loaded: where it comes from and what its headers say."""
