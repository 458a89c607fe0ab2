"""Wrong backends, one defect each, made of the reference backend. A suite that lets one through has a hole.

`python -m qlora_hal_conformance.mutants` runs each against the sections that must catch it.
"""
