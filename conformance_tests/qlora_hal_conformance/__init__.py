"""The conformance suite of `qlora_hal`: cases every backend runs, judged by the float64 oracle (`qlora_hal_oracle`)."""

SUITE_VERSION = "8"
"""The revision of the suite. The list of cases of a revision is `mustpass/vN.txt`, with its number for N;
`catalogue.EARLIER_REVISIONS` names the others."""
