"""What a model card may say of conformance: only records that verify, and that are of the backend that trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qlora_hal.errors import ConfigError
from qlora_hal.files import strict_json

RECORD_FILE = "conformance.json"
"""What `qlora-hal conformance --for RUN` writes beside a run."""


class Suite(Protocol):
    """What is asked of the conformance suite, which the core does not import: `qlora_hal_conformance.certificate`."""

    def read_certificate(self, path: Path, /) -> dict[str, object]: ...

    def problems(self, document: Mapping[str, object], /) -> list[str]: ...

    def content_hash(self, document: Mapping[str, object], /) -> str: ...


@dataclass(frozen=True, slots=True)
class Proof:
    """One record in the words of a card, and its id, the SHA-256 of its content."""

    words: str
    sha256: str


def proof_of_certificate(path: Path, backend: str, suite: Suite) -> Proof:
    """The certificate of `backend`. Raises ConfigError QH-B51 for what is none, QH-B54 for one that does not verify, is
    of another backend, or says that it is not conformant."""
    document = suite.read_certificate(path)
    named = _part(document, "backend").get("name")
    wrong = suite.problems(document)
    if not wrong and named != backend:
        wrong = [f"it is of {named}, and {backend} trained this run"]
    if not wrong and document.get("conformant") is not True:
        wrong = ["it says that the backend is not conformant"]
    if wrong:
        raise _unusable(path, wrong, "Name a certificate of that backend that qlora-hal conformance --verify accepts.")
    totals, device = _part(document, "totals"), _part(document, "device").get("device")
    return Proof(
        f"{backend} is certified by revision {_part(document, 'suite').get('version')} of the conformance suite "
        f"({totals.get('passed')} cases passed, {totals.get('refused')} refused as undeclared; on {device})",
        str(document["sha256"]),
    )


def proof_beside(run_dir: Path, run: Mapping[str, object], suite: Suite) -> tuple[Proof | None, str]:
    """What `conformance.json` says of this run, and a note where it is of something else; (None, "") without one.

    Raises ConfigError QH-B54 for one that was edited or damaged.
    """
    path = run_dir / RECORD_FILE
    try:
        document = strict_json.read_object(path)
        seal = suite.content_hash(document)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, RecursionError) as problem:
        raise _unusable(path, [f"it cannot be read ({problem})"], _judge_again(run_dir)) from problem
    if document.get("sha256") != seal:
        raise _unusable(path, ["its content does not have the hash it is signed with"], _judge_again(run_dir))
    other = _of_something_else(document, _part(run, "resolved"))
    if other:
        return None, f"{RECORD_FILE} is not quoted on the card: {other}"
    totals = _part(document, "totals")
    passed, asked = totals.get("passed"), sum(count for count in totals.values() if isinstance(count, int))
    verdict = "holds" if document.get("holds") is True else "does not hold"
    judged = _part(document, "run").get("judged")
    about = f": {'; '.join(map(str, judged))}" if isinstance(judged, list) and judged else ""
    return Proof(f"what this run computes {verdict} ({passed} of {asked} cases passed){about}", seal), ""


def _of_something_else(document: Mapping[str, object], resolved: Mapping[str, object]) -> str:
    """Why a record does not concern this run; "" where it does."""
    if document.get("kind") != "run" or document.get("filtered") is True:
        return "it is no whole record of a run"
    judged = _part(document, "run")
    combination = _part(judged, "combination")
    compared = {
        "backend": (_part(document, "backend").get("name"), resolved.get("backend")),
        "weight format": (combination.get("weight_format"), resolved.get("weight_format")),
        "dtype": (judged.get("dtype"), resolved.get("compute_dtype")),
        # Records and runs of earlier releases have no such key.
        "products in fp8": (bool(combination.get("fp8_products")), bool(resolved.get("fp8_products"))),
    }
    other = [f"{what} {there}, this run has {here}" for what, (there, here) in compared.items() if there != here]
    return f"it judges {'; '.join(other)}" if other else ""


def _unusable(path: Path, wrong: list[str], fix: str) -> ConfigError:
    return ConfigError(
        "QH-B54",
        f"{path.name} cannot be quoted on a model card: {'; '.join(wrong[:3])}.",
        where=str(path),
        cause="A card that names a proof nobody can repeat is worth less than one without.",
        fix=fix,
        context={"problems": wrong},
    )


def _judge_again(run_dir: Path) -> str:
    return f"Remove it, or run: qlora-hal conformance --for {run_dir}"


def _part(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}
