"""Sizes of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}
"""Cards are sold in GB and hold GiB: both are read as 2**30 bytes."""


def size_in_bytes(text: str) -> int | None:
    """Bytes of `24GB`, `24 GiB`, `1500MB`, `80` (GB); None for what is no size."""
    found = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,3})?)\s*(?:([MGT])i?B?)?\s*", text, flags=re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "G").upper()]) if found else 0
    return size if size > 0 else None
