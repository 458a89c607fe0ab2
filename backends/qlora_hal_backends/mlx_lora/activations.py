"""The activation of feed-forward layers. mlx-lm 0.32 computes one for each kind of model, whatever config.json says;
where another is asked for, the layer is rebuilt around its own projections, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.activations import gelu, gelu_approx, gelu_fast_approx, relu, relu2, silu, tanh
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear

from qlora_hal.errors import ModelError
from qlora_hal.model.facts import text_config
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.mlx_lora.compared import findings
from qlora_hal_backends.mlx_lora.config_reading import Config, as_transformers_reads

Activation = Callable[[mx.array], mx.array]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": silu, "swish": silu, "gelu": gelu, "gelu_python": gelu,
    "gelu_new": gelu_approx, "gelu_pytorch_tanh": gelu_approx, "gelu_fast": gelu_approx,
    "quick_gelu": gelu_fast_approx, "relu": relu, "relu2": relu2, "tanh": tanh,
}  # fmt: skip
"""transformers' names (`transformers.activations.ACT2FN`)."""

_COMPUTED: Mapping[str, Activation] = {
    **dict.fromkeys(
        ("cohere", "cohere2", "ernie4_5", "exaone4", "glm", "glm4", "granite", "helium", "hunyuan_v1_dense",
         "internlm3", "iquestcoder", "llama", "ministral3", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3",
         "seed_oss", "smollm3", "stablelm"),
        silu,
    ),
    **dict.fromkeys(("gemma", "gpt_bigcode", "starcoder2"), gelu),
    **dict.fromkeys(("gemma2", "gemma3_text", "gpt2", "gpt_neox", "gptj", "phi"), gelu_approx),
    "nemotron": relu2,
}  # fmt: skip
"""What mlx-lm's model of each kind computes; of kinds that are not here, its data file tells what is served."""

_KEYS = ("hidden_activation", "hidden_act", "activation_function")
_TWO_LAYERS = (
    ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc1", "fc2"), ("fc_in", "fc_out"),
    ("up_proj", "down_proj"),
)  # fmt: skip
_GATED = ("gate_proj", "up_proj", "down_proj")
_GATED_IN_ONE = ("gate_up_proj", "down_proj")


class TwoLayerMLP(Module):
    """second(activation(first(x)))."""

    def __init__(self, mlp: Any, names: tuple[str, ...], activation: Activation) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name in names:
            setattr(self, name, getattr(mlp, name))
        self._names = names
        self._activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        first, second = (getattr(self, name) for name in self._names)
        product: mx.array = second(self._activation(first(x)))
        return product


class GatedMLP(TwoLayerMLP):
    """down(activation(gate(x)) * up(x))."""

    def __call__(self, x: mx.array) -> mx.array:
        gate, up, down = (getattr(self, name) for name in self._names)
        product: mx.array = down(self._activation(gate(x)) * up(x))
        return product


class GatedInOneMLP(TwoLayerMLP):
    """The same, gate and up one projection, the gate first."""

    def __call__(self, x: mx.array) -> mx.array:
        both, down = (getattr(self, name) for name in self._names)
        gate, up = mx.split(both(x), 2, axis=-1)
        product: mx.array = down(self._activation(gate) * up)
        return product


def put_activations_right(causal: Any, source: ModelSource, read: Config) -> None:
    """Give every feed-forward layer the activation that config.json asks for. Raises ModelError QH-M51 for one that
    mlx-lm would silently take for another."""
    model_type, config = source.facts.model_type, text_config(read)
    asked = next((config[key] for key in _KEYS if config.get(key) is not None), None)
    computed = _COMPUTED.get(model_type)
    if asked is not None and computed is None and model_type not in findings():
        _require_usual(asked, model_type, source)
    if asked is None or computed is None or _ACTIVATIONS.get(asked) is computed:
        return
    if asked not in _ACTIVATIONS:
        raise _refused(source, asked)
    for layer in causal.layers:
        rebuilt = _rebuilt(getattr(layer, "mlp", None), _ACTIVATIONS[asked])
        if rebuilt is None:
            raise _refused(source, asked)
        layer.mlp = rebuilt


def _require_usual(asked: object, model_type: str, source: ModelSource) -> None:
    """Of a kind of model that nobody compared, mlx-lm computes the activation that its published models have, which is
    transformers' default. Raises ModelError QH-M51 where another is asked for."""
    usual = text_config(as_transformers_reads({"model_type": model_type}))
    default = next((usual[key] for key in _KEYS if usual.get(key) is not None), asked)
    if asked != default and _ACTIVATIONS.get(str(asked)) is not _ACTIVATIONS.get(str(default), asked):
        raise _refused(source, asked)


def _rebuilt(mlp: Any, activation: Activation) -> Module | None:
    children: Mapping[str, Any] = mlp.children() if isinstance(mlp, Module) else {}  # type: ignore[no-untyped-call]
    linears = {name for name, child in children.items() if isinstance(child, Linear)}
    for names, kind in _shapes():
        if linears == set(names):
            return kind(mlp, names, activation)
    return None


def _shapes() -> Iterator[tuple[tuple[str, ...], type[TwoLayerMLP]]]:
    yield _GATED, GatedMLP
    yield _GATED_IN_ONE, GatedInOneMLP
    for names in _TWO_LAYERS:
        yield names, TwoLayerMLP


def _refused(source: ModelSource, asked: object) -> ModelError:
    return ModelError(
        "QH-M51",
        f"mlx-lm cannot build {source.facts.architecture} with the activation {asked}.",
        where=source.name,
        cause="It computes another one, regardless of config.json.",
        fix="Choose another backend for this model.",
    )
