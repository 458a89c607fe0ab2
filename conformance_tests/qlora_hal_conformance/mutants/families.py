"""Right on plain, small Llamas; wrong on what people train: relatives of Llama, and sizes past a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import numpy as np

from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.values import Batch
from qlora_hal.errors import ModelError
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import EXACT, Arithmetic, LlamaShape, LoraScale, OracleLlama
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.llama import ForwardPass
from qlora_hal_oracle.lora import AdaptedLinear
from qlora_hal_oracle.shape import DEFAULT_RMS_NORM_EPS, HEAD, POST_MLP_NORM

from .registry import Mutant, Open, with_rooms, with_trainer

Base = Mapping[str, Float64]
PLAIN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "fused_projections",
)


def read_as(change: Callable[[LlamaShape], LlamaShape]) -> Open:
    """A reading of config.json that gets some numbers wrong; weights that it has no place for are left out."""

    def model(shape: LlamaShape, base: Base, adapter: dict[str, Float64], scale: LoraScale) -> OracleLlama:
        read = change(shape)
        dropped = shape.tensor_shapes().keys() - read.tensor_shapes().keys()
        return OracleLlama(read, {name: base[name] for name in base if name not in dropped}, adapter, scale)

    return with_rooms(model=model)


def lacking(**numbers: object) -> Open:
    """Some numbers have the value that they have in a plain Llama, or another one."""
    return read_as(lambda shape: replace(shape, **numbers))  # type: ignore[arg-type]


def a_plain_llama(shape: LlamaShape) -> LlamaShape:
    """The sizes alone, and the names of the tensors that came with them."""
    plain = {field.name: field.default for field in fields(LlamaShape) if field.name not in PLAIN}
    return replace(shape, **plain)  # type: ignore[arg-type]


def another_default_epsilon(shape: LlamaShape) -> LlamaShape:
    return replace(shape, rms_norm_eps=1e-5) if shape.rms_norm_eps == DEFAULT_RMS_NORM_EPS else shape


def one_more_token_in_the_window(shape: LlamaShape) -> LlamaShape:
    return replace(shape, windows=tuple(window and window + 1 for window in shape.windows))


def window_on_every_layer(shape: LlamaShape) -> LlamaShape:
    return replace(shape, windows=(max(shape.windows),) * len(shape.windows) if shape.windows else ())


def window_on_the_other_layers(shape: LlamaShape) -> LlamaShape:
    largest = max(shape.windows, default=0)
    return replace(shape, windows=tuple(0 if window else largest for window in shape.windows))


def whole_head_turned(shape: LlamaShape) -> LlamaShape:
    missing = (1.0,) * (shape.head_dim // 2 - len(shape.rotary_factors))
    factors = shape.rotary_factors and shape.rotary_factors + missing
    long_factors = shape.long_rotary_factors and shape.long_rotary_factors + missing
    return replace(shape, rotary_share=1.0, rotary_factors=factors, long_rotary_factors=long_factors)


def residual_scale_twice(shape: LlamaShape) -> LlamaShape:
    return replace(shape, residual_scale=shape.residual_scale**2)


def tanh_for_the_normal_distribution(shape: LlamaShape) -> LlamaShape:
    return replace(shape, activation="gelu_pytorch_tanh" if shape.activation == "gelu" else shape.activation)


def stored_head_ignored(shape: LlamaShape, base: Base, adapter: dict[str, Float64], scale: LoraScale) -> OracleLlama:
    kept = {name: weight for name, weight in base.items() if not name.startswith(HEAD)}
    return OracleLlama(replace(shape, tie_word_embeddings=True), kept, adapter, scale)


def stored_head_of_a_tied_model_ignored(
    shape: LlamaShape, base: Base, adapter: dict[str, Float64], scale: LoraScale
) -> OracleLlama:
    if shape.tie_word_embeddings:
        return stored_head_ignored(shape, base, adapter, scale)
    return OracleLlama(shape, base, adapter, scale)


class BiasDropped(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        return replace(super().linear(module), bias=None)


class NormBehindTheMlpSkipped(OracleLlama):
    def _norm(self, name: str, x: Float64, arithmetic: Arithmetic) -> Float64:
        return x if name.endswith(POST_MLP_NORM) else super()._norm(name, x, arithmetic)


class SlopeOfTheCapForgotten(OracleLlama):
    """Caps the logits, and takes their gradient as if they were not."""

    def backward(
        self, forward: ForwardPass, grad_logits: Float64, arithmetic: Arithmetic = EXACT, *, with_base: bool = False
    ) -> dict[str, Float64]:
        uncapped = replace(forward, logits=np.zeros_like(forward.logits))
        return super().backward(uncapped, grad_logits, arithmetic, with_base=with_base)


class GateAndUpSwapped(OracleLlama):
    def split_gate_up(self, fused: Float64) -> list[Float64]:
        return super().split_gate_up(fused)[::-1]


class KeyAndValueSwapped(OracleLlama):
    def split_query_key_value(self, fused: Float64) -> list[Float64]:
        queries, keys, values = super().split_query_key_value(fused)
        return [queries, values, keys]


class GroupsInterleaved(OracleLlama):
    def share_keys(self, x: Float64) -> Float64:
        return np.tile(x, (1, self.shape.queries_per_key, 1, 1))


class GroupsOfPowersOfTwo(OracleLlama):
    """Finds the key of a query head by a shift."""

    def share_keys(self, x: Float64) -> Float64:
        shift = (self.shape.queries_per_key - 1).bit_length()
        return x[:, np.minimum(np.arange(self.shape.num_attention_heads) >> shift, x.shape[1] - 1)]


class RanksAbove64CutOff(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        if honest.lora_a is None:
            return honest
        kept = (np.arange(len(honest.lora_a)) < 64)[:, None]
        return replace(honest, lora_a=honest.lora_a * kept)


class LayersPastTheEighthNotAdapted(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        past = module.startswith("model.layers.") and int(module.split(".")[2]) >= 8
        return replace(honest, lora_a=None, lora_b=None) if past else honest


def ids_of_16_bits(batch: Batch) -> Batch:
    return replace(batch, input_ids=batch.input_ids & 0xFFFF)


def positions_end_at_1023(batch: Batch) -> Batch:
    return replace(batch, position_ids=np.minimum(batch.position_ids, 1023))


def positions_of_32_rows(batch: Batch) -> Batch:
    position_ids = batch.position_ids.copy()
    position_ids[32:] = 0
    return replace(batch, position_ids=position_ids)


class RefusesWhatItDeclares(ReferenceTrainer):
    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        if source.facts.model_type == "gemma2":
            raise ModelError("QH-M51", "Gemma 2 is not computed here.", fix="Take another model.")
        super().load(source, quantization, compute)


class FailsWhereItShouldRefuse(ReferenceTrainer):
    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        if source.facts.model_type == "gemma2":
            raise KeyError("pre_feedforward_layernorm")
        super().load(source, quantization, compute)


def without_families(spec: BackendSpec) -> BackendSpec:
    return replace(spec, capabilities=replace(spec.capabilities, families=frozenset()))


MUTANTS = (
    Mutant(
        "everything_is_a_plain_llama",
        "Takes the sizes from config.json and computes a plain Llama with them.",
        ("32",),
        read_as(a_plain_llama),
    ),
    Mutant("bias_dropped", "Adds no bias.", ("32",), with_rooms(model=BiasDropped)),
    Mutant(
        "query_key_norm_forgotten",
        "Leaves out the norms of query and key heads.",
        ("32",),
        lacking(query_key_norm=False),
    ),
    Mutant(
        "norm_without_the_one", "Multiplies by w where a norm multiplies by 1 + w.", ("32",), lacking(norm_offset=0.0)
    ),
    Mutant(
        "norm_behind_the_mlp_skipped",
        "Leaves out the norm behind the MLP.",
        ("32",),
        with_rooms(model=NormBehindTheMlpSkipped),
    ),
    Mutant("attention_cap_ignored", "Does not cap the scores of attention.", ("32",), lacking(attention_softcap=None)),
    Mutant("logits_cap_ignored", "Does not cap the logits.", ("32",), lacking(logits_softcap=None)),
    Mutant(
        "slope_of_the_cap_forgotten",
        "Takes the gradient of capped logits as if there were no cap.",
        ("32",),
        with_rooms(model=SlopeOfTheCapForgotten),
    ),
    Mutant(
        "window_off_by_one", "Sees one token more than the window has.", ("32",), read_as(one_more_token_in_the_window)
    ),
    Mutant(
        "window_on_every_layer",
        "Slides the window in the layers that have none, too.",
        ("32",),
        read_as(window_on_every_layer),
    ),
    Mutant(
        "window_on_the_other_layers",
        "Slides the window in the layers that have none.",
        ("32",),
        read_as(window_on_the_other_layers),
    ),
    Mutant("window_ignored", "Sees all tokens whatever window config.json has.", ("32",), lacking(windows=())),
    Mutant(
        "rotary_scaling_ignored",
        "Turns positions without the scaling that config.json asks for.",
        ("32",),
        lacking(rotary_factors=(), long_rotary_factors=()),
    ),
    Mutant(
        "rotary_magnitude_forgotten",
        "Leaves out the factor of sine and cosine (yarn, longrope).",
        ("32",),
        lacking(rotary_magnitude=1.0),
    ),
    Mutant(
        "long_factors_never_taken",
        "Keeps the short factors of longrope on long rows.",
        ("32",),
        lacking(long_rotary_factors=()),
    ),
    Mutant(
        "local_rotary_base_ignored",
        "Turns the layers with a window by the base of the others.",
        ("32",),
        lacking(local_rope_theta=None),
    ),
    Mutant(
        "whole_head_turned",
        "Turns the whole head where config.json asks for a part.",
        ("32",),
        read_as(whole_head_turned),
    ),
    Mutant("silu_whatever_is_asked", "Computes SiLU whatever the activation is.", ("32",), lacking(activation="silu")),
    Mutant(
        "tanh_for_gelu",
        "Computes the exact GELU by its tanh approximation.",
        ("32",),
        read_as(tanh_for_the_normal_distribution),
    ),
    Mutant(
        "attention_scale_ignored",
        "Scales scores by head_dim whatever config.json says.",
        ("32",),
        lacking(attention_scale=None),
    ),
    Mutant("embedding_scale_forgotten", "Does not scale the embeddings.", ("32",), lacking(embedding_scale=1.0)),
    Mutant("residual_scale_twice", "Applies the residual multiplier twice.", ("32",), read_as(residual_scale_twice)),
    Mutant("logits_scale_forgotten", "Does not divide the logits.", ("32",), lacking(logits_scale=1.0)),
    Mutant(
        "stored_head_ignored",
        "Takes the embeddings for the head whatever is stored.",
        ("30", "31"),
        with_rooms(model=stored_head_ignored),
    ),
    Mutant(
        "stored_head_of_a_tied_model_ignored",
        "Takes the embeddings for the head of a tied model that has another.",
        ("32",),
        with_rooms(model=stored_head_of_a_tied_model_ignored),
    ),
    Mutant(
        "gate_and_up_swapped",
        "Takes the halves of a fused gate and up in the wrong order.",
        ("32",),
        with_rooms(model=GateAndUpSwapped),
    ),
    Mutant(
        "key_and_value_swapped",
        "Takes the parts of a fused projection in the order queries, values, keys.",
        ("32",),
        with_rooms(model=KeyAndValueSwapped),
    ),
    Mutant(
        "groups_interleaved",
        "Gives every second query head the second key.",
        ("30", "31"),
        with_rooms(model=GroupsInterleaved),
    ),
    Mutant(
        "another_default_epsilon",
        "Takes 1e-5 for the epsilon of the norms where config.json has the default, or nothing.",
        ("32",),
        read_as(another_default_epsilon),
    ),
    Mutant(
        "groups_of_powers_of_two",
        "Finds the key of a query head by a shift, as if groups were powers of two.",
        ("32",),
        with_rooms(model=GroupsOfPowersOfTwo),
    ),
    Mutant("ranks_above_64_cut_off", "Uses the first 64 ranks.", ("32",), with_rooms(model=RanksAbove64CutOff)),
    Mutant(
        "layers_past_the_eighth_not_adapted",
        "Leaves the adapter out of every layer after the eighth.",
        ("32",),
        with_rooms(model=LayersPastTheEighthNotAdapted),
    ),
    Mutant("ids_of_16_bits", "Keeps 16 bits of a token id.", ("32",), with_rooms(read_batch=ids_of_16_bits)),
    Mutant(
        "positions_end_at_1023",
        "Gives every token past the 1024th the same position.",
        ("32",),
        with_rooms(read_batch=positions_end_at_1023),
    ),
    Mutant(
        "positions_of_32_rows",
        "Puts every token of the rows after the 32nd at position 0.",
        ("32",),
        with_rooms(read_batch=positions_of_32_rows),
    ),
    Mutant(
        "refuses_what_it_declares", "Declares Gemma 2, and refuses it.", ("32",), with_trainer(RefusesWhatItDeclares)
    ),
    Mutant(
        "fails_where_it_should_refuse",
        "Does not declare Gemma 2, and ends in a KeyError instead of a refusal.",
        ("32",),
        with_trainer(FailsWhereItShouldRefuse),
        change_spec=without_families,
    ),
)
