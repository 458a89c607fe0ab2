"""JSON objects that carry a SHA-256 of themselves, so that an edit or a flipped bit shows when they are read.

The hash is of the canonical form, so another layout of the same content is the same content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from qlora_hal.files import strict_json

SEAL = "content_sha256"


def sealed(content: Mapping[str, object]) -> dict[str, object]:
    """The content with its hash. Raises JsonProblem for what is not JSON."""
    bare = unsealed(content)
    return {**bare, SEAL: _hash(bare)}


def unsealed(content: Mapping[str, object]) -> dict[str, object]:
    """The content without its hash."""
    return {key: value for key, value in content.items() if key != SEAL}


def is_sealed(content: Mapping[str, object]) -> bool:
    """Whether it carries a hash; what releases before wrote does not."""
    return SEAL in content


def is_as_sealed(content: Mapping[str, object]) -> bool:
    """Whether it is what its hash was made of. What cannot be written was not written."""
    try:
        return content.get(SEAL) == _hash(unsealed(content))
    except strict_json.JsonProblem:
        return False


def _hash(content: Mapping[str, object]) -> str:
    return hashlib.sha256(strict_json.encode(dict(content))).hexdigest()
