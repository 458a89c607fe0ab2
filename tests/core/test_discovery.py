"""Plugins that misbehave become reports; the others go on. Real distributions, made and put on the path here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from installed_plugins import GOOD, install

from qlora_hal.detect.discovery import BackendEntry, find, listed, load_spec, open_trainer
from qlora_hal.errors import BackendError
from qlora_hal.errors.installation import pip


def probed(folder: Path) -> dict[str, tuple[str, str, str]]:
    """What `backends()` says in a fresh process with the folder on its path."""
    program = (
        "from qlora_hal import backends\n"
        "for r in backends(): print(r.backend, r.availability.value, r.reason, r.fix, sep='|')"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    rows = [line.split("|") for line in child.stdout.splitlines()]
    return {name: (availability, reason, fix) for name, availability, reason, fix in rows}


@pytest.mark.fault("E08")
def test_broken_plugins_are_named_and_the_others_work(tmp_path: Path) -> None:
    install(
        tmp_path,
        {
            "works": ("good", GOOD),
            "raises": ("raising", "raise ValueError('no such flag')"),
            "leaves": ("leaving", "raise SystemExit(3)"),
            "crashes": ("crashing", "import os\nos.abort()"),
            "chats": ("chatting", "print('hello')\n" + GOOD),
            "wrong": ("wrongtype", "SPEC = 7"),
        },
    )
    for info in tmp_path.glob("*.dist-info"):
        (info / "INSTALLER").write_text("pip\n")
    found = probed(tmp_path)
    assert found["good"][0] == "ready"
    assert found["chatting"][0] == "ready"
    assert found["cpu_torch"][0] == "ready"
    for name, reason in {
        "raising": "no such flag",
        "leaving": "SystemExit: 3",
        "crashing": "signal 6",
        "wrongtype": "is a int, not a BackendSpec",
    }.items():
        availability, said, fix = found[name]
        assert availability == "broken"
        assert reason in said
        assert fix.startswith("Update or uninstall it: ")
        assert "pip install -U " in fix


@pytest.mark.fault("E08")
@pytest.mark.parametrize("installed", [True, False], ids=["editable", "on the path"])
def test_an_author_is_shown_file_and_line_of_a_plugin_that_is_being_written(tmp_path: Path, installed: bool) -> None:
    install(tmp_path, {"mine": ("raising", "import json\ndef read():\n    json.loads('?')\nread()\n")})
    if installed:
        (info,) = tmp_path.glob("mine*.dist-info")
        (info / "INSTALLER").write_text("pip\n")
        (info / "direct_url.json").write_text(json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    availability, reason, fix = probed(tmp_path)["raising"]
    assert availability == "broken"
    assert "JSONDecodeError" in reason
    assert "pip" not in fix
    shown = subprocess.run(fix.partition(": ")[2], shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert f'{tmp_path / "mine.py"}", line 4' in shown.stderr


@pytest.mark.fault("E08")
def test_a_named_plugin_of_ones_own_is_told_with_its_traceback(tmp_path: Path) -> None:
    install(tmp_path, {"mine": ("raising", "def read():\n    raise ValueError('no such flag')\nread()\n")})
    asked = [sys.executable, "-m", "qlora_hal.cli", "train", "--demo", "--dry-run", "--backend", "raising"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "error[QH-B05]" in done.stderr
    assert f'File "{tmp_path / "mine.py"}", line 3, in <module>' in done.stderr
    assert f'File "{tmp_path / "mine.py"}", line 2, in read' in done.stderr
    assert "importlib" not in done.stderr


@pytest.mark.fault("E08")
def test_a_plugin_that_is_no_python_is_told_by_file_and_line(tmp_path: Path) -> None:
    install(tmp_path, {"mine": ("odd", "SPEC = (\n")})
    assert f"({tmp_path / 'mine.py'}, line 1)" in probed(tmp_path)["odd"][1]


@pytest.mark.fault("E07")
def test_two_distributions_with_one_name_are_both_named(tmp_path: Path) -> None:
    install(tmp_path, {"first-plugin": ("same", GOOD), "second-plugin": ("same", GOOD)})
    availability, reason, _ = probed(tmp_path)["same"]
    assert availability == "broken"
    assert "first-plugin" in reason
    assert "second-plugin" in reason


@pytest.mark.fault("X10")
def test_built_in_name_cannot_be_taken_over(tmp_path: Path) -> None:
    install(tmp_path, {"impostor": ("cpu_torch", GOOD)})
    found = probed(tmp_path)
    assert found["cpu_torch"][0] == "ready"
    availability, reason, fix = found["cpu_torch (impostor)"]
    assert availability == "broken"
    assert reason == "impostor offers a backend called cpu_torch, which is the name of a built-in one."
    assert fix == f"Uninstall it: {pip('uninstall impostor')}"


def test_the_name_of_a_built_in_backend_finds_the_built_in_one() -> None:
    ours = BackendEntry("cpu_torch", "qlora-hal")
    assert find("cpu_torch", [BackendEntry("cpu_torch", "impostor"), ours]) is ours


@pytest.mark.fault("E09")
@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ('frozenset({"float32"})', '["float32"]', "capabilities.compute_dtypes is a list (['float32'])"),
        ("CAPABILITIES, probe", "None, probe", "capabilities is a NoneType (None), Capabilities is expected"),
        ("5,", "'high',", "priority is a str ('high'), int is expected"),
    ],
)
def test_plugin_with_a_field_of_a_wrong_type_is_broken_by_name(
    tmp_path: Path, right: str, wrong: str, said: str
) -> None:
    assert right in GOOD
    install(tmp_path, {"mistyped": ("odd", GOOD.replace(right, wrong))})
    availability, reason, _ = probed(tmp_path)["odd"]
    assert availability == "broken"
    assert said in reason


def test_what_a_plugin_says_of_itself_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    loud = GOOD.replace('"always"', '"one\\ntwo \\x1b[2J \\udc80"')
    install(tmp_path, {"loud": ("loud", loud)})
    assert probed(tmp_path)["loud"] == ("ready", "one two [2J", "")


def test_plugin_that_dies_without_a_word_is_told_by_how_it_ended(tmp_path: Path) -> None:
    install(tmp_path, {"mute": ("mute", "import os; os._exit(0)")})
    assert "its probe ended with exit status 0 and no response" in probed(tmp_path)["mute"][1]


def in_a_process_with(folder: Path, program: str) -> str:
    """What a program prints with the folder on its path."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return child.stdout.strip()


CHOOSE = """
from qlora_hal.contract.capabilities import Requirements
from qlora_hal.detect.discovery import listed, reports
from qlora_hal.detect.selection import choose
from qlora_hal.run.supervisor import is_supervised
entries = listed()
assert not is_supervised("auto", ())
choice = choose("auto", Requirements(), entries, reports(entries), allow_cpu=True)
print(choice.spec.name != "odd", choice.rejections["odd"])
"""


@pytest.mark.fault("E08")
def test_plugin_that_leaves_in_this_process_alone_is_passed_over(tmp_path: Path) -> None:
    leaves = "import sys\nif 'qlora_hal.detect.discovery' not in sys.orig_argv: sys.exit(0)\n"
    install(tmp_path, {"twofaced": ("odd", leaves + GOOD)})
    said = in_a_process_with(tmp_path, CHOOSE)
    place = f"{tmp_path / 'twofaced.py'}, line 2"
    assert said == f"True Backend odd of twofaced cannot be imported: SystemExit: 0 ({place})"


@pytest.mark.fault("E08")
def test_plugin_that_crashes_never_enters_this_process(tmp_path: Path) -> None:
    install(tmp_path, {"crashes": ("odd", "import os; os.abort()")})
    assert in_a_process_with(tmp_path, CHOOSE).startswith("True crashes could not be queried: its probe ended with")


@pytest.mark.fault("B04")
def test_trainer_that_leaves_while_it_is_opened_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving_trainer.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    spec = replace(load_spec(find("cpu_torch", listed())), trainer="leaving_trainer:Trainer")
    with pytest.raises(BackendError, match="could not be opened: SystemExit: 0") as failure:
        open_trainer(spec)
    assert failure.value.code == "QH-B04"


def test_plugin_of_another_contract_is_refused_in_one_sentence(tmp_path: Path) -> None:
    install(tmp_path, {"future": ("later", GOOD.replace('"nowhere:Nothing", 2)', '"nowhere:Nothing", 3)'))})
    assert "written for contract 3; this is contract 2" in probed(tmp_path)["later"][1]
