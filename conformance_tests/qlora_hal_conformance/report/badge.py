"""The badge in the endpoint form of shields.io (https://shields.io/badges/endpoint-badge)."""

from __future__ import annotations

import json
from collections.abc import Mapping

_GREEN, _YELLOW, _RED = "brightgreen", "yellow", "red"
_FEATURES_SHOWN = ("double_quant", "packing", "bitwise_determinism", "generate")


def badge_text(document: Mapping[str, object]) -> str:
    """Green only when conformant; yellow when all that is missing is waived."""
    message, color = _message(document)
    backend = document.get("backend")
    name = backend.get("name") if isinstance(backend, dict) else "backend"
    return json.dumps({"schemaVersion": 1, "label": f"{name} conformance", "message": message, "color": color}) + "\n"


def _message(document: Mapping[str, object]) -> tuple[str, str]:
    totals = document.get("totals")
    assert isinstance(totals, dict)
    if document.get("conformant") is True:
        levels = document.get("levels")
        top = max(levels) if isinstance(levels, dict) and levels else ""
        return " + ".join([top, *_declared(document)]), _GREEN
    bad = {verdict: totals.get(verdict, 0) for verdict in ("failed", "inconclusive", "waived")}
    text = ", ".join(f"{number} {verdict}" for verdict, number in bad.items() if number)
    only_waived = not (bad["failed"] or bad["inconclusive"])
    return f"not conformant: {text}", _YELLOW if only_waived else _RED


def _declared(document: Mapping[str, object]) -> list[str]:
    backend = document.get("backend")
    capabilities = backend.get("capabilities") if isinstance(backend, dict) else None
    features = capabilities.get("features", []) if isinstance(capabilities, dict) else []
    return [name for name in _FEATURES_SHOWN if name in features]
