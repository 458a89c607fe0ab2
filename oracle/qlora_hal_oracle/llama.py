"""A whole Llama in float64: forward from tokens to logits, and the hand-written gradient back to every adapter tensor.

Read `OracleLlama.forward` first; `backward` is the same story told from the end. Shapes are `[batch, time, ...]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import blocks
from .arithmetic import EXACT, Arithmetic
from .arrays import AnyFloat, Bool, Float64, TokenBatch
from .lora import (
    ATTENTION_MODULES,
    MLP_MODULES,
    AdaptedLinear,
    BackwardRun,
    LinearTrace,
    LoraScale,
    adapted_modules,
    lora_a_name,
    lora_b_name,
)
from .shape import LlamaShape

DropoutMasks = Mapping[str, Float64]
"""Module path to `[batch, time, in]`: 0 where the adapter's input is dropped, 1/(1-p) where it is kept."""

_EMBEDDING = "model.embed_tokens"
_FINAL_NORM = "model.norm"
_HEAD = "lm_head"


@dataclass(frozen=True, slots=True, eq=False)
class _RowView:
    """What attention needs to know of a batch: the rotation of each position and who may see whom."""

    cos: Float64
    sin: Float64
    allowed: Bool


@dataclass(slots=True, eq=False)
class LayerTrace:
    """Values one layer leaves for its gradient; names follow the forward pass."""

    entry: Float64
    query: Float64
    key: Float64
    value: Float64
    weights: Float64
    middle: Float64
    gate: Float64
    up: Float64
    linears: dict[str, LinearTrace]


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPass:
    """Logits `[batch, time, vocabulary]` and what `backward` needs."""

    logits: Float64
    batch: TokenBatch
    view: _RowView
    layers: list[LayerTrace]
    last_hidden: Float64
    head: LinearTrace


class OracleLlama:
    """A frozen Llama with adapters; base weights by Hugging Face's names, adapter tensors by PEFT's.

    `adapter` is read at each call, so updates to that dict are seen. Missing or unknown base weights raise ValueError.
    """

    def __init__(
        self, shape: LlamaShape, base: Mapping[str, AnyFloat], adapter: dict[str, Float64], scale: LoraScale
    ) -> None:
        self.shape = shape
        self.base = {name: np.asarray(weight, dtype=np.float64) for name, weight in base.items()}
        self.adapter = adapter
        self.scale = scale
        self._check_names()

    def _check_names(self) -> None:
        modules = [_HEAD] + [
            f"model.layers.{layer}.{name}"
            for layer in range(self.shape.num_hidden_layers)
            for name in ATTENTION_MODULES + MLP_MODULES
        ]
        norms = [_FINAL_NORM] + [
            f"model.layers.{layer}.{name}_layernorm"
            for layer in range(self.shape.num_hidden_layers)
            for name in ("input", "post_attention")
        ]
        needed = {f"{name}.weight" for name in [_EMBEDDING, *modules, *norms]}
        if self.shape.tie_word_embeddings:
            needed.discard(f"{_HEAD}.weight")
        allowed = needed | {f"{module}.bias" for module in modules} | {f"{_HEAD}.weight"}
        missing, unknown = sorted(needed - self.base.keys()), sorted(self.base.keys() - allowed)
        stray = sorted(set(adapted_modules(self.adapter)) - set(modules))
        if missing or unknown or stray:
            raise ValueError(f"base weights missing {missing}, unknown {unknown}; adapters on unknown modules {stray}")

    def linear(self, module: str) -> AdaptedLinear:
        """The linear layer at a module path, as it is now."""
        weight_of = _EMBEDDING if module == _HEAD and self.shape.tie_word_embeddings else module
        return AdaptedLinear(
            module=module,
            weight=self.base[f"{weight_of}.weight"],
            bias=self.base.get(f"{module}.bias"),
            lora_a=self.adapter.get(lora_a_name(module)),
            lora_b=self.adapter.get(lora_b_name(module)),
            scale=self.scale.factor,
        )

    def forward(
        self, batch: TokenBatch, arithmetic: Arithmetic = EXACT, masks: DropoutMasks | None = None
    ) -> ForwardPass:
        """Embed, run the layers, normalize, project to the vocabulary."""
        cos, sin = blocks.rotary_angles(batch.position_ids, self.shape.head_dim, self.shape.rope_theta)
        view = _RowView(cos, sin, blocks.attention_allowed(batch.segment_ids))
        masks = masks or {}
        hidden = arithmetic.store(self.base[f"{_EMBEDDING}.weight"][batch.input_ids])
        traces = []
        for layer in range(self.shape.num_hidden_layers):
            hidden, trace = self._layer_forward(f"model.layers.{layer}", hidden, view, arithmetic, masks)
            traces.append(trace)
        normalized = self._norm(_FINAL_NORM, hidden, arithmetic)
        logits, head = self.linear(_HEAD).forward(normalized, arithmetic, masks.get(_HEAD))
        return ForwardPass(logits, batch, view, traces, hidden, head)

    def _norm(self, name: str, x: Float64, arithmetic: Arithmetic) -> Float64:
        return arithmetic.store(blocks.rms_norm(x, self.base[f"{name}.weight"], self.shape.rms_norm_eps))

    def _layer_forward(
        self, path: str, entry: Float64, view: _RowView, arithmetic: Arithmetic, masks: DropoutMasks
    ) -> tuple[Float64, LayerTrace]:
        """middle = entry + attention(norm(entry)); output = middle + mlp(norm(middle))."""
        linears: dict[str, LinearTrace] = {}

        def apply(name: str, x: Float64) -> Float64:
            y, linears[name] = self.linear(f"{path}.{name}").forward(x, arithmetic, masks.get(f"{path}.{name}"))
            return y

        shape, store = self.shape, arithmetic.store
        x = self._norm(f"{path}.input_layernorm", entry, arithmetic)
        query = blocks.split_heads(apply("self_attn.q_proj", x), shape.num_attention_heads)
        key = blocks.split_heads(apply("self_attn.k_proj", x), shape.num_key_value_heads)
        value = blocks.split_heads(apply("self_attn.v_proj", x), shape.num_key_value_heads)
        query = store(blocks.rotate(query, view.cos, view.sin))
        key = blocks.repeat_keys(store(blocks.rotate(key, view.cos, view.sin)), shape.queries_per_key)
        value = blocks.repeat_keys(value, shape.queries_per_key)
        mixed, weights = blocks.attention(query, key, value, view.allowed, arithmetic, f"{path}.self_attn")
        middle = store(entry + apply("self_attn.o_proj", blocks.join_heads(mixed)))

        x = self._norm(f"{path}.post_attention_layernorm", middle, arithmetic)
        gate, up = apply("mlp.gate_proj", x), apply("mlp.up_proj", x)
        output = store(middle + apply("mlp.down_proj", store(blocks.gated_silu(gate, up))))
        return output, LayerTrace(entry, query, key, value, weights, middle, gate, up, linears)

    def backward(
        self,
        forward: ForwardPass,
        grad_logits: Float64,
        arithmetic: Arithmetic = EXACT,
        *,
        with_base: bool = False,
    ) -> dict[str, Float64]:
        """Gradient of every adapter tensor by name; with `with_base` also of every base weight, by its name.

        A tied embedding gets one gradient, from its use as embedding and as head.
        """
        run = BackwardRun(arithmetic, with_base)
        grad = self.linear(_HEAD).backward(grad_logits, forward.head, run)
        grad = self._norm_backward(_FINAL_NORM, grad, forward.last_hidden, run)
        for layer in reversed(range(self.shape.num_hidden_layers)):
            path = f"model.layers.{layer}"
            grad = self._mlp_backward(path, grad, forward.layers[layer], run)
            grad = self._attention_backward(path, grad, forward.layers[layer], forward.view, run)
        if with_base:
            self._embedding_backward(grad, forward.batch, run)
        return run.gradients

    def _norm_backward(
        self,
        name: str,
        grad: Float64,
        x: Float64,
        run: BackwardRun,
    ) -> Float64:
        weight = self.base[f"{name}.weight"]
        grad_x, grad_weight = blocks.rms_norm_backward(grad, x, weight, self.shape.rms_norm_eps)
        if run.with_base:
            run.add(f"{name}.weight", grad_weight)
        return run.arithmetic.store(grad_x)

    def _mlp_backward(
        self,
        path: str,
        grad: Float64,
        trace: LayerTrace,
        run: BackwardRun,
    ) -> Float64:
        """Gradient of `middle` from the gradient of the layer's output: past the MLP, and through it."""

        def back(name: str, g: Float64) -> Float64:
            return self.linear(f"{path}.{name}").backward(g, trace.linears[name], run)

        store = run.arithmetic.store
        grad_gated = back("mlp.down_proj", grad)
        grad_gate, grad_up = blocks.gated_silu_backward(grad_gated, trace.gate, trace.up)
        grad_x = back("mlp.gate_proj", store(grad_gate)) + back("mlp.up_proj", store(grad_up))
        name = f"{path}.post_attention_layernorm"
        through = self._norm_backward(name, grad_x, trace.middle, run)
        return store(grad + through)

    def _attention_backward(
        self,
        path: str,
        grad: Float64,
        trace: LayerTrace,
        view: _RowView,
        run: BackwardRun,
    ) -> Float64:
        """Gradient of `entry` from the gradient of `middle`: past the attention, and through it."""

        def back(name: str, g: Float64) -> Float64:
            return self.linear(f"{path}.{name}").backward(g, trace.linears[name], run)

        shape, store = self.shape, run.arithmetic.store
        grad_mixed = blocks.split_heads(back("self_attn.o_proj", grad), shape.num_attention_heads)
        grad_query, grad_key, grad_value = blocks.attention_backward(
            grad_mixed, trace.query, trace.key, trace.value, trace.weights, run.arithmetic, f"{path}.self_attn"
        )
        grad_key = blocks.repeat_keys_backward(grad_key, shape.queries_per_key)
        grad_value = blocks.repeat_keys_backward(grad_value, shape.queries_per_key)
        grad_query = store(blocks.rotate_backward(grad_query, view.cos, view.sin))
        grad_key = store(blocks.rotate_backward(grad_key, view.cos, view.sin))
        grad_x = (
            back("self_attn.v_proj", blocks.join_heads(grad_value))
            + back("self_attn.k_proj", blocks.join_heads(grad_key))
            + back("self_attn.q_proj", blocks.join_heads(grad_query))
        )
        name = f"{path}.input_layernorm"
        through = self._norm_backward(name, grad_x, trace.entry, run)
        return store(grad + through)

    def _embedding_backward(self, grad: Float64, batch: TokenBatch, run: BackwardRun) -> None:
        table = np.zeros_like(self.base[f"{_EMBEDDING}.weight"])
        np.add.at(table, batch.input_ids, grad)
        if self.shape.tie_word_embeddings:
            table += run.gradients.pop(f"{_HEAD}.weight")
        run.add(f"{_EMBEDDING}.weight", table)
