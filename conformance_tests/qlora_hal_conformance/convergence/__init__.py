"""Reference convergence points: where training ends, at laptop size.

The suite judges single steps by formulas. Whether whole runs of a really pretrained model end where they should is
judged here, as MLPerf judges submissions by reference convergence points: 20 seeds of a near-exact trainer give a mean
and a spread, and a backend's runs must be indistinguishable from them, neither worse nor better. It belongs to no
certificate. `judging.py` says what is tested, `docs/convergence.md` what came out.

    python -m qlora_hal_conformance.convergence --backend NAME
"""
