"""`python -m qlora_hal_conformance.convergence --backend NAME`: does training end where the reference's does?"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_hal.errors import QloraHalError
from qlora_hal.files import strict_json
from qlora_hal_conformance.convergence.comparison import (
    Chosen,
    Comparison,
    TaskResult,
    compare,
    make_references,
    quantization_of,
    read_quantization,
    unaltered,
)
from qlora_hal_conformance.convergence.judging import Judged, SeedsError
from qlora_hal_conformance.convergence.models import MODELS
from qlora_hal_conformance.convergence.references import path_of, write_references
from qlora_hal_conformance.convergence.tasks import TASKS
from qlora_hal_conformance.mutants.convergence import DEFECTS, HONEST
from qlora_hal_conformance.subject import Reference, Subject, import_subject

PASSES, DOES_NOT = 0, 20
REFERENCE_SEEDS, SEEDS = 20, 8


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every task is indistinguishable from its reference, or when references were made; 20 otherwise; else the
    status of the error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    given = _parser().parse_args(arguments)
    if not (given.backend or given.trainer or given.spec):
        _parser().error("name a backend: --backend NAME, or --trainer and --spec for one under development")
    command = "python -m qlora_hal_conformance.convergence " + shlex.join(arguments)
    try:
        subject = import_subject(Reference(given.backend or "", given.trainer or "", given.spec or ""))
        return (_make if given.make_references else _judge)(subject, given, command)
    except QloraHalError as error:
        print(error, file=sys.stderr)
        return error.exit_status


def _make(subject: Subject, given: argparse.Namespace, command: str) -> int:
    chosen = _chosen(subject, given, REFERENCE_SEEDS)
    references = make_references(subject, chosen, command, _told)
    path = given.out or path_of(chosen.model, chosen.quantization or quantization_of(subject))
    write_references(references, path)
    for name, task in references.tasks.items():
        print(f"{name}: {task.before:.4f} before, {task.mean:.4f} +- {task.standard_deviation:.4f} nats after")
    print(f"written: {path}")
    return PASSES


def _judge(subject: Subject, given: argparse.Namespace, command: str) -> int:
    chosen = _chosen(subject, given, SEEDS)
    alter = {**DEFECTS, **HONEST}.get(given.defect, unaltered)
    try:
        found = compare(subject, chosen, _told, references=given.references, alter=alter)
    except SeedsError as error:
        _parser().error(str(error))
    for line in in_words(found):
        print(line)
    if given.out is not None:
        document = {**found.as_json(), "defect": given.defect, "command": command}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_bytes(strict_json.encode(document))
    return PASSES if found.passes else DOES_NOT


def in_words(found: Comparison) -> list[str]:
    """What the terminal shows, a line each."""
    stored = found.quantization
    blocks = f" in blocks of {stored.block_size}" if stored.block_size else ""
    lines = [
        f"{found.model}, {stored.weight_format.value}{blocks}, {found.dtype}: "
        f"{'indistinguishable from the reference' if found.passes else 'NOT shown to be like the reference'}",
        f"  its base is apart from the contract's weights by {found.weights_apart:.2g} of their size",
    ]
    for name, task in found.tasks.items():
        lines += [f"  {name}: {task.judgement.verdict.value}", *_of_task(task)]
    return lines


def _of_task(task: TaskResult) -> list[str]:
    sigma = task.reference.standard_deviation
    kind = "the same seeds" if task.judgement.paired else "other seeds"
    mean = task.judgement.mean
    side = "" if mean.verdict.value != "different" else (" (worse)" if not mean.found < 0 else " (better)")
    caught = task.power.surely_caught if task.judgement.paired else task.power.caught_unpaired
    return [
        f"    reference {task.reference.mean:.4f} +- {sigma:.4f} over {len(task.reference.losses)} seeds; "
        f"{len(task.runs)} runs of {kind}; a shift of {caught:.4f} nats ({caught / sigma:.2f} sigma) is caught",
        f"    {_in_words(mean)}{side}",
        f"    {_in_words(task.judgement.spread)}",
    ]


def _in_words(judged: Judged) -> str:
    told = f"{judged.what}: {judged.found:+.5f}, between {judged.low:+.5f} and {judged.high:+.5f}"
    if judged.probability is not None:
        return f"{told}; honest runs lie as far apart with probability {judged.probability:.2g}"
    return f"{told}; allowed {judged.margin[0]:+.5f} to {judged.margin[1]:+.5f}"


def _chosen(subject: Subject, given: argparse.Namespace, seeds: int) -> Chosen:
    first, count = given.first_seed, given.seeds or seeds
    return Chosen(
        given.model,
        tuple(given.task or TASKS),
        tuple(range(first, first + count)),
        read_quantization(subject, given.weight_format) if given.weight_format else None,
        given.dtype or "",
    )


def _told(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_hal_conformance.convergence",
        description="Train a small pretrained model with a few seeds and judge where it ends by the reference's seeds. "
        "Exit 0 only when it is indistinguishable, else 20.",
    )
    parser.add_argument("--backend", metavar="NAME", help="a listed backend")
    parser.add_argument("--trainer", metavar="MODULE:NAME", help="the trainer of a backend that is not listed")
    parser.add_argument("--spec", metavar="MODULE:SPEC", help="the spec of a backend that is not listed")
    parser.add_argument("--model", choices=tuple(MODELS), default="demo", help="which pretrained model [demo]")
    parser.add_argument("--task", action="append", choices=tuple(TASKS), help="only this task; may be repeated")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"how many [{SEEDS}; {REFERENCE_SEEDS} for references]")
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="S", help="S to S + N - 1; from 20 on they are not the reference's"
    )
    parser.add_argument(
        "--weight-format",
        metavar="FORMAT[:BLOCK]",
        help="how the base is stored [nf4:64, or the backend's 4-bit format]",
    )
    parser.add_argument("--dtype", help="compute dtype [what auto takes on this device]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the result is written as JSON")
    parser.add_argument("--references", type=Path, metavar="FILE", help="other references than those of the package")
    parser.add_argument(
        "--make-references",
        action="store_true",
        help="train in float32 on the contract's weights and write what the seeds come to; --out names the file",
    )
    parser.add_argument(
        "--defect",
        choices=(*DEFECTS, *HONEST),
        help="change the backend on the way: a deliberate defect that must be refused, or sums_reversed, which is none",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
