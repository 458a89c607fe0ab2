"""Several data sets in one run: what a weight means, and that the order is a function of (seed, epoch) alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.contract.world import World
from qlora_hal.data import PreparedData, WindowSampler
from qlora_hal.data.source.mixture import drawn, sequences_in_epoch
from qlora_hal.errors import ConfigError, DataError

Prepare = Callable[..., PreparedData]


@pytest.fixture
def sources(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Files of so many rows each, named a.jsonl, b.jsonl, ..., as entries of data.sources."""

    def run(*counts: int, weights: Sequence[float] = ()) -> list[dict[str, Any]]:
        entries = []
        for place, count in enumerate(counts):
            letter = "abc"[place]
            file = tmp_path / f"{letter}.jsonl"
            file.write_text("".join(json.dumps({"text": f"{letter} {n}"}) + "\n" for n in range(count)))
            entries.append({"path": str(file), **({"weight": weights[place]} if weights else {})})
        return entries

    return run


def sampler_of(data: PreparedData, **changes: Any) -> WindowSampler:
    settings: dict[str, Any] = {
        "batch_size": 2,
        "accumulation": 1,
        "seed": 3,
        "shuffle": True,
        "group_by_length": True,
        "packing": False,
        "max_seq_length": 32,
        "pad_id": 0,
    }
    return WindowSampler(data.train, shares=data.shares, **{**settings, **changes})


def rows_of_epoch(sampler: WindowSampler, epoch: int) -> Counter[int]:
    """How often each row (counted through all sources, from 1) is in an epoch."""
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return Counter(row for step in steps for row in sampler._store.row_numbers[sampler._rows(step)].tolist())


def test_a_weight_is_how_often_an_epoch_has_each_row(prepared: Prepare, sources: Callable[..., Any]) -> None:
    data = prepared(None, sources=sources(4, 3, weights=[2, 1]))
    sampler = sampler_of(data)
    assert sampler.sequences == 11
    for epoch in (0, 1):
        assert rows_of_epoch(sampler, epoch) == {1: 2, 2: 2, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1}


def test_below_one_a_weight_goes_through_the_rows_over_several_epochs(
    prepared: Prepare, sources: Callable[..., Any]
) -> None:
    sampler = sampler_of(prepared(None, sources=sources(10, 2, weights=[0.3, 1])))
    epochs = [rows_of_epoch(sampler, epoch) for epoch in range(10)]
    assert all(epoch[11] == epoch[12] == 1 and epoch.total() == 5 for epoch in epochs)
    assert sum(epochs, Counter()) == {**dict.fromkeys(range(1, 11), 3), 11: 10, 12: 10}
    assert len({frozenset(epoch) for epoch in epochs}) > 3


@pytest.mark.parametrize(("size", "weight"), [(1, 0.01), (7, 0.5), (7, 2.5), (100, 0.333), (3, 1000.0)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_sequence_is_drawn_more_than_once_more_often_than_another(size: int, weight: float, shuffle: bool) -> None:
    epochs = [drawn(size, weight, source=1, seed=5, epoch=epoch, shuffle=shuffle) for epoch in range(9)]
    assert {len(epoch) for epoch in epochs} == {sequences_in_epoch(size, weight)}
    counts = np.bincount(np.concatenate(epochs), minlength=size)
    assert counts.max() - counts.min() <= 1


def test_sources_of_one_size_are_drawn_apart() -> None:
    first, second = (drawn(50, 0.5, source=source, seed=5, epoch=0, shuffle=True).tolist() for source in (0, 1))
    assert sorted(first) != sorted(second)


def test_one_source_of_weight_one_is_what_data_path_is(prepared: Prepare, sources: Callable[..., Any]) -> None:
    (entry,) = sources(9)
    alone, mixed = prepared(None, path=entry["path"]), prepared(None, sources=[entry])
    for packing in (False, True):
        one, other = (sampler_of(data, packing=packing) for data in (alone, mixed))
        assert [one.rows_of(step) for step in range(12)] == [other.rows_of(step) for step in range(12)]


def test_without_shuffle_sources_follow_one_another(prepared: Prepare, sources: Callable[..., Any]) -> None:
    sampler = sampler_of(
        prepared(None, sources=sources(2, 2, weights=[2, 0.5])), shuffle=False, group_by_length=False, batch_size=5
    )
    rows = [sampler._store.row_numbers[sampler._rows(step)].tolist() for step in (0, 1)]
    assert rows == [[1, 2, 1, 2, 3], [1, 2, 1, 2, 4]]


def test_any_step_is_found_without_the_steps_before_it(prepared: Prepare, sources: Callable[..., Any]) -> None:
    data = prepared(None, sources=sources(10, 3, weights=[0.7, 2]))
    whole = sampler_of(data)
    steps = [whole.rows_of(step) for step in range(20)]
    assert sampler_of(data).rows_of(17) == steps[17]


def test_ranks_share_the_windows_of_one(prepared: Prepare, sources: Callable[..., Any]) -> None:
    data = prepared(None, sources=sources(10, 3, weights=[0.7, 2]))
    one = sampler_of(data, batch_size=4)
    ranks = [sampler_of(data, world=World(rank, 2)) for rank in (0, 1)]
    for step in range(8):
        rows = [batch.labels[batch.labels >= 0].tolist() for rank in ranks for batch in rank.window(step)]
        whole = [batch.labels[batch.labels >= 0].tolist() for batch in one.window(step)]
        assert sorted(chain(*rows)) == sorted(chain(*whole))


def test_packs_hold_rows_of_one_source(prepared: Prepare, sources: Callable[..., Any]) -> None:
    sampler = sampler_of(prepared(None, sources=sources(6, 6, weights=[1, 2])), packing=True)
    assert rows_of_epoch(sampler, 0) == {**dict.fromkeys(range(1, 7), 1), **dict.fromkeys(range(7, 13), 2)}
    assert sampler._packs is not None
    assert all(len({row < 6 for row in pack}) == 1 for pack in sampler._packs)


def test_the_report_says_what_an_epoch_has_of_each_source(prepared: Prepare, sources: Callable[..., Any]) -> None:
    entries = sources(4, 3, weights=[2, 1])
    first, second = prepared(None, sources=entries).report.sources
    assert (first.source, first.weight, first.rows, first.rows_in_epoch) == (entries[0]["path"], 2.0, 4, 8)
    assert (second.rows, second.rows_in_epoch) == (3, 3)
    assert first.trained_tokens + second.trained_tokens == pytest.approx(1)
    lines = prepared(None, sources=entries).report.lines()  # now from the cache
    assert f"of {entries[0]['path']} (weight 2): 8 rows in an epoch, of 4; " in " ".join(lines)


@pytest.mark.parametrize("weights", [(0.001, 1), (0.25, 1), (1, 2.5), (0.5, 0.5)])
@pytest.mark.parametrize("packing", [False, True])
def test_what_the_report_says_of_an_epoch_is_what_its_windows_hold(
    weights: tuple[float, float], packing: bool, prepared: Prepare, sources: Callable[..., Any]
) -> None:
    data = prepared(None, sources=sources(14, 9, weights=weights), packing=packing, max_seq_length=64, seed=3)
    sampler = sampler_of(data, packing=packing, max_seq_length=64)
    # Packs differ in what they hold: over as many epochs as there are packs each is met equally often.
    epochs = range(len(sampler._lengths))
    rows = sum((rows_of_epoch(sampler, epoch) for epoch in epochs), Counter[int]())
    counted = dict(zip(data.train.row_numbers.tolist(), data.train.counted.tolist(), strict=True))
    tokens = [sum(n * counted[row] for row, n in rows.items() if (row > 14) is second) for second in (False, True)]
    for second, share in enumerate(data.report.sources):
        met = sum(n for row, n in rows.items() if (row > 14) is bool(second)) / len(epochs)
        assert share.rows_in_epoch == pytest.approx(met, abs=1)
        assert share.trained_tokens == pytest.approx(tokens[second] / sum(tokens), abs=0.02)
        assert share.effective_weight == pytest.approx(met / share.rows, rel=0.1)
    if packing:
        real = sampler._store.lengths
        held = sum(int(real[sampler._rows(step)].sum()) for step in range(len(epochs) * sampler.steps_per_epoch))
        places = len(epochs) * sampler.sequences * 64
        assert data.report.packing_efficiency == pytest.approx(held / places, rel=0.05)


def test_a_weight_that_whole_sequences_cannot_keep_is_told(prepared: Prepare, sources: Callable[..., Any]) -> None:
    entries = sources(14, 3, weights=[0.25, 1])
    assert prepared(None, sources=entries).report.alerts == [
        f"the weight 0.25 of {entries[0]['path']} is 0.286 in this run: an epoch has whole sequences (rows, or packs "
        "of them), and at least one of each source"
    ]
    (alert,) = prepared(None, sources=entries, packing=True, max_seq_length=128).report.alerts
    assert "is 1 in this run" in alert
    assert prepared(None, sources=sources(12, 3, weights=[0.25, 1])).report.alerts == []


def test_another_weight_is_another_run_of_the_same_tokens(
    prepared: Prepare, sources: Callable[..., Any], tmp_path: Path
) -> None:
    first = prepared(None, sources=sources(4, 3, weights=[2, 1]))
    second = prepared(None, sources=sources(4, 3, weights=[1, 1]))
    assert first.fingerprint != second.fingerprint
    assert first.hashes == second.hashes
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


def test_each_source_has_columns_and_rows_of_its_own(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage,antwort\n1 + 1?,2\n2 + 2?,4\n")
    (tmp_path / "b.csv").write_text("q,a\n3 + 3?,6\n4 + 4?,8\n")
    entries = [
        {"path": str(tmp_path / "a.csv"), "columns": {"instruction": "frage", "output": "antwort"}},
        {"path": str(tmp_path / "b.csv")},
    ]
    data = prepared(None, sources=entries, columns={"instruction": "q", "output": "a"})
    assert data.report.train.rows_used == 4
    assert len(prepared(None, sources=entries, columns={"instruction": "q", "output": "a"}, max_rows=1).train) == 2


def test_held_out_rows_are_of_all_sources_and_leave_some_of_each(
    prepared: Prepare, sources: Callable[..., Any]
) -> None:
    data = prepared(None, sources=sources(40, 40, weights=[1, 0.5]), validation_fraction=0.25)
    assert data.validation is not None
    assert {bool(row <= 40) for row in data.validation.row_numbers.tolist()} == {True, False}
    assert sampler_of(data).sequences == data.report.sources[0].rows + round(data.report.sources[1].rows / 2)


@pytest.mark.parametrize("seed", range(12))
def test_no_source_is_held_out_to_its_last_row(seed: int, prepared: Prepare, sources: Callable[..., Any]) -> None:
    data = prepared(None, sources=sources(1, 9), validation_fraction=0.5, seed=seed)
    assert data.validation is not None
    assert 1 in data.train.row_numbers
    assert 4 <= len(data.validation) <= 5


@pytest.mark.fault("D01")
def test_sources_of_one_row_each_have_none_to_hold_out(prepared: Prepare, sources: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"QH-D01.*each source would be left without one"):
        prepared(None, sources=sources(1, 1), validation_fraction=0.5)


@pytest.mark.fault("D01")
@pytest.mark.parametrize("counts", [(2, 0, 2), (2, 2, 0), (0, 2, 2)])
def test_a_source_without_rows_is_refused_by_name(
    counts: Sequence[int], prepared: Prepare, sources: Callable[..., Any]
) -> None:
    with pytest.raises(DataError, match=rf"QH-D01.*{'abc'[list(counts).index(0)]}\.jsonl is left"):
        prepared(None, sources=sources(*counts))


@pytest.mark.fault("D50")
def test_a_source_that_is_not_there_is_told_by_its_place(prepared: Prepare, sources: Callable[..., Any]) -> None:
    with pytest.raises(DataError) as caught:
        prepared(None, sources=[*sources(2), {"path": "/no/where.jsonl"}])
    assert caught.value.where == "data.sources[1].path"
    assert "data.sources[1].path" in caught.value.fix


@pytest.mark.fault("U01")
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": "x", "sources": [{"path": "a"}]}, "data.path and data.sources are mutually exclusive"),
        ({"split": "test", "sources": [{"path": "a"}]}, "name a split in each entry"),
        ({"sources": [{"path": "a"}, {"path": "a"}]}, "give them a weight instead"),
        ({"sources": [{"path": "a", "weight": 0}]}, "data.sources[0].weight = 0: input should be greater than 0"),
        ({"sources": [{"pth": "a", "path": "b"}]}, "data.sources[0].pth"),
        ({"sources": ["a.jsonl"]}, 'a.jsonl": a mapping with path, split, weight, columns is expected'),
        ({"sources": "a.jsonl"}, "a list of mappings with path, split, weight, columns is expected"),
    ],
)
def test_sources_that_can_mean_nothing_are_refused_as_settings(data: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_settings({"data": data}, environ={})
    assert said in caught.value.message


@pytest.mark.fault("U01")
@pytest.mark.parametrize("other", ["./a.jsonl", "sub/../a.jsonl", "link.jsonl", "hard.jsonl", "folder"])
def test_one_file_under_two_names_is_one_source(
    other: str, prepared: Prepare, sources: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows would be read twice, and held out for validation in one place and trained in the other."""
    sources(4, 3)
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("folder").mkdir()
    Path("link.jsonl").symlink_to("a.jsonl")
    Path("hard.jsonl").hardlink_to("a.jsonl")
    Path("folder/rows.jsonl").symlink_to(tmp_path / "a.jsonl")
    prepared(None, sources=[{"path": "a.jsonl"}, {"path": "b.jsonl"}])
    with pytest.raises(ConfigError, match=r"names the same rows twice: as 'a\.jsonl' and as") as refused:
        prepared(None, sources=[{"path": "a.jsonl"}, {"path": "b.jsonl"}, {"path": other}])
    assert (refused.value.code, refused.value.where) == ("QH-U01", "data.sources[2].path")
