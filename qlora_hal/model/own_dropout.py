"""The base's own dropout, which config.json may ask for and no backend applies.

The frozen base computes in training what it computes in evaluation: a step is then the same on every backend, and a
resumed run the same as one that was never interrupted. Only the adapter's dropout (`lora.dropout`) is applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_DROPS = re.compile(r".*(dropout|_pdrop|pdrop|layerdrop|_jitter_noise)(_rate|_prob|_p)?")
_OF_OTHER_HEADS = re.compile(r"(classifier|summary|classif|pooler|seq_classif|hidden_dropout_for_pooler).*")


def own_dropout(config: Mapping[str, object]) -> dict[str, float]:
    """Settings of config.json that drop or disturb activations in training, with their rates above 0. Settings of a
    nested part carry its name (`text_config.attention_dropout`)."""
    return dict(_rates(config, ""))


def _rates(config: Mapping[str, object], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _rates(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and value is not True and value > 0 and _drops(name):
            yield prefix + name, float(value)


def _drops(name: str) -> bool:
    return _DROPS.fullmatch(name) is not None and _OF_OTHER_HEADS.fullmatch(name) is None


def dropout_note(config: Mapping[str, object]) -> str:
    """The sentence for the user, or "" where config.json asks for none."""
    rates = own_dropout(config)
    if not rates:
        return ""
    listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return f"the base's own dropout is off ({listed} in config.json): only lora.dropout is applied"
