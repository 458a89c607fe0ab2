"""The conformance suite of `qlora_hal`: cases every backend runs, and the float64 oracle they are judged by."""

SUITE_VERSION = "1"
"""Version of the list of cases, `mustpass/v1.txt`; the hash of the sources tells revisions of their code apart."""
