"""Checkpoints: written as one durable act, read only when every hash verifies."""

from qlora_hal.checkpoint.reading import (
    checkpoints,
    latest_state,
    latest_valid_checkpoint,
    load_checkpoint,
    unfinished_notes,
    unfinished_saves,
)
from qlora_hal.checkpoint.state import TrainingState
from qlora_hal.checkpoint.writing import expected_checkpoint_bytes, save_checkpoint

__all__ = [
    "TrainingState",
    "checkpoints",
    "expected_checkpoint_bytes",
    "latest_state",
    "latest_valid_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "unfinished_notes",
    "unfinished_saves",
]
