"""A whole Llama, or a relative of it, in float64: from tokens to logits, and back to every adapter tensor's gradient.

Read `OracleLlama.forward` first; `backward` is the same story told from the end. Shapes are `[batch, time, ...]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from . import blocks
from .arithmetic import EXACT, Arithmetic
from .arrays import AnyFloat, Bool, Float64, TokenBatch
from .fp8 import Fp8Products
from .lora import (
    AdaptedLinear,
    BackwardRun,
    EightBit,
    LinearTrace,
    LoraScale,
    adapted_modules,
    lora_a_name,
    lora_b_name,
)
from .mixture import Apply, Mixture, MixtureTrace
from .shape import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    INPUT_NORM,
    KEY_NORM,
    POST_ATTENTION_NORM,
    POST_MLP_NORM,
    QUERY_NORM,
    SINKS,
    LlamaShape,
)

DropoutMasks = Mapping[str, Float64]
"""Module path to `[batch, time, in]`: 0 where the adapter's input is dropped, 1/(1-p) where it is kept."""

QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, slots=True, eq=False)
class RowView:
    """What attention needs to know of a batch: the rotation of each position and who may see whom."""

    cos: Float64
    sin: Float64
    allowed: Bool


@dataclass(frozen=True, slots=True, eq=False)
class GatedTrace:
    """What the gradient of an MLP needs of its middle."""

    gate: Float64
    up: Float64


@dataclass(slots=True, eq=False)
class LayerTrace:
    """Values one layer leaves for its gradient; names follow the forward pass. `drawn_*` are queries and keys before
    their norm, `attended` and `mixed_up` what the branches give before theirs; `fed` is what the MLP, or the mixture of
    experts, leaves."""

    view: RowView
    entry: Float64
    drawn_query: Float64
    drawn_key: Float64
    query: Float64
    key: Float64
    value: Float64
    attention: blocks.AttentionTrace
    attended: Float64
    middle: Float64
    fed: GatedTrace | MixtureTrace
    mixed_up: Float64
    linears: dict[str, LinearTrace]


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPass:
    """Logits `[batch, time, vocabulary]` and what `backward` needs."""

    logits: Float64
    batch: TokenBatch
    layers: list[LayerTrace]
    last_hidden: Float64
    head: LinearTrace


class OracleLlama:
    """A frozen Llama with adapters; base weights by Hugging Face's names, adapter tensors by PEFT's.

    `adapter` is read at each call, so updates to that dict are seen. Missing or unknown base weights raise ValueError.
    A bias that is given is added, whatever the shape says; one that the shape has must be given. Where the head is tied
    and one is given all the same, the one that is given is used, as by transformers.
    """

    mixture: ClassVar[type[Mixture]] = Mixture

    def __init__(
        self, shape: LlamaShape, base: Mapping[str, AnyFloat], adapter: dict[str, Float64], scale: LoraScale
    ) -> None:
        self.shape = shape
        self.base = {name: np.asarray(weight, dtype=np.float64) for name, weight in base.items()}
        self.adapter = adapter
        self.scale = scale
        self._eight_bit: dict[str, EightBit] = {}
        self._check_names()

    def use_fp8(self, products: Fp8Products) -> None:
        """From now on the products with the linear layers of all decoder layers are in 8-bit floats; not those with the
        head. Raises ValueError for a model with experts."""
        if self.shape.mixture is not None:
            raise ValueError("products in 8-bit floats are of dense models")
        paths = [
            f"model.layers.{at}.{name}"
            for at in range(self.shape.num_hidden_layers)
            for name in self.shape.layer_linears(at)
        ]
        self._eight_bit = {
            path: EightBit(products, products.of_weight(path, self.base[f"{path}.weight"])) for path in paths
        }

    def _check_names(self) -> None:
        layers = range(self.shape.num_hidden_layers)
        modules = [HEAD] + [f"model.layers.{at}.{name}" for at in layers for name in self.shape.layer_linears(at)]
        needed = self.shape.tensor_shapes().keys()
        allowed = needed | {f"{module}.bias" for module in modules} | {f"{HEAD}.weight"}
        missing, unknown = sorted(needed - self.base.keys()), sorted(self.base.keys() - allowed)
        stray = sorted(set(adapted_modules(self.adapter)) - set(modules))
        if missing or unknown or stray:
            raise ValueError(f"base weights missing {missing}, unknown {unknown}; adapters on unknown modules {stray}")

    @property
    def _head_is_embedding(self) -> bool:
        return self.shape.tie_word_embeddings and f"{HEAD}.weight" not in self.base

    def linear(self, module: str) -> AdaptedLinear:
        """The linear layer at a module path, as it is now."""
        weight_of = EMBEDDING if module == HEAD and self._head_is_embedding else module
        return AdaptedLinear(
            module=module,
            weight=self.base[f"{weight_of}.weight"],
            bias=self.base.get(f"{module}.bias"),
            lora_a=self.adapter.get(lora_a_name(module)),
            lora_b=self.adapter.get(lora_b_name(module)),
            scale=self.scale.factor,
            eight_bit=self._eight_bit.get(module),
        )

    def forward(
        self, batch: TokenBatch, arithmetic: Arithmetic = EXACT, masks: DropoutMasks | None = None
    ) -> ForwardPass:
        """Embed, run the layers, normalize, project to the vocabulary."""
        masks = masks or {}
        views = {window: self.row_view(batch, window) for window in {0, *self.shape.windows}}
        embedded = self.base[f"{EMBEDDING}.weight"][batch.input_ids]
        hidden = arithmetic.store(embedded * self.shape.embedding_scale)
        traces = []
        for layer in range(self.shape.num_hidden_layers):
            view = views[self.shape.window(layer)]
            hidden, trace = self._layer_forward(layer, hidden, view, arithmetic, masks)
            traces.append(trace)
        # The factor of the logits stands before the head: equal numbers, and the product has their magnitude.
        normalized = arithmetic.store(self._norm(FINAL_NORM, hidden, arithmetic) * self.shape.logits_scale)
        logits, head = self.linear(HEAD).forward(normalized, arithmetic, masks.get(HEAD))
        capped = arithmetic.store(blocks.soft_cap(logits, self.shape.logits_softcap))
        return ForwardPass(capped, batch, traces, hidden, head)

    def row_view(self, batch: TokenBatch, window: int) -> RowView:
        """Rotations and mask of the layers with this window (0 for none)."""
        shape = self.shape
        local = bool(window) and shape.local_rope_theta is not None
        theta = shape.local_rope_theta if local and shape.local_rope_theta is not None else shape.rope_theta
        frequencies = blocks.rotary_frequencies(shape.rotary_size, theta)
        factors = shape.rotary_factors
        if shape.long_rotary_factors and batch.position_ids.max(initial=0) >= shape.rotary_original_length:
            factors = shape.long_rotary_factors
        if factors and not local:
            frequencies = frequencies / np.asarray(factors)
        cos, sin = blocks.rotary_angles(batch.position_ids, frequencies, 1.0 if local else shape.rotary_magnitude)
        return RowView(cos, sin, blocks.attention_allowed(batch.segment_ids, window))

    def _norm(self, name: str, x: Float64, arithmetic: Arithmetic) -> Float64:
        return arithmetic.store(blocks.rms_norm(x, self.norm_weight(name), self.shape.rms_norm_eps))

    def norm_weight(self, name: str) -> Float64:
        """What a norm multiplies by."""
        return self.shape.norm_offset + self.base[f"{name}.weight"]

    def _layer_forward(
        self, layer: int, entry: Float64, view: RowView, arithmetic: Arithmetic, masks: DropoutMasks
    ) -> tuple[Float64, LayerTrace]:
        """middle = entry + attention(norm(entry)); output = middle + mlp(norm(middle))."""
        path = f"model.layers.{layer}"
        linears: dict[str, LinearTrace] = {}

        def apply(name: str, x: Float64) -> Float64:
            y, linears[name] = self.linear(f"{path}.{name}").forward(x, arithmetic, masks.get(f"{path}.{name}"))
            return y

        def norm(name: str, x: Float64) -> Float64:
            return self._norm(f"{path}.{name}", x, arithmetic)

        def join(entry: Float64, branch: Float64) -> Float64:
            return store(entry + shape.residual_scale * branch)

        shape, store = self.shape, arithmetic.store
        x = norm(INPUT_NORM, entry)
        if shape.fused_projections:
            queries, keys, values = self.split_query_key_value(apply("self_attn.qkv_proj", x))
        else:
            queries, keys, values = (apply(name, x) for name in QUERY_KEY_VALUE)
        drawn_query = query = blocks.split_heads(queries, shape.num_attention_heads)
        drawn_key = key = blocks.split_heads(keys, shape.num_key_value_heads)
        value = blocks.split_heads(values, shape.num_key_value_heads)
        if shape.query_key_norm:
            query, key = norm(QUERY_NORM, query), norm(KEY_NORM, key)
        query = store(blocks.rotate(query, view.cos, view.sin))
        key = self.share_keys(store(blocks.rotate(key, view.cos, view.sin)))
        value = self.share_keys(value)
        mixed, attention = blocks.attention(
            query,
            key,
            value,
            view.allowed,
            arithmetic,
            f"{path}.self_attn",
            scale=shape.score_scale,
            cap=shape.attention_softcap,
            sinks=self.base[f"{path}.{SINKS}"] if shape.attention_sinks else None,
        )
        attended = apply("self_attn.o_proj", blocks.join_heads(mixed))
        middle = join(entry, norm(POST_ATTENTION_NORM, attended) if shape.norms_around else attended)

        mixed_up, fed = self._feed_forward(layer, norm(shape.pre_mlp_norm, middle), apply, arithmetic)
        output = join(middle, norm(POST_MLP_NORM, mixed_up) if shape.norms_around else mixed_up)
        return output, LayerTrace(
            view, entry, drawn_query, drawn_key, query, key, value, attention, attended, middle, fed, mixed_up, linears,
        )  # fmt: skip

    def _feed_forward(
        self, layer: int, x: Float64, apply: Apply, arithmetic: Arithmetic
    ) -> tuple[Float64, GatedTrace | MixtureTrace]:
        """The MLP of a layer, or its mixture of experts."""
        mixture = self._mixture(layer)
        if mixture is not None:
            return mixture.forward(x, apply, arithmetic)
        if self.shape.fused_projections:
            gate, up = self.split_gate_up(apply("mlp.gate_up_proj", x))
        else:
            gate, up = (apply(name, x) for name in GATE_UP)
        inner = arithmetic.store(blocks.gated(gate, up, self.shape.activation))
        return apply("mlp.down_proj", inner), GatedTrace(gate, up)

    def _mixture(self, layer: int) -> Mixture | None:
        shape = self.shape.mixture_of(layer)
        if shape is None:
            return None
        path = f"model.layers.{layer}"
        correction = self.base[f"{path}.{shape.correction}"] if shape.corrected else None
        return self.mixture(shape, self.shape.activation, correction, lambda name: self.linear(f"{path}.{name}"))

    def share_keys(self, x: Float64) -> Float64:
        """A key, or a value, for each query head."""
        return blocks.repeat_keys(x, self.shape.queries_per_key)

    def split_query_key_value(self, fused: Float64) -> list[Float64]:
        """A fused projection's output in its three parts."""
        queries, keys = self.shape.query_size, self.shape.key_size
        return np.split(fused, [queries, queries + keys], axis=-1)

    def split_gate_up(self, fused: Float64) -> list[Float64]:
        """The gate comes first."""
        return np.split(fused, 2, axis=-1)

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
        slope = blocks.soft_cap_slope(forward.logits, self.shape.logits_softcap)
        grad = self.linear(HEAD).backward(arithmetic.store(grad_logits * slope), forward.head, run)
        grad = self._norm_backward(FINAL_NORM, grad * self.shape.logits_scale, forward.last_hidden, run)
        for layer in reversed(range(self.shape.num_hidden_layers)):
            path = f"model.layers.{layer}"
            grad = self._mlp_backward(layer, grad, forward.layers[layer], run)
            grad = self._attention_backward(path, grad, forward.layers[layer], run)
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
        grad_x, grad_weight = blocks.rms_norm_backward(grad, x, self.norm_weight(name), self.shape.rms_norm_eps)
        if run.with_base:
            run.add(f"{name}.weight", grad_weight)
        return run.arithmetic.store(grad_x)

    def _mlp_backward(
        self,
        layer: int,
        grad: Float64,
        trace: LayerTrace,
        run: BackwardRun,
    ) -> Float64:
        """Gradient of `middle` from the gradient of the layer's output: past the MLP, and through it."""
        path = f"model.layers.{layer}"

        def back(name: str, g: Float64) -> Float64:
            return self.linear(f"{path}.{name}").backward(g, trace.linears[name], run)

        shape, store = self.shape, run.arithmetic.store
        grad_branch = store(shape.residual_scale * grad)
        if shape.norms_around:
            grad_branch = self._norm_backward(f"{path}.{POST_MLP_NORM}", grad_branch, trace.mixed_up, run)
        grad_x = self._feed_backward(layer, grad_branch, trace.fed, back, run)
        through = self._norm_backward(f"{path}.{shape.pre_mlp_norm}", grad_x, trace.middle, run)
        return store(grad + through)

    def _feed_backward(
        self, layer: int, grad: Float64, trace: GatedTrace | MixtureTrace, back: Apply, run: BackwardRun
    ) -> Float64:
        """Through the MLP of a layer, or its mixture of experts."""
        mixture = self._mixture(layer)
        if isinstance(trace, MixtureTrace):
            assert mixture is not None, "a mixture left the trace"
            return mixture.backward(grad, trace, back, run)
        store = run.arithmetic.store
        grad_gated = back("mlp.down_proj", grad)
        gradients = blocks.gated_backward(grad_gated, trace.gate, trace.up, self.shape.activation)
        if self.shape.fused_projections:
            return back("mlp.gate_up_proj", store(np.concatenate(gradients, axis=-1)))
        gate_name, up_name = GATE_UP
        return back(gate_name, store(gradients[0])) + back(up_name, store(gradients[1]))

    def _attention_backward(
        self,
        path: str,
        grad: Float64,
        trace: LayerTrace,
        run: BackwardRun,
    ) -> Float64:
        """Gradient of `entry` from the gradient of `middle`: past the attention, and through it."""

        def back(name: str, g: Float64) -> Float64:
            return self.linear(f"{path}.{name}").backward(g, trace.linears[name], run)

        shape, store, view = self.shape, run.arithmetic.store, trace.view
        grad_branch = store(shape.residual_scale * grad)
        if shape.norms_around:
            grad_branch = self._norm_backward(f"{path}.{POST_ATTENTION_NORM}", grad_branch, trace.attended, run)
        grad_mixed = blocks.split_heads(back("self_attn.o_proj", grad_branch), shape.num_attention_heads)
        grad_query, grad_key, grad_value = blocks.attention_backward(
            grad_mixed, trace.query, trace.key, trace.value, trace.attention, run.arithmetic, f"{path}.self_attn"
        )
        if run.with_base and shape.attention_sinks:
            run.add(f"{path}.{SINKS}", blocks.sinks_backward(grad_mixed, trace.value, trace.attention))
        grad_key = blocks.repeat_keys_backward(grad_key, shape.queries_per_key)
        grad_value = blocks.repeat_keys_backward(grad_value, shape.queries_per_key)
        grad_query = store(blocks.rotate_backward(grad_query, view.cos, view.sin))
        grad_key = store(blocks.rotate_backward(grad_key, view.cos, view.sin))
        if shape.query_key_norm:
            grad_query = self._norm_backward(f"{path}.{QUERY_NORM}", grad_query, trace.drawn_query, run)
            grad_key = self._norm_backward(f"{path}.{KEY_NORM}", grad_key, trace.drawn_key, run)
        gradients = [blocks.join_heads(g) for g in (grad_query, grad_key, grad_value)]
        if shape.fused_projections:
            grad_x = back("self_attn.qkv_proj", np.concatenate(gradients, axis=-1))
        else:
            query_name, key_name, value_name = QUERY_KEY_VALUE
            grad_x = back(value_name, gradients[2]) + back(key_name, gradients[1]) + back(query_name, gradients[0])
        through = self._norm_backward(f"{path}.{INPUT_NORM}", grad_x, trace.entry, run)
        return store(grad + through)

    def _embedding_backward(self, grad: Float64, batch: TokenBatch, run: BackwardRun) -> None:
        table = np.zeros_like(self.base[f"{EMBEDDING}.weight"])
        np.add.at(table, batch.input_ids, grad * self.shape.embedding_scale)
        if self._head_is_embedding:
            table += run.gradients.pop(f"{HEAD}.weight")
        run.add(f"{EMBEDDING}.weight", table)
