"""report.html and loss.svg from a run folder."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report.conftest import run_record, write_metrics

from qlora_hal.errors import figures
from qlora_hal.report.curves import write_loss_picture
from qlora_hal.report.html import flat_rows, write_report
from qlora_hal.report.live_page import LivePage
from qlora_hal.report.run_file import write_run_file
from qlora_hal.report.svg import Curve, chart, has_logarithmic_scale, round_ticks

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Outline(HTMLParser):
    """Tags that are open, every tag met, and every text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def outline_of(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    return outline


def test_the_page_is_well_formed_and_tells_the_run(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    outline = outline_of(page)
    assert (outline.open, outline.wrong) == ([], [])
    for text in (
        "first-run",
        "finished",
        "1.1000",
        "from 3.0000 before training",
        "lora.r",
        "config argument",
        "it is not ready",
        "named by the user",
        "rows read",
        "dropped: too long",
        "median 41 tokens\nlongest 90 tokens",
        "before the run",
        "after the run",
        "A note on the run.",
    ):
        assert text in outline.texts, text


def test_the_page_needs_no_network_and_runs_no_script(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(outline_of(page).tags)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_the_page_of_a_run_in_progress_has_one_script_and_allows_no_other(run_dir: Path) -> None:
    page = write_report(run_dir, in_progress=True).read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    assert len(scripts) == 1
    allowed = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in page
    assert "location.reload()" in scripts[0]


def test_headings_go_down_one_level_at_a_time(run_dir: Path) -> None:
    levels = [int(level) for level in re.findall(r"<h([1-6])", write_report(run_dir).read_text(encoding="utf-8"))]
    assert levels[0] == 1
    assert all(deeper <= before + 1 for before, deeper in pairwise(levels))


def test_a_page_of_very_many_steps_stays_below_150_kilobytes(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    step = next(line for line in lines if "loss" in line)
    drawn = random.Random(1)
    with (run_dir / "metrics.jsonl").open("w", encoding="utf-8") as log:
        for number in range(1, 20_001):
            noisy = {name: drawn.uniform(0.1, 9.0) for name in ("loss", "grad_norm", "learning_rate")}
            log.write(json.dumps({**step, **noisy, "step": number}) + "\n")
    assert write_report(run_dir).stat().st_size < 150_000


def test_the_page_of_a_run_is_written_again_after_ten_seconds_and_never_takes_more_than_a_share(run_dir: Path) -> None:
    told: list[float] = []
    seconds = iter([0.0, 5.0, 11.0, 11.02, 15.0, 22.0, 23.0, 50.0, 224.0, 224.1])
    page = LivePage(run_dir, clock=lambda: told.append(now := next(seconds)) or now)
    report = run_dir / "report.html"
    written = []
    for _ in range(7):
        report.unlink(missing_ok=True)
        page.refresh()
        written.append((told[-1], report.exists()))
    # Written in 0.02 s: the next after 10 s. One second: the next after 200.
    assert [now for now, is_new in written if is_new] == [11.02, 23.0, 224.1]


def test_a_page_that_cannot_be_written_does_not_stop_a_run(tmp_path: Path) -> None:
    seconds = iter([0.0, 11.0, 11.1])
    page = LivePage(tmp_path / "absent", clock=lambda: next(seconds))
    page.refresh()
    page.refresh()
    assert next(seconds, None) is None
    assert not (tmp_path / "absent").exists()


def test_texts_of_users_stay_texts(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_a_step_that_was_not_finite_is_announced(run_dir: Path) -> None:
    assert "was not finite at step 7" in write_report(run_dir).read_text(encoding="utf-8")


def test_every_curve_is_drawn_with_one_mark_for_each_evaluation_in_both_scales(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    drawings = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, flags=re.S)]
    assert [drawing.attrib["aria-label"] for drawing in drawings] == [
        "Loss by step",
        "Gradient norm before clipping by step",
        "Learning rate by step",
        "Tokens per second by step",
        "Memory by step",
    ]
    assert sum(element.tag.endswith("circle") for element in drawings[0].iter()) == 2 * 2


def test_a_run_that_has_not_begun_has_a_report_too(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "<svg" not in page
    assert outline_of(page).wrong == []


def test_a_run_json_of_another_writer_with_fewer_keys_is_shown(run_dir: Path) -> None:
    (run_dir / "run.json").write_text('{"config": {"lora": {"r": 3}}}', encoding="utf-8")
    assert "lora.r" in outline_of(write_report(run_dir).read_text(encoding="utf-8")).texts


def test_the_picture_of_the_loss_shows_what_the_page_shows_and_stands_alone(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    picture = write_loss_picture(run_dir).read_text(encoding="utf-8")
    ElementTree.fromstring(picture)
    drawn = re.findall(r'<(?:path|circle) class="[^"]+"[^>]*>', picture)
    assert drawn
    assert drawn == re.findall(r'<(?:path|circle) class="[^"]+"[^>]*>', page)[: len(drawn)]
    assert "svg path.line { stroke" in picture
    assert "not finite at step 7)" in picture
    assert set(re.findall(r"https?://[^\s\"'<>]+", picture)) == {"http://www.w3.org/2000/svg"}


def test_the_picture_of_a_run_that_has_not_begun_says_so(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    picture = write_loss_picture(run_dir).read_text(encoding="utf-8")
    ElementTree.fromstring(picture)
    assert "No loss was logged." in picture


# Drawing -----------------------------------------------------------------------------------------------------------


def test_a_long_curve_is_thinned_without_losing_its_spike() -> None:
    points = [(float(step), 100.0 if step == 54_321 else 1.0) for step in range(100_000)]
    drawing = chart("x", [Curve("x", points)], number=str)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", drawing)]
    assert len(heights) < 1000
    assert min(heights) < 25  # the spike reaches the top of the chart


def test_equal_values_and_a_single_point_can_be_drawn() -> None:
    for points in ([(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -3.0), (2.0, -3.0)]):
        ElementTree.fromstring(chart("x", [Curve("x", points)], number=str))


def test_the_name_of_the_axis_stands_in_the_row_of_its_numbers() -> None:
    """Below the last number it would cover it in the large letters of a phone."""
    drawn = chart("Loss", [Curve("loss", [(step, 1.0 / step) for step in range(1, 21)])], number=str)
    ticks = re.findall(r'class="tick" x="([\d.]+)" y="([\d.]+)" text-anchor="(?:end|middle)">(?:step )?(\d+)<', drawn)
    rows = {y for _, y, told in ticks if told in ("5", "10", "15", "20")}
    assert len(rows) == 1
    assert drawn.count("step 20<") == 1
    assert ">step<" not in drawn


def test_each_step_of_a_chart_can_be_read() -> None:
    drawing = chart("x", [Curve("a", [(1.0, 2.0), (3.0, 4.0)]), Curve("b", [(2.0, 8.0)])], number="{:.1f}".format)
    words = [text for text in re.findall(r"<text [^>]*>(.*?)</text>", drawing) if re.match(r"step \d+: ", text)]
    assert words == ["step 1: a 2.0", "step 2: a 2.0, b 8.0", "step 3: a 4.0, b 8.0"]


def test_a_long_chart_is_read_in_sixty_places_with_the_last_among_them() -> None:
    drawing = chart("x", [Curve("", [(float(step), 1.0 + step) for step in range(1001)])], number=str)
    words = re.findall(r">(step [^<]*)<", drawing)
    assert len(words) <= 61
    assert words[-1] == "step 1000: 1001.0"


def test_a_logarithmic_scale_puts_equal_factors_at_equal_distances() -> None:
    curves = [Curve("", [(1.0, 1.0), (2.0, 10.0), (3.0, 100.0)])]
    assert has_logarithmic_scale(curves)
    drawing = chart("x", curves, number="{:g}".format, logarithmic=True)
    by_powers = re.search(r'<g class="logarithmic">(.*?)</g>', drawing, flags=re.S)
    assert by_powers is not None
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", by_powers[1])]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)  # rounded to a tenth of a pixel
    assert {"1", "10", "100"} <= set(re.findall(r">([\d.]+)</text>", by_powers[1]))


@pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.5), (float("nan"),)])
def test_a_logarithmic_scale_is_not_offered_where_it_shows_nothing(values: tuple[float, ...]) -> None:
    assert not has_logarithmic_scale([Curve("", [(float(step), value) for step, value in enumerate(values)])])


def test_a_chart_without_finite_points_is_empty() -> None:
    assert chart("x", [Curve("x", [(1.0, float("nan"))])], number=str) == ""


def test_ticks_are_round_numbers_inside_the_range() -> None:
    assert round_ticks(0.13, 1.02, 4) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert round_ticks(0, 400, 5) == [0, 100, 200, 300, 400]


def test_nested_facts_become_rows_without_empty_ones() -> None:
    assert flat_rows({"a_b": {"c": 1}, "d": None, "e": [], "f": [1, 2], "g": ["x", "y"]}) == [
        ("a b: c", "1"),
        ("f", "1, 2"),
        ("g", "x\ny"),
    ]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (figures.duration(9.96), "10.0 s"),
        (figures.duration(151), "2 min 31 s"),
        (figures.duration(11_100), "3 h 05 min"),
        (figures.duration(None), "?"),
        (figures.duration(float("inf")), "?"),
        (figures.size(512 * 2**20), "512 MiB"),
        (figures.size(int(7.43 * 2**30)), "7.43 GiB"),
        (figures.count(812), "812"),
        (figures.count(12_345), "12.3k"),
        (figures.count(4_060_000), "4.06M"),
        (figures.rate(2e-4), "2e-04"),
        (figures.rate(1.5e-5), "1.5e-05"),
        (figures.loss(float("nan")), "nan"),
    ],
)
def test_numbers_read_as_people_write_them(said: str, meant: str) -> None:
    assert said == meant


def test_a_long_list_is_cut_with_its_count() -> None:
    assert flat_rows({"rows": list(range(20))}) == [("rows", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\n... and 8 more")]


def test_half_of_a_character_does_not_stop_the_page(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl")
    write_run_file(tmp_path, run_record())
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    kept = {name: record[name] for name in ("config", "status")}  # as an earlier release wrote it, without a seal
    (tmp_path / "run.json").write_text(json.dumps({**kept, "notes": ["half \ud800 of one"]}), encoding="utf-8")
    assert "half ? of one" in write_report(tmp_path).read_text(encoding="utf-8")
