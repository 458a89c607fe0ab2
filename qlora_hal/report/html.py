"""report.html: a whole run on one page. One file, nothing fetched; light and dark, on a phone and on a desktop.

Every text goes through jinja2's autoescape: prompts, answers and paths come from outside. The page of a finished run
has no script. That of a run in progress has one, which loads the page again; no other may run there, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qlora_hal.errors import figures
from qlora_hal.files.replacing import replace_file
from qlora_hal.report.curves import loss_curves
from qlora_hal.report.run_file import read_run_file
from qlora_hal.report.series import RunSeries, read_series
from qlora_hal.report.svg import Curve, chart, has_logarithmic_scale
from qlora_hal.report.transfer_record import transfer_from

REPORT_FILE = "report.html"
_TEMPLATE = "report.html.jinja"
_LIST_LIMIT = 12
_MAIN_SIZE = {"width": 1080, "height": 320}


@dataclass(frozen=True, slots=True)
class Tile:
    """One headline figure."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """One drawn chart with its legend (CSS class, name)."""

    title: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...] = ()
    logarithmic: bool = False


RELOADING_SECONDS = 10
_RELOADING = f"""
const box = document.getElementById("reloading");
box.checked = sessionStorage.getItem("reloading") !== "off";
box.addEventListener("change", () => sessionStorage.setItem("reloading", box.checked ? "on" : "off"));
setInterval(() => {{ if (box.checked && !document.hidden) location.reload(); }}, {RELOADING_SECONDS * 1000});
"""
_RELOADING_HASH = base64.b64encode(hashlib.sha256(_RELOADING.encode()).digest()).decode()


def write_report(run_dir: Path, *, in_progress: bool = False) -> Path:
    """Read run.json and metrics.jsonl and write report.html beside them; one of a run `in_progress` loads itself again
    every `RELOADING_SECONDS`, until the reader switches that off. Raises ConfigError (S50), StorageError."""
    path = run_dir / REPORT_FILE
    run, series = read_run_file(run_dir), read_series(run_dir)
    page = render_report(run, series, run_dir.resolve().name, in_progress=in_progress)
    replace_file(path, page.encode("utf-8", "replace"))  # a name or an answer can hold half of a character
    return path


def render_report(run: Mapping[str, object], series: RunSeries, name: str, *, in_progress: bool = False) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = _charts(series)
    return environment.get_template(_TEMPLATE).render(
        name=name,
        reloading=Markup(_RELOADING) if in_progress else "",
        reloading_hash=_RELOADING_HASH,
        reloading_seconds=RELOADING_SECONDS,
        subtitle=_subtitle(run),
        config_hash=str(run.get("config_hash", ""))[:16],
        status=_status(run),
        tiles=_tiles(run, series),
        main_chart=charts[0] if charts else None,
        side_charts=charts[1:],
        nonfinite_steps=series.nonfinite_steps,
        samples=run.get("samples") or [],
        settings=_settings(run),
        detection=_detection(run),
        facts=_facts(run),
        data_lines=_data_lines(run),
        data_rows=flat_rows(_mapping(run, "data_report")),
        hand_overs=_hand_overs(run),
        notes=run.get("notes") or [],
    )


def flat_rows(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (name, text) rows, in reading order."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows.extend(flat_rows(value, f"{name}: "))
        elif value not in (None, "", [], ()) and key != "lines":
            rows.append((name, _text(value)))
    return rows


def _data_lines(run: Mapping[str, object]) -> list[str]:
    """The data report as it was printed, where the run kept it."""
    lines = _mapping(run, "data_report").get("lines")
    return [str(line) for line in lines] if isinstance(lines, list) else []


def _hand_overs(run: Mapping[str, object]) -> list[dict[str, object]]:
    """Where the run went on with another backend: a title and what was said then."""
    moves = run.get("hand_overs")
    told = [_lines_of(move) for move in moves] if isinstance(moves, list) else []
    return [{"title": lines[0].capitalize(), "lines": lines[1:]} for lines in told]


def _lines_of(move: object) -> list[str]:
    try:
        return transfer_from(move).lines()  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError, ValueError):  # a record that was damaged or edited
        return ["a transfer whose record is damaged"]


# Headline ----------------------------------------------------------------------------------------------------------


def _status(run: Mapping[str, object]) -> tuple[str, str]:
    """(CSS class, words)."""
    status, why = str(run.get("status", "")), str(run.get("stopped_because") or "")
    words = f"{status}: {why}" if why and why != status else status
    return ("good" if status == "finished" else "bad" if status == "failed" else "waiting", words)


def _subtitle(run: Mapping[str, object]) -> str:
    resolved, config = _mapping(run, "resolved"), _mapping(run, "config")
    model = _mapping(run, "model").get("name") or _mapping(config, "model").get("name_or_path") or ""
    backend, device = resolved.get("backend"), resolved.get("device")
    block = f" in blocks of {resolved['block_size']}" if resolved.get("block_size") else ""
    parts = [
        str(model),
        f"{backend}{f' ({device})' if device else ''}" if backend else "",
        f"base stored as {resolved['weight_format']}{block}" if resolved.get("weight_format") else "",
        str(run.get("started_at") or ""),
    ]
    return " · ".join(part for part in parts if part)


def _tiles(run: Mapping[str, object], series: RunSeries) -> list[Tile]:
    before, after = _number(run, "eval_loss_before"), _number(run, "eval_loss_after")
    tiles: list[Tile] = []
    if after is not None:
        change = f"from {figures.loss(before)} before training" if before is not None else ""
        tiles.append(Tile("Evaluation loss", figures.loss(after), change))
    if series.loss_average:
        first = f"from {figures.loss(series.loss[0][1])} at step {series.loss[0][0]:g}"
        tiles.append(Tile("Training loss (average)", figures.loss(series.loss_average[-1][1]), first))
    timings = _mapping(run, "timings")
    wall = _number(timings, "train_seconds") or _number(timings, "wall_seconds")
    tokens = _number(run, "tokens") or 0
    tiles.append(Tile("Steps", figures.count(_number(run, "steps")), f"{figures.count(tokens)} tokens"))
    if wall:
        tiles.append(Tile("Training time", figures.duration(wall), f"{figures.count(tokens / wall)} tokens/s"))
    peak = _number(run, "peak_memory_bytes")
    if peak is not None:
        estimate = _number(_mapping(run, "memory_estimate"), "total")
        detail = f"estimated {figures.size(estimate)}" if estimate else ""
        tiles.append(Tile("Peak memory", figures.size(peak), detail))
    return tiles


# Curves ------------------------------------------------------------------------------------------------------------


def _charts(series: RunSeries) -> list[Chart]:
    loss, norm = loss_curves(series), [Curve("", series.grad_norm)]
    drawn = [
        _chart("Loss", loss, _short, has_logarithmic_scale(loss)),
        _chart("Gradient norm before clipping", norm, _short, has_logarithmic_scale(norm)),
        _chart("Learning rate", [Curve("", series.learning_rate)], _learning_rate),
        _chart("Tokens per second", [Curve("", series.tokens_per_second)], figures.count),
        _chart("Memory", [Curve("", series.memory_bytes)], figures.size),
    ]
    return [chart for chart in drawn if chart is not None]


def _chart(
    title: str, curves: Sequence[Curve], number: Callable[[float], str], logarithmic: bool = False
) -> Chart | None:
    size = _MAIN_SIZE if title == "Loss" else {}
    drawing = chart(title, curves, number=number, logarithmic=logarithmic, **size)
    legend = tuple((curve.style, curve.name) for curve in curves if curve.name and curve.points)
    # Safe to mark: svg.chart escapes every text it is given.
    return Chart(title, Markup(drawing), legend, logarithmic) if drawing else None


def _short(value: float) -> str:
    return f"{value:.3g}"


def _learning_rate(value: float) -> str:
    return "0" if value == 0 else figures.rate(value)


# Tables ------------------------------------------------------------------------------------------------------------


def _settings(run: Mapping[str, object]) -> dict[str, list[tuple[str, str, str]]]:
    """(name, value, origin) of every setting: those that somebody chose, and the defaults."""
    origins = _mapping(run, "origins")
    tables: dict[str, list[tuple[str, str, str]]] = {"chosen": [], "default": []}
    for path, value in _leaves(_mapping(run, "config"), origins):
        origin = str(origins.get(path, "default"))
        tables["default" if origin == "default" else "chosen"].append((path, _text(value), origin))
    return tables


def _leaves(tree: Mapping[str, object], origins: Mapping[str, object]) -> list[tuple[str, object]]:
    leaves: list[tuple[str, object]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and key not in origins:
            leaves.extend((f"{key}.{leaf}", item) for leaf, item in value.items())
        else:
            leaves.append((key, value))
    return leaves


def _detection(run: Mapping[str, object]) -> dict[str, object]:
    detection = _mapping(run, "detection")
    rejections = _mapping(detection, "rejections")
    reports = detection.get("reports")
    rows = []
    for report in reports if isinstance(reports, list) else []:
        name = str(report.get("backend", ""))
        chosen = name == detection.get("chosen")
        reason = detection.get("why") if chosen else rejections.get(name) or report.get("reason")
        devices = ", ".join(report.get("devices") or [])
        rows.append((chosen, name, str(report.get("availability", "")), str(reason or ""), devices))
    return {"rows": sorted(rows, key=lambda row: not row[0]), "chosen": str(detection.get("chosen", ""))}


def _facts(run: Mapping[str, object]) -> dict[str, list[tuple[str, str]]]:
    times = {key: value for key, value in (("started", run.get("started_at")), ("ended", run.get("finished_at")))}
    timings = {
        key.removesuffix("_seconds"): figures.duration(float(value))
        for key, value in _mapping(run, "timings").items()
        if isinstance(value, (int, float)) and key.endswith("_seconds")
    }
    estimate = {
        key: figures.size(float(value))
        for key, value in _mapping(run, "memory_estimate").items()
        if isinstance(value, int)  # its relative error is no size
    }
    tables = {
        "As resolved": flat_rows(_mapping(run, "resolved")),
        "Model": flat_rows(_mapping(run, "model")),
        "Versions": flat_rows(_mapping(run, "versions")),
        "Machine": flat_rows(_mapping(run, "environment")),
        "Time": flat_rows({**times, **timings}),
        "Memory estimate": flat_rows(estimate),
    }
    return {title: rows for title, rows in tables.items() if rows}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not set"
    if isinstance(value, (list, tuple)) and len(value) > _LIST_LIMIT:
        rest = len(value) - _LIST_LIMIT
        return f"{_text(value[:_LIST_LIMIT])}\n... and {rest} more"
    if isinstance(value, (list, tuple)):
        # Texts, such as prompts, stand one a line; numbers, such as rows, run on.
        return ("\n" if any(isinstance(item, str) for item in value) else ", ").join(_text(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    return str(value)


def _mapping(tree: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = tree.get(key)
    return value if isinstance(value, Mapping) else {}


def _number(tree: Mapping[str, object], key: str) -> float | None:
    value = tree.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
