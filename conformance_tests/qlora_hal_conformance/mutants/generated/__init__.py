"""Mutants that nobody thought up: one change of the syntax tree, anywhere in a private copy of the reference backend.

`python -m qlora_hal_conformance.mutants.generated` draws some, runs each on the suite, and counts what it caught.
"""
