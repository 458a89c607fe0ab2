"""The cases, one file to a section. They ask for capabilities, never for a backend by name."""
