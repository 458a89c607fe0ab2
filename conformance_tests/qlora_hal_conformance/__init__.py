"""The conformance suite of `qlora_hal`: cases every backend runs, judged by the float64 oracle (`qlora_hal_oracle`)."""

SUITE_VERSION = "6"
"""The revision of the suite. Its list of cases is `mustpass/v5.txt`; `catalogue.EARLIER_REVISIONS` names the others."""
