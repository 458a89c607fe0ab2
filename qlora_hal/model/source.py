"""From what the user named to a local folder that is safe to open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_hal.model.facts import ModelFacts


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model on this disk. `name` is what the user wrote; `revision` the resolved commit of a hub model."""

    name: str
    path: Path
    facts: ModelFacts
    revision: str | None = None
    trust_remote_code: bool = False
