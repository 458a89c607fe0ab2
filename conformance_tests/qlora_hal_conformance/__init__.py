"""The conformance suite of `qlora_hal`: cases every backend runs, and the float64 oracle they are judged by."""

SUITE_VERSION = "3"
"""The revision of the suite. Its list of cases is `mustpass/v3.txt`; `catalogue.EARLIER_REVISIONS` names the others."""
