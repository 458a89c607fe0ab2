"""Right on models without experts; wrong in where a mixture sends tokens, in what an expert computes, or in what a step
does to experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Batch, PendingStep, StepSettings
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend import storage
from qlora_hal_conformance.reference_backend.loading import load_base
from qlora_hal_conformance.reference_backend.step import update
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import Arithmetic, MixtureShape, OracleLlama
from qlora_hal_oracle.adamw import STACK_AXES, AdamWState, idle_experts
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.lora import AdaptedLinear
from qlora_hal_oracle.loss import token_loss_gradient
from qlora_hal_oracle.mixture import Apply, Mixture, SharedTrace
from qlora_hal_oracle.routing import Routing, route

from .families import read_as
from .registry import Mutant, Open, with_rooms, with_trainer

Updated = dict[str, Float64]
CAPACITY = 1.25
"""What frameworks with full experts give each: this many times its share of the tokens."""
NOTHING = 1e-300
"""A gradient that is not zero, and whose square is."""


def mixture_read_as(**numbers: object) -> Open:
    """A reading of config.json that gets some numbers of the experts wrong."""

    def change(mixture: MixtureShape) -> MixtureShape:
        return replace(mixture, **numbers)  # type: ignore[arg-type]

    return read_as(lambda shape: shape if shape.mixture is None else replace(shape, mixture=change(shape.mixture)))


def gate_and_up_swapped() -> Open:
    def swapped(mixture: MixtureShape) -> MixtureShape:
        return replace(mixture, gate=mixture.up, up=mixture.gate)

    return read_as(lambda shape: shape if shape.mixture is None else replace(shape, mixture=swapped(shape.mixture)))


def with_mixture(kind: type[Mixture]) -> Open:
    """The model with another block of experts."""

    class WithMixture(OracleLlama):
        mixture = kind

    return with_rooms(model=WithMixture)


# where tokens go ------------------------------------------------------------------------------------------------------
class HigherIndexWins(Mixture):
    """Sorts scores, and takes from the end."""

    def route(self, logits: Float64) -> Routing:
        correction = None if self.correction is None else self.correction[::-1]
        turned = route(self.shape, logits[:, ::-1], correction)
        last = self.shape.experts - 1
        return replace(
            turned, scores=turned.scores[:, ::-1], deciding=turned.deciding[:, ::-1], chosen=last - turned.chosen
        )


class TokensLostAtFullExperts(Mixture):
    """An expert takes so many tokens, the first ones, and no more."""

    def route(self, logits: Float64) -> Routing:
        found = super().route(logits)
        capacity = int(np.ceil(CAPACITY * found.chosen.size / self.shape.experts))
        goes = (found.chosen[..., None] == np.arange(self.shape.experts)).any(axis=1)
        places = np.take_along_axis(np.cumsum(goes, axis=0) - 1, found.chosen, axis=-1)
        return replace(found, weights=np.where(places < capacity, found.weights, 0.0))


class CorrectionWeighs(Mixture):
    """Multiplies experts' outputs with the scores that were corrected for the choice."""

    def route(self, logits: Float64) -> Routing:
        found = super().route(logits)
        if self.correction is None:
            return found
        weights = np.take_along_axis(found.deciding, found.chosen, axis=-1)
        return replace(found, weights=self.shape.scaling * weights / weights.sum(axis=-1, keepdims=True))


class RouterDetached(Mixture):
    """Takes the routing weights for constants on the way back."""

    def route_backward(self, grad_weights: Float64, routing: Routing) -> Float64:
        return np.zeros_like(routing.scores)


class SharedExpertForgotten(Mixture):
    def shared_forward(self, x: Float64, apply: Apply, arithmetic: Arithmetic) -> SharedTrace:
        found = super().shared_forward(x, apply, arithmetic)
        return replace(found, share=np.zeros_like(found.share))


class SharedGateForgotten(Mixture):
    def shared_forward(self, x: Float64, apply: Apply, arithmetic: Arithmetic) -> SharedTrace:
        found = super().shared_forward(x, apply, arithmetic)
        return replace(found, share=np.ones_like(found.share), share_trace=None)


# what an expert computes ----------------------------------------------------------------------------------------------
class WrongExpertsAdapter(OracleLlama):
    """Each expert has the adapter of the one before it."""

    def linear(self, module: str) -> AdaptedLinear:
        found = super().linear(module)
        if found.weight.ndim != STACK_AXES or found.lora_a is None or found.lora_b is None:
            return found
        return replace(found, lora_a=np.roll(found.lora_a, 1, axis=0), lora_b=np.roll(found.lora_b, 1, axis=0))


class ExpertsInSixteenBits(ReferenceTrainer):
    """Quantizes what a library knows as linear layers, and leaves stacks of experts as they are."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        if source.facts.prequantized is None:
            plain = Quantization(WeightFormat.NONE)
            store = self.arithmetic.store
            unquantized = load_base(source, plain, store, store, storage.pack, storage.unpack)
            stacks = [module for module, linear in self.base.linear_modules.items() if linear.experts > 1]
            self.base.weights.update({f"{m}.weight": unquantized.weights[f"{m}.weight"] for m in stacks})


# what a step does -----------------------------------------------------------------------------------------------------
Update = Callable[[Updated, Updated, AdamWState, StepSettings, Arithmetic], None]


def experts_frozen(
    parameters: Updated, gradients: Updated, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    trained = {name: gradient for name, gradient in gradients.items() if gradient.ndim != STACK_AXES}
    update(parameters, trained, state, settings, arithmetic)


def idle_experts_decay(
    parameters: Updated, gradients: Updated, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    """A flat buffer in which a gradient of zero is a gradient."""
    idle = idle_experts(gradients)
    seen = {name: np.where(idle.get(name, np.False_), NOTHING, gradient) for name, gradient in gradients.items()}
    update(parameters, seen, state, settings, arithmetic)


def idle_moments_decay(
    parameters: Updated, gradients: Updated, state: AdamWState, settings: StepSettings, arithmetic: Arithmetic
) -> None:
    """The parameters of idle experts are put back, and their moments are not."""
    before = {name: tensor.copy() for name, tensor in parameters.items()}
    idle_experts_decay(parameters, gradients, state, settings, arithmetic)
    for name, still in idle_experts(gradients).items():
        parameters[name] = np.where(still, before[name], parameters[name])


class RouterTrained(ReferenceTrainer):
    """An optimizer over everything that has a gradient and is not packed."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        model = self.attached.model
        routers = [name for name in model.base if name.endswith(".gate.weight")]
        totals = {name: np.zeros_like(model.base[name]) for name in routers}
        for batch in window:
            forward = model.forward(batch)
            grad_logits = token_loss_gradient(forward.logits, batch.labels, settings.denominator or 1.0)
            found = model.backward(forward, grad_logits, with_base=True)
            totals = {name: total + found[name] for name, total in totals.items()}
        pending = super().train_step(window, settings)
        for name, total in totals.items():
            model.base[name] = model.base[name] - settings.learning_rate * np.sign(total)
        return pending


MUTANTS = (
    Mutant(
        "experts_in_16_bits",
        "Quantizes linear layers and leaves stacks of experts as they are.",
        ("33",),
        with_trainer(ExpertsInSixteenBits),
        recreates="bitsandbytes#1849",
    ),
    Mutant(
        "experts_frozen",
        "Lists experts among the trained modules, and updates only the others.",
        ("33",),
        with_rooms(update=experts_frozen),
        recreates="unsloth#4032",
    ),
    Mutant("router_trained", "Trains the routers beside the adapter.", ("33",), with_trainer(RouterTrained)),
    Mutant(
        "adapter_of_the_wrong_expert",
        "Gives each expert the adapter of the one before it.",
        ("33",),
        with_rooms(model=WrongExpertsAdapter),
    ),
    Mutant(
        "routing_weights_not_normalised",
        "Never divides the weights of the chosen experts by their sum.",
        ("33",),
        mixture_read_as(normalized=False),
    ),
    Mutant(
        "routing_weights_always_normalised",
        "Divides the weights of the chosen experts by their sum whatever config.json says.",
        ("33",),
        mixture_read_as(normalized=True),
    ),
    Mutant("routing_not_scaled", "Ignores routed_scaling_factor.", ("33",), mixture_read_as(scaling=1.0)),
    Mutant(
        "groups_of_experts_ignored",
        "Chooses among all experts, not among those of the best groups.",
        ("33",),
        mixture_read_as(groups=1, groups_chosen=1),
    ),
    Mutant(
        "correction_of_the_choice_weighs",
        "Multiplies experts' outputs with the scores that were corrected for the choice.",
        ("33",),
        with_mixture(CorrectionWeighs),
    ),
    Mutant("shared_expert_forgotten", "Leaves out the shared expert.", ("33",), with_mixture(SharedExpertForgotten)),
    Mutant(
        "shared_expert_ungated", "Adds the shared expert without its gate.", ("33",), with_mixture(SharedGateForgotten)
    ),
    Mutant("gate_and_up_of_experts_swapped", "Takes experts' gate for up.", ("33",), gate_and_up_swapped()),
    Mutant(
        "ties_to_the_higher_index",
        "Of experts with equal scores chooses those with the higher index.",
        ("33",),
        with_mixture(HigherIndexWins),
    ),
    Mutant(
        "tokens_lost_at_a_full_expert",
        "Drops the tokens of an expert beyond 1.25 times its share.",
        ("33",),
        with_mixture(TokensLostAtFullExperts),
    ),
    Mutant(
        "routing_weights_detached",
        "Passes no gradient through the routing weights.",
        ("33",),
        with_mixture(RouterDetached),
    ),
    Mutant(
        "idle_expert_decays",
        "Decays an expert that got no token, and moves it by its old moments.",
        ("33",),
        with_rooms(update=idle_experts_decay),
    ),
    Mutant(
        "moments_of_idle_experts_decay",
        "Keeps the adapter of an expert that got no token, and decays its moments.",
        ("33",),
        with_rooms(update=idle_moments_decay),
    ),
)
