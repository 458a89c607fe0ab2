"""The five verdicts of a case, and the one place where they are given.

There is no skip. A capability that a backend does not declare is asked for all the same: the backend must refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Verdict(StrEnum):
    """What became of a case. Only PASSED and REFUSED are green."""

    PASSED = "passed"
    REFUSED = "refused"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    WAIVED = "waived"

    @property
    def is_green(self) -> bool:
        return self in (Verdict.PASSED, Verdict.REFUSED)


NO_DEVICE_FOR_RANK = "QH-R01"
"""How a backend refuses a rank that finds no device of its own."""


class Claim(StrEnum):
    """Whether what a case needs is declared. NARROWED: declared by the backend, not proved by this device, or in need
    of more devices than this machine has. OPEN: a model that no backend has to serve; it is computed as the oracle
    computes it, or refused."""

    DECLARED = "declared"
    UNDECLARED = "undeclared"
    NARROWED = "narrowed"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Measure:
    """One comparison of a case: `measured` must not exceed `bound`. `formula` says where the bound comes from."""

    what: str
    measured: float
    bound: float
    formula: str

    @property
    def holds(self) -> bool:
        """NaN never holds."""
        return self.measured <= self.bound

    @property
    def used(self) -> float:
        """The part of the bound that was used: 0 is exact, 1 is the bound."""
        if self.measured == 0.0:
            return 0.0
        return self.measured / self.bound if self.bound > 0.0 else float("inf")


@dataclass(frozen=True, slots=True)
class Phase:
    """How one phase of a case (`setup`, `call`, `teardown`) ended."""

    name: str
    error: BaseException | None = None
    was_skipped: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and its reason in one sentence."""

    verdict: Verdict
    message: str = ""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case as it stands in a certificate."""

    case: str
    verdict: Verdict
    message: str = ""
    claim: Claim = Claim.DECLARED
    seconds: float = 0.0
    measures: tuple[Measure, ...] = ()
    ran: tuple[str, ...] = ()
    waiver: Mapping[str, str] = field(default_factory=dict)

    @property
    def tightest(self) -> Measure | None:
        """The comparison that used the largest part of its bound."""
        return max(self.measures, key=lambda measure: measure.used, default=None)


def judge(phases: Sequence[Phase], claim: Claim) -> Judgement:
    """The verdict of a case from how its phases ended and whether it was declared."""
    from qlora_hal.errors import ConfigError, ModelError, UnsupportedFeatureError

    for phase in phases:
        if phase.was_skipped:
            return Judgement(Verdict.INCONCLUSIVE, f"skipped in {phase.name}: a skip is no verdict")
        if phase.error is not None and phase.name != "call":
            return Judgement(Verdict.FAILED, f"failed in {phase.name}: {described(phase.error)}")
    call = next((phase for phase in phases if phase.name == "call"), None)
    if call is None:
        return Judgement(Verdict.INCONCLUSIVE, "the case was set up but never called")
    if call.error is None:
        if claim is Claim.UNDECLARED:
            return Judgement(Verdict.FAILED, "it works but is not declared: declare it in the spec's capabilities")
        return Judgement(Verdict.PASSED)
    lacks_a_device = isinstance(call.error, ConfigError) and call.error.code == NO_DEVICE_FOR_RANK
    if (
        isinstance(call.error, UnsupportedFeatureError)
        or (claim is Claim.OPEN and isinstance(call.error, ModelError))
        or (claim is Claim.NARROWED and lacks_a_device)
    ):
        return _judge_refusal(call.error, claim)
    if claim is Claim.UNDECLARED:
        return Judgement(
            Verdict.FAILED, f"not declared, so UnsupportedFeatureError was expected; it raised {described(call.error)}"
        )
    return Judgement(Verdict.FAILED, described(call.error))


def _judge_refusal(error: BaseException, claim: Claim) -> Judgement:
    if claim is Claim.DECLARED:
        return Judgement(Verdict.FAILED, f"declared, but refused: {described(error)}")
    if not str(getattr(error, "fix", "")).strip() or not str(getattr(error, "message", "")).strip():
        return Judgement(Verdict.FAILED, "refused without saying what to do: the error has no message or no fix")
    return Judgement(Verdict.REFUSED, str(getattr(error, "message", "")))


def described(error: BaseException, *, longest: int = 500) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' | '.join(lines[:4])}" if lines else type(error).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."
