"""What the head's loss holds at its peak, beside the same loss of all rows at once."""

from __future__ import annotations

import pytest
import torch
from live_tensors import peak_of

from qlora_hal_backends.torch_family import head_loss
from qlora_hal_backends.torch_family.head_loss import Head, loss_sum, row_losses

ROWS, HIDDEN, VOCABULARY = 1100, 16, 4096


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, Head]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden, targets, Head(torch.randn(VOCABULARY, HIDDEN, generator=generator))


def differentiated(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = hidden.clone().requires_grad_()
    loss = loss_sum(leaf, targets, head, 0.5)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def test_a_large_vocabulary_is_computed_in_smaller_chunks(
    batch: tuple[torch.Tensor, torch.Tensor, Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loss and gradient, and no two chunks of float32 logits stand at a time."""
    expected, gradient = differentiated(*batch)
    losses = row_losses(*batch)
    monkeypatch.setattr(head_loss, "LOSS_CHUNK_LOGITS", 300 * VOCABULARY)  # of whole 128s: 256 rows
    with peak_of() as peak:
        found, of_hidden = differentiated(*batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_hidden, gradient)
    torch.testing.assert_close(row_losses(*batch), losses)
    chunk = 4 * VOCABULARY * 256
    assert chunk < peak.bytes < 1.5 * chunk
