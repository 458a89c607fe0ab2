"""transformers 5.24 calls a model's key-value cache `cache`; before, and in the code of others, it is
`past_key_values`."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from qlora_hal_backends.torch_family.transformers_versions import cache_argument


class Newer(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> None: ...


class Older(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(("model", "name"), [(Newer(), "cache"), (Older(), "past_key_values")])
def test_a_model_is_given_its_cache_under_the_name_that_it_knows(model: nn.Module, name: str) -> None:
    assert cache_argument(model) == name
