"""A log that is not as it was when a checkpoint was saved: what is gone, doubled, changed or another run's is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_hal.contract.values import LossSum
from qlora_hal.report.metrics import MetricsFile, evaluation_record, read_metrics, trained_seconds

SAVED = 9


def logged(path: Path, steps: int = SAVED, *, loss: float = 2.5, seconds: float = 0.25) -> dict[str, object]:
    """A log of one evaluation and `steps` steps; its mark."""
    with MetricsFile(path) as metrics:
        metrics.append(evaluation_record(0, LossSum(30.0, 10), "before"))
        for step in range(1, steps + 1):
            metrics.append({"step": step, "loss": loss / step, "seconds_per_step": seconds})
        return metrics.mark()


def compared(path: Path, mark: object, step: int = SAVED) -> tuple[str, MetricsFile]:
    """All that is said, and the log, opened as a resume does it."""
    metrics = MetricsFile(path)
    told = [*metrics.notes, metrics.compare(mark, step)]
    metrics.truncate_after(step)
    metrics.close()
    return " | ".join(filter(None, told)), metrics


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def steps_in(path: Path) -> list[object]:
    return [record["step"] for record in read_metrics(path) if "loss" in record]


def test_a_log_as_it_was_saved_is_gone_on_with_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    mark = logged(path)
    told, metrics = compared(path, mark)
    assert (told, metrics.is_complete) == ("", True)
    assert metrics.mark() == mark


def test_lines_of_later_steps_are_no_damage_and_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    mark = logged(path)
    with MetricsFile(path) as metrics:
        metrics.append({"step": 10, "loss": 1.0})
        metrics.append(evaluation_record(10, LossSum(30.0, 10), "after"))
    assert compared(path, mark)[0] == ""
    assert steps_in(path) == list(range(1, SAVED + 1))


@pytest.mark.fault("S26")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda kept: [*kept[:4], kept[4][:20]],
            "torn (20 bytes); it was dropped. | metrics.jsonl is missing steps 4 to 9",
        ),
        (
            lambda kept: [*kept[:4], bytes(200)],
            "torn (200 bytes); it was dropped. | metrics.jsonl is missing steps 4 to 9",
        ),
        (
            lambda kept: [*kept[:8], *[bytes(30) + b"\n"] * 2],
            "the last 2 lines were torn (62 bytes); they were dropped. | metrics.jsonl is missing steps 8 to 9",
        ),
        (lambda kept: [*kept[:3], *kept[5:]], "metrics.jsonl is missing steps 3 to 4"),
        (lambda kept: [kept[0], *kept[4:]], "metrics.jsonl is missing steps 1 to 3"),
        (lambda kept: kept[6:], "metrics.jsonl is missing steps 1 to 5"),
        (lambda kept: [*kept[:3], *kept[4:6], *kept[7:]], "metrics.jsonl is missing steps 3, 6"),
        (lambda kept: [*kept[:5], kept[4], *kept[5:]], "metrics.jsonl contains step 4 more than once"),
        (lambda kept: [*kept[:5], *kept[3:6], *kept[7:]], "is missing step 6 and contains steps 3 to 4 more than once"),
        (lambda kept: [], "metrics.jsonl is missing steps 1 to 9"),
        (lambda kept: [*kept[:5], kept[5].replace(b"0.5", b"0.4"), *kept[6:]], "was changed after step 9 was saved"),
        (lambda kept: kept[1:], "was changed after step 9 was saved"),
    ],
    ids=["cut", "zero tail", "zero lines", "hole", "head", "head and first evaluation", "two holes", "doubled",
         "hole and doubled", "emptied", "edited", "evaluation gone"],
)  # fmt: skip
def test_what_became_of_a_log_is_told(damage: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    mark = logged(path)
    path.write_bytes(b"".join(damage(lines(path))))  # type: ignore[operator]
    told, metrics = compared(path, mark)
    assert words in told
    assert metrics.is_complete is ("is missing" not in told)
    assert list(tmp_path.iterdir()) == [path]
    again, _ = compared(path, metrics.mark())  # as the next save marks it
    assert again == ""


@pytest.mark.fault("S26")
def test_a_log_that_was_removed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    mark = logged(path)
    path.unlink()
    told, metrics = compared(path, mark)
    assert "is missing steps 1 to 9" in told
    assert not metrics.is_complete


@pytest.mark.fault("S26")
@pytest.mark.parametrize("damaged", [b"\xff\xfe garbage\n", bytes(60) + b"\n", b'{"step": 4, "loss": \n', b"[1, 2]\n"])
def test_lines_in_the_middle_that_cannot_be_read_are_left_out_and_kept_beside(damaged: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    mark = logged(path)
    kept = lines(path)
    broken = b"".join([*kept[:4], damaged, *kept[5:]])
    path.write_bytes(broken)
    told, _ = compared(path, mark)
    (aside,) = tmp_path.glob(".damaged-metrics.jsonl-*")
    assert f"a line cannot be read; the file as it was is kept as {aside.name}" in told
    assert "is missing step 4" in told
    assert aside.read_bytes() == broken
    assert steps_in(path) == [1, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.fault("S26")
@pytest.mark.parametrize("steps", [2, SAVED, 20])
def test_the_log_of_another_run_is_kept_beside_whole(steps: int, tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other.jsonl"
    mark = logged(path)
    logged(other, steps, seconds=0.26)  # the same losses: only the clock tells
    foreign = other.read_bytes()
    path.write_bytes(foreign)
    told, metrics = compared(path, mark)
    (aside,) = tmp_path.glob(".damaged-metrics.jsonl-*")
    assert told == f"metrics.jsonl belonged to another run; it is kept as {aside.name}, and the log begins after step 9"
    assert aside.read_bytes() == foreign
    assert path.read_bytes() == b""
    assert not metrics.is_complete
    with MetricsFile(path) as again:  # the run goes on, and is saved and resumed once more
        again.append({"step": 10, "loss": 1.0})
        later = again.mark()
    told, metrics = compared(path, later, 10)
    assert (told, metrics.is_complete) == ("", False)


def test_a_checkpoint_of_an_earlier_release_marks_nothing_and_gaps_are_told_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logged(path)
    assert compared(path, None)[0] == ""
    path.write_bytes(b"".join(lines(path)[:3]))
    assert "is missing steps 3 to 9" in compared(path, None)[0]


def test_a_step_that_stands_there_twice_takes_its_time_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(
            json.dumps({"step": s, "loss": 1.0, "seconds_per_step": t}) + "\n"
            for s, t in ((1, 5.0), (1, 0.5), (2, 0.25))
        )
    )
    assert trained_seconds(path) == 0.75
