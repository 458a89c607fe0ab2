"""AdamW over the flat adapter: float32 in plain torch or one kernel, 8-bit and paged through bitsandbytes.

AdamW (Loshchilov & Hutter 2019), with bias correction and epsilon outside the root, as torch has it:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

An expert of a stack whose gradient is zero in every number, A's and B's, keeps p, m and v bit for bit: it had no token,
or none that reaches the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qlora_hal.contract.toolkit import MOMENTS, check_moments
from qlora_hal.contract.values import Adapter, AdapterConfig, OptimizerSnapshot, StepSettings
from qlora_hal_backends.torch_family.device import device_refusal, has_queue
from qlora_hal_backends.torch_family.flat_adapter import (
    STATE_BLOCK,
    BlockOwners,
    FlatAdapter,
    StackOfExperts,
    whole_blocks,
)
from qlora_hal_backends.torch_family.lora_linear import LoRASwitches


class Optimizer(Protocol):
    """One update of the flat parameters from the flat gradients. `words`, where there are any, are for the run's
    `kernel_path`."""

    @property
    def words(self) -> str: ...

    def update(self, settings: StepSettings, norm: Tensor) -> Tensor:
        """Clip by `norm`, update, and return a scalar: 1 where applied, 0 where refused as not finite."""
        ...

    def snapshot(self) -> OptimizerSnapshot: ...

    def restore(self, snapshot: OptimizerSnapshot) -> None: ...


def make_optimizer(name: str, flat: FlatAdapter) -> Optimizer:
    """`adamw`, or one of bitsandbytes' by its name in the configuration."""
    # A CPU has nothing to page to; the platform's note says so to the user.
    paged = name.startswith("paged") and flat.parameters.device.type != "cpu"
    eight_bit = name.endswith("8bit")
    if not (eight_bit or paged):
        return FlatAdamW(flat, proved_update(flat.parameters.device))
    return BitsandbytesAdamW(flat, eight_bit=eight_bit, paged=paged)


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor:
    """torch's clip_grad_norm_: max_norm / (norm + 1e-6), at most 1."""
    return torch.ones_like(norm) if not max_norm else (max_norm / (norm + 1e-6)).clamp(max=1.0)


AT_A_TIME = 2**23
"""Numbers that one pass of the update takes: what it needs beside the adapter stays below 170 MB."""


class Update(Protocol):
    """The update itself, of parameters, their copy in the compute dtype, and both moments. `words` say why it takes
    longer than it might, for the run's `kernel_path`.

    `figures` float32 `[4]`: 1 where the step applies, else 0; the factor of the gradients; 1 - b1^t and 1 - b2^t.
    """

    @property
    def words(self) -> str: ...

    def __call__(self, first: Tensor, second: Tensor, figures: Tensor, settings: StepSettings) -> None: ...


class FlatAdamW:
    """Float32 moments. A refused step is decided on the device: nothing waits for the host."""

    def __init__(self, flat: FlatAdapter, make_update: Callable[[FlatAdapter], Update]) -> None:
        self._flat = flat
        self._update = make_update(flat)
        self._first = torch.zeros_like(flat.parameters)
        self._second = torch.zeros_like(flat.parameters)
        self._step = torch.zeros((), dtype=torch.float32, device=flat.parameters.device)

    @property
    def words(self) -> str:
        return self._update.words

    @torch.no_grad()
    def update(self, settings: StepSettings, norm: Tensor) -> Tensor:
        applied = torch.isfinite(norm).to(torch.float32)
        factor = torch.where(applied > 0, clip_factor(norm, settings.max_grad_norm), torch.zeros_like(norm))
        self._step += applied
        # expm1 keeps the digits that 1 - b^t loses in float32 for small t.
        corrections = [
            -torch.expm1(self._step * math.log(beta)) if beta else torch.ones_like(norm)
            for beta in (settings.beta1, settings.beta2)
        ]
        self._update(self._first, self._second, torch.stack((applied, factor, *corrections)), settings)
        return applied

    def snapshot(self) -> OptimizerSnapshot:
        return OptimizerSnapshot(int(self._step.item()), named_moments(self._flat, self._first, self._second))

    def restore(self, snapshot: OptimizerSnapshot) -> None:
        first, second = flat_moments(self._flat, snapshot)
        self._first.copy_(first)
        self._second.copy_(second)
        self._step.fill_(float(snapshot.step))


class UpdateInParts:
    """See `Update`: plain torch, some numbers at a time. `reason` is why, where a device might have a kernel."""

    def __init__(self, flat: FlatAdapter, reason: str = "") -> None:
        self._flat = flat
        self._owners = BlockOwners.of(flat.stacks, len(flat.parameters), flat.parameters.device)
        self.words = reason and f"AdamW in many passes ({reason})"

    def __call__(self, first: Tensor, second: Tensor, figures: Tensor, settings: StepSettings) -> None:
        applied, factor, first_correction, second_correction = figures.unbind()
        for (parameters, gradients, m, v), trained in self._parts(first, second):
            changed = applied if trained is None else applied * trained
            rate = changed * settings.learning_rate
            # nan_to_num first: 0 * inf would be NaN. It changes nothing in a finite gradient.
            gradient = torch.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0).mul_(factor)
            m.lerp_(gradient, changed * (1.0 - settings.beta1))
            v.lerp_(gradient.square_(), changed * (1.0 - settings.beta2))
            denominator = (v / second_correction).sqrt_().add_(settings.epsilon)
            update = (m / first_correction).div_(denominator).mul_(rate)
            # Before the first applied step both corrections are 0 and the quotient is NaN; the rate 0 must win.
            update = torch.where(changed > 0, update, 0.0)
            parameters.mul_(1.0 - rate * settings.weight_decay).sub_(update)
        self._flat.refresh_compute()

    def _parts(self, first: Tensor, second: Tensor) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        """Parameters, gradients and both moments, some at a time; where there are experts as blocks `[blocks, numbers]`
        with 1 or 0 `[blocks, 1]` for each that is trained or not."""
        flat = self._flat
        buffers = (flat.parameters, flat.gradients, first, second)
        begin = 0
        if flat.stacks:
            trained = self._owners.trained(flat.gradients).to(torch.float32)[:, None]
            blocks = [whole_blocks(buffer) for buffer in buffers]
            begin = blocks[0].numel()
            split = (part.split(AT_A_TIME // STATE_BLOCK or 1) for part in (*blocks, trained[: len(blocks[0])]))
            yield from ((list(parts), chosen) for *parts, chosen in zip(*split, strict=True))
        yield from (
            (list(part), None) for part in zip(*(buffer[begin:].split(AT_A_TIME) for buffer in buffers), strict=True)
        )


@cache
def proved_update(device: torch.device) -> Callable[[FlatAdapter], Update]:
    """One kernel where the device has Triton and computes with it what torch does; plain torch elsewhere."""
    if device_refusal(device) is not None:
        return UpdateInParts
    try:
        from qlora_hal_backends.torch_family.adamw_kernel import UpdateByKernel

        agrees = update_agrees(UpdateByKernel, device)
    except Exception as error:  # Triton compiles here and now: a missing C compiler or driver shows in many classes
        reason = f"its kernel does not run here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return partial(UpdateInParts, reason=reason)
    return UpdateByKernel if agrees else partial(UpdateInParts, reason="its kernel computed something else than torch")


def update_agrees(make_update: Callable[[FlatAdapter], Update], device: torch.device) -> bool:
    """Whether some steps on a small adapter give what plain torch makes of them: an expert without a gradient, and a
    refused step among them."""
    found, expected = (_after_steps(each, device) for each in (make_update, UpdateInParts))
    is_close = torch.allclose(found[0], expected[0], rtol=UPDATES_DIFFER, atol=UPDATES_DIFFER)
    # Masters that differ in their last bit may be rounded to neighbours.
    return is_close and torch.allclose(found[1], expected[1], rtol=2.0**-7, atol=0.0)


UPDATES_DIFFER = 1e-5
"""Of numbers of size 1: roundings of float32 in another order, a device's own root and quotient."""


def _after_steps(make_update: Callable[[FlatAdapter], Update], device: torch.device) -> tuple[Tensor, Tensor]:
    """What updates change: master and moments `[3, numbers]`, and the copy. Some are of no expert, some of three,
    whose A is one block and whose B two."""
    generator = torch.Generator().manual_seed(0)
    start = 2 * STATE_BLOCK
    stack = StackOfExperts(3, ((start, STATE_BLOCK), (start + 3 * STATE_BLOCK, 2 * STATE_BLOCK)))
    size = start + 9 * STATE_BLOCK + 40
    parameters = torch.randn(size, generator=generator).to(device)
    flat = FlatAdapter(
        adapter=Adapter({}, AdapterConfig(1, 1.0)),
        slices={},
        parameters=parameters,
        gradients=torch.zeros_like(parameters),
        compute=parameters.to(torch.bfloat16),
        switches=LoRASwitches(),
        stacks=(stack,),
    )
    optimizer = FlatAdamW(flat, make_update)
    settings = StepSettings(0.05, 1.0, weight_decay=0.1)
    for step in range(4):
        flat.gradients.copy_(torch.randn(size, generator=generator))
        owner = flat.gradients[start:-40].view(-1, STATE_BLOCK)
        owner[[step % 2, 3 + 2 * (step % 2), 4 + 2 * (step % 2)]] = 0.0
        owner[2] = owner[7, :-1] = owner[8] = 0.0  # one number is enough
        if step == 2:
            flat.gradients[-1] = float("inf")
        if step == 3:
            flat.gradients[:start] = flat.gradients[-40:] = 0.0  # what is no expert's is updated all the same
        optimizer.update(settings, torch.linalg.vector_norm(flat.gradients))
    return torch.stack((flat.parameters, optimizer._first, optimizer._second)), flat.compute


class BitsandbytesAdamW:
    """bitsandbytes' AdamW; 8-bit state is blockwise (Dettmers et al. 2021), paged state lives in managed memory.

    Its kernel cannot refuse on the device, so the norm is read before each update: one wait a step.
    """

    words = ""

    def __init__(self, flat: FlatAdapter, *, eight_bit: bool, paged: bool) -> None:
        import bitsandbytes

        self._flat = flat
        self._owners = BlockOwners.of(flat.stacks, len(flat.parameters), flat.parameters.device)
        self._parameter = torch.nn.Parameter(flat.parameters)
        self._kind = f"bitsandbytes.adamw{'8bit' if eight_bit else '32bit'}"
        self._eight_bit, self._is_paged = eight_bit, paged
        name = ("Paged" if paged else "") + ("AdamW8bit" if eight_bit else "AdamW32bit")
        self._inner: Any = getattr(bitsandbytes.optim, name)([self._parameter], lr=1.0)

    @torch.no_grad()
    def update(self, settings: StepSettings, norm: Tensor) -> Tensor:
        if not math.isfinite(norm.item()):
            return torch.zeros_like(norm)
        group = self._inner.param_groups[0]
        group.update(
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        idle = self._idle()
        # In place: a copy would be as large as the adapter, and the next window begins with zeros.
        self._parameter.grad = self._flat.gradients.mul_(clip_factor(norm, settings.max_grad_norm))
        if idle is None:
            self._inner.step()
        else:
            self._step_but_for(idle, group)
        self._parameter.grad = None
        self._flat.refresh_compute()
        return torch.ones_like(norm)

    def _idle(self) -> Tensor | None:
        """Numbers of the blocks whose expert has no gradient, in rising order; None where there are none."""
        flat = self._flat
        if not flat.stacks:
            return None
        idle = (~self._owners.trained(flat.gradients)).nonzero().flatten()
        return idle if len(idle) else None

    def _step_but_for(self, idle: Tensor, group: Mapping[str, Any]) -> None:
        """The kernel has no other way to leave numbers as they are than to keep them and put them back: some at a time,
        or the copies were as large as the adapter. The host puts back those of paged state, which the device must have
        let go of."""
        state, size = self._made_state(group), len(self._parameter)
        at_a_time = max(AT_A_TIME // STATE_BLOCK, 1) * STATE_BLOCK
        if at_a_time >= size:
            with _left_as_they_are(_by_blocks(self._parameter.data, state), idle):
                self._inner.step()
            return
        begins = torch.arange(0, size, at_a_time)
        bounds = [*torch.searchsorted(idle, (begins // STATE_BLOCK).to(idle.device)).tolist(), len(idle)]
        for begin, (first, end) in zip(begins.tolist(), pairwise(bounds), strict=True):
            numbers = slice(begin, min(begin + at_a_time, size))
            part, parameter = _part_of_state(state, numbers), torch.nn.Parameter(self._flat.parameters[numbers])
            parameter.grad = self._flat.gradients[numbers]
            self._inner.state[parameter] = part
            with _left_as_they_are(_by_blocks(parameter.data, part), idle[first:end] - begin // STATE_BLOCK):
                self._inner.prefetch_state(parameter)
                self._inner.update_step(group, parameter, 0, 0)
                if self._is_paged:
                    self._wait_for_device()
            del self._inner.state[parameter]
        state["step"] += 1

    def _made_state(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The inner optimizer's, which makes it at its first step."""
        state: dict[str, Any] = self._inner.state[self._parameter]
        if not state:
            self._inner.init_state(group, self._parameter, 0, 0)
        return state

    def _wait_for_device(self) -> None:
        """Paged state lies in managed memory, which the host reads and writes directly."""
        device = self._flat.parameters.device
        if has_queue(device):
            torch.get_device_module(device).synchronize()

    def snapshot(self) -> OptimizerSnapshot:
        self._wait_for_device()
        state = self._inner.state.get(self._parameter)
        if not state:
            zeros = torch.zeros_like(self._flat.parameters)
            return OptimizerSnapshot(0, named_moments(self._flat, zeros, zeros))
        first, second = (_dequantized(state, index) for index in (1, 2))
        return OptimizerSnapshot(
            step=int(state["step"]),
            moments=named_moments(self._flat, first, second),
            exact=not self._eight_bit,
            native_kind=self._kind,
            native=_native_arrays(state),
        )

    def restore(self, snapshot: OptimizerSnapshot) -> None:
        # The state's tensors are made by the inner optimizer at its first step; a step at rate 0 makes them.
        self._parameter.grad = self._flat.gradients.zero_()
        self._inner.param_groups[0].update(lr=0.0, weight_decay=0.0)
        self._inner.step()
        self._parameter.grad = None
        state = self._inner.state[self._parameter]
        if snapshot.native_kind == self._kind:
            for key, array in snapshot.native.items():
                state[key].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        else:
            for index, moment in enumerate(flat_moments(self._flat, snapshot), start=1):
                _store_moment(state, index, moment)
        state["step"] = snapshot.step


def _part_of_state(state: Mapping[str, Any], numbers: slice) -> dict[str, Any]:
    """Views of the moments of some numbers, whole blocks of them, and of their blocks' scales. Of paged moments a view
    has what bitsandbytes notes on them, or it were taken for the host's."""
    blocks = slice(numbers.start // STATE_BLOCK, -(-numbers.stop // STATE_BLOCK))
    moments = {key: state[key][numbers] for key in ("state1", "state2")}
    for key, part in moments.items():
        for name in ("is_paged", "page_deviceid"):
            if hasattr(state[key], name):
                setattr(part, name, getattr(state[key], name))
    return {**state, **moments, **{key: state[key][blocks] for key in ("absmax1", "absmax2") if key in state}}


@contextmanager
def _left_as_they_are(blocks: Sequence[Tensor], idle: Tensor) -> Iterator[None]:
    """The rows `idle` of each have afterwards what they had before."""
    kept = [(part, at, part[at]) for part in blocks for at in [idle.to(part.device)]]
    yield
    for part, at, before in kept:
        part[at] = before


def _by_blocks(parameters: Tensor, state: Mapping[str, Any]) -> list[Tensor]:
    """All that an update changes, a row or a number to each block."""
    changed = [whole_blocks(part) for part in (parameters, state["state1"], state["state2"])]
    return changed + [state[key] for key in ("absmax1", "absmax2") if key in state]


_NATIVE_KEYS = ("state1", "state2", "absmax1", "absmax2")


def _native_arrays(state: Mapping[str, Any]) -> dict[str, npt.NDArray[np.generic]]:
    return {key: state[key].detach().cpu().numpy().copy() for key in _NATIVE_KEYS if key in state}


def _dequantized(state: Mapping[str, Any], index: int) -> Tensor:
    from bitsandbytes import functional

    codes: Tensor = state[f"state{index}"]
    if codes.dtype == torch.float32:
        return codes
    absmax: Tensor = state[f"absmax{index}"]
    code = state[f"qmap{index}"].to(absmax.device)
    # Paged codes call themselves host tensors.
    moment: Tensor = functional.dequantize_blockwise(codes.to(absmax.device), absmax=absmax, code=code, blocksize=256)
    return moment


def _store_moment(state: Mapping[str, Any], index: int, moment: Tensor) -> None:
    from bitsandbytes import functional

    if state[f"state{index}"].dtype == torch.float32:
        state[f"state{index}"].copy_(moment)
        return
    code = state[f"qmap{index}"].to(moment.device)
    codes, quant_state = functional.quantize_blockwise(moment, code=code, blocksize=256)
    state[f"state{index}"].copy_(codes)
    state[f"absmax{index}"].copy_(quant_state.absmax)


def named_moments(flat: FlatAdapter, first: Tensor, second: Tensor) -> dict[str, npt.NDArray[np.float32]]:
    moments: dict[str, npt.NDArray[np.float32]] = {}
    for kind, buffer in zip(MOMENTS, (first, second), strict=True):
        moments.update({f"{name}.{kind}": array for name, array in flat.to_host(buffer).items()})
    return moments


def flat_moments(flat: FlatAdapter, snapshot: OptimizerSnapshot) -> tuple[Tensor, Tensor]:
    """Raises AdapterError with every moment that is missing or misshapen."""
    check_moments(snapshot, {name: shape for name, (_, shape) in flat.slices.items()})
    first, second = (
        flat.from_host({name: snapshot.moments[f"{name}.{kind}"] for name in flat.slices}) for kind in MOMENTS
    )
    return first, second
