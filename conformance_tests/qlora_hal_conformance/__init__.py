"""The conformance suite of `qlora_hal`: cases every backend runs, and the float64 oracle they are judged by."""
