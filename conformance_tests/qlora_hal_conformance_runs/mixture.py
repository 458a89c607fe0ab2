"""The mixture of experts of one run: which drawn model stands for it, and what of it stays unjudged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qlora_hal.model.facts import ModelFacts
from qlora_hal_conformance.routed_inputs import without_choice
from qlora_hal_oracle import LlamaShape
from qlora_hal_oracle.arrays import Float32
from qlora_hal_oracle.families import MIXTURES, Config, draw_config

FILE = "mixture.json"
KEPT_KEYS = ("norm_topk_prob", "routed_scaling_factor", "use_qk_norm", "attention_bias")
"""What config.json says of routing and attention whatever the sizes are: the drawn model has the run's."""
MOST_EXPERTS, MOST_CHOSEN = 8, 3
"""Of a layer, and for each token, in drawn models."""
CHOSEN_KEY = "num_experts_per_tok"


@dataclass(frozen=True, slots=True)
class Mixture:
    """`keys` are those of `KEPT_KEYS` that the run's config.json has; `experts` of a layer, and how many of them each
    token goes to (0 where config.json does not say), are the run's own, which no drawn model has."""

    family: str
    keys: Mapping[str, object]
    experts: int
    chosen: int

    @classmethod
    def of(cls, facts: ModelFacts) -> Mixture | None:
        """None for a dense model, and for a mixture of a family that is not drawn."""
        if not facts.has_routed_experts or facts.model_type not in MIXTURES:
            return None
        chosen = facts.config.get(CHOSEN_KEY)
        return cls(
            facts.model_type,
            {key: facts.config[key] for key in KEPT_KEYS if key in facts.config},
            number_of_experts(facts),
            chosen if isinstance(chosen, int) else 0,
        )

    def draw(self, random: np.random.Generator) -> Config:
        """The config.json of a drawn relative. A key that the run's does not have is left to its architecture."""
        drawn = {key: value for key, value in draw_config(self.family, random).items() if key not in KEPT_KEYS}
        return {**drawn, **self.keys}

    def not_judged_in_words(self) -> list[str]:
        """Nothing where the drawn models are as large."""
        if self.experts <= MOST_EXPERTS and self.chosen <= MOST_CHOSEN:
            return []
        each = f", {self.chosen} of them for each token" if self.chosen else ""
        drawn = f"the drawn models have at most {MOST_EXPERTS}, and up to {MOST_CHOSEN} for each token"
        return [f"{self.experts} experts in a layer{each}: {drawn}"]

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Where `read` finds it in a child."""
        (folder / FILE).write_text(json.dumps(self.as_json()), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Mixture:
        return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))


def number_of_experts(facts: ModelFacts) -> int:
    return max((shape.experts for shape in facts.linear_modules.values()), default=1)


def tied_experts(shape: LlamaShape, tensors: dict[str, Float32]) -> dict[str, Float32]:
    """The model with routers in which all experts tie, for every token and in any arithmetic."""
    assert shape.mixture is not None, "the drawn model has no experts"
    return without_choice(tensors, list(shape.mixture.routers(shape.hidden_size)))
