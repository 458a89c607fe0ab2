"""The notebooks in a real kernel: they run from their sources, and an interrupt says which call goes on."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = sorted((ROOT / "docs" / "notebooks").glob("*.py"))

pytestmark = [
    pytest.mark.usefixtures("usual_signals"),
    # jupyter_client says so of each kernel that listens on localhost, as all do that are started here.
    pytest.mark.filterwarnings("ignore:.*TCP:UserWarning"),
]


@pytest.fixture(scope="module")
def make_notebooks() -> ModuleType:
    found = importlib.util.spec_from_file_location("make_notebooks", ROOT / "ci" / "make_notebooks.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_notebooks_are_those_of_their_sources(make_notebooks: ModuleType, source: Path) -> None:
    kept = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(kept) == cells(make_notebooks.notebook_of(source)), "run: make notebooks"
    assert all(cell.execution_count for cell in kept.cells if cell.cell_type == "code")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_notebooks_are_small_and_name_no_place_of_a_machine(source: Path) -> None:
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text) < 150_000
    assert not [place for place in ("/home/", "/root/", "/tmp/", "/work/", str(Path.home())) if place in text]


def test_places_are_taken_out_of_what_was_shown(make_notebooks: ModuleType, tmp_path: Path) -> None:
    shown = f"into {tmp_path}/runs/first, from {Path.home()}/rows, in {tmp_path}"
    assert make_notebooks.without_places(shown, tmp_path) == "into runs/first, from ~/rows, in ."


@pytest.mark.long
def test_the_first_notebook_runs(make_notebooks: ModuleType, tmp_path: Path) -> None:
    source = next(source for source in SOURCES if source.stem == "first_run")
    done = make_notebooks.executed(make_notebooks.notebook_of(source), tmp_path)
    displays = [out for cell in done.cells for out in cell.get("outputs", []) if out.output_type == "display_data"]
    (display,) = [out for out in displays if "qlora-hal" in out.data.get("text/html", "")]
    assert "step 30/30" in display.data["text/html"]
    assert (tmp_path / "runs" / "merged" / "config.json").is_file()


TRAIN = """
import qlora_hal
from qlora_hal.demo import model_path
rows = [{"text": f"row {n}"} for n in range(64)]
qlora_hal.train(model_path(), rows, output_dir="runs/a", backend="cpu_torch", max_steps=60, save_steps=None,
                training={"per_device_train_batch_size": 1})
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    manager, client = jupyter_client.manager.start_new_kernel(cwd=str(tmp_path))
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_an_interrupt_saves_and_says_which_call_goes_on(kernel: tuple[Any, Any], tmp_path: Path) -> None:
    manager, client = kernel
    asked = client.execute(TRAIN)
    told(client, asked, lambda message: "/60</b>" in html_of(message))
    manager.interrupt_kernel()
    error = told(client, asked, lambda message: message["msg_type"] == "error")
    assert error["content"]["ename"] == "StoppedError"
    told(client, asked, lambda message: message["content"].get("execution_state") == "idle")
    assert 'Resume with: qlora_hal.resume("runs/a")' in error["content"]["evalue"]
    assert list((tmp_path / "runs" / "a" / "checkpoints").glob("step-*"))
    again = client.execute('qlora_hal.resume("runs/a").steps')
    told(client, again, lambda message: message["content"].get("data", {}).get("text/plain") == "60")


def html_of(message: dict[str, Any]) -> str:
    return str(message["content"].get("data", {}).get("text/html", ""))


def told(client: Any, asked: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first message of an execution that is wanted."""
    seen: list[str] = []
    ends = time.monotonic() + 240
    while time.monotonic() < ends:
        message: dict[str, Any] = client.get_iopub_msg(timeout=240)
        if message["parent_header"].get("msg_id") == asked:
            seen.append(str(message["content"])[-300:])
            if wanted(message):
                return message
            if message["content"].get("execution_state") == "idle":
                break
    raise AssertionError(seen[-3:])
