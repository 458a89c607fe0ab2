"""bitsandbytes beside MLX."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """bitsandbytes would send its generic decoder through torch.compile: seconds for nothing."""
    import torch

    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
