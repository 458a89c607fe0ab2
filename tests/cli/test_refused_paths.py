"""Paths that no file system takes, and folders that may not be entered, wherever a user can name one."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_hal import load, merge, push, resume, train
from qlora_hal.cli.__main__ import main
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import ConfigError, QloraHalError
from qlora_hal.files.atomic_folder import staging

LONG = {
    "one long name": "/tmp/" + "a" * 10_000,
    "many folders": "/tmp/" + "/".join(["b" * 200] * 50),
    "a name of 300": "c" * 300,
}
DEMO = ["train", "--demo", "--dry-run", "--output_dir", "run"]
COMMANDS = {
    "settings": ["train", "PATH"],
    "output": ["train", "--demo", "--dry-run", "--output_dir", "PATH"],
    "model": [*DEMO, "--model", "PATH"],
    "data": [*DEMO, "--data", "PATH"],
    "validation data": [*DEMO, "--data.validation_path", "PATH"],
    "template": [*DEMO, "--data.chat_template", "PATH"],
    "resume": ["resume", "PATH"],
    "generate": ["generate", "--run", "PATH", "--prompt", "x"],
    "adapter of generate": ["generate", "--adapter", "PATH", "--model", str(model_path()), "--prompt", "x"],
    "merge": ["merge", "PATH", "out"],
    "adapter": ["adapter", "convert", "PATH", "out", "--to", "mlx"],
    "unpickle": ["unpickle", "PATH", "out"],
    "quantize": ["quantize", "PATH", "out", "--data", str(data_path("train"))],
    "estimate": ["estimate", "--model", "PATH"],
    "init": ["init", "PATH"],
    "another tool's file": ["init", "-", "--from", "PATH"],
    "runs": ["runs", "PATH"],
    "compare": ["compare", "PATH", "PATH"],
    "advise": ["advise", "--model", "PATH"],
    "certificate": ["conformance", "cpu_torch", "--verify", "PATH"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", LONG)
def test_a_path_that_is_too_long_is_the_users_to_mend(
    command: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status = main([LONG[kind] if word == "PATH" else word for word in COMMANDS[command]])
    assert status not in (0, 1), capsys.readouterr().err


@pytest.mark.fault("U30")
@pytest.mark.parametrize("kind", LONG)
def test_a_long_path_is_shown_shortened_with_its_length(kind: str) -> None:
    with pytest.raises(ConfigError) as refused:
        train(model=LONG[kind], data=str(data_path("train")), output_dir="run", backend="cpu_torch", dry_run=True)
    assert (refused.value.code, refused.value.exit_status) == ("QH-U30", 2)
    assert len(refused.value.message) < 200
    assert f"It has {len(LONG[kind])} characters" in refused.value.cause


@pytest.mark.parametrize("kind", LONG)
def test_the_python_calls_give_an_error_of_ours(kind: str, tmp_path: Path) -> None:
    with pytest.raises(QloraHalError):
        resume(LONG[kind])
    with pytest.raises(QloraHalError):
        merge(LONG[kind], tmp_path / "out")


CLOSED_FOLDER = """
import json, sys
from qlora_hal import train
from qlora_hal.errors import QloraHalError
try:
    train(model=sys.argv[1], data=sys.argv[2], output_dir=sys.argv[3], backend="cpu_torch", dry_run=True)
except QloraHalError as error:
    print(json.dumps([error.code, error.message]))
"""


def without_the_rights_of_root() -> None:
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    ctypes.CDLL(None).prctl(24, 2, 0, 0, 0)  # CAP_DAC_READ_SEARCH


@pytest.mark.skipif(sys.platform != "linux", reason="drops rights as Linux does")
@pytest.mark.parametrize("what", ["model", "data"])
def test_a_folder_that_may_not_be_entered_is_told(tmp_path: Path, what: str) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    places = {"model": str(model_path()), "data": str(data_path("train")), what: str(closed / "inside")}
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_FOLDER, places["model"], places["data"], str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        preexec_fn=without_the_rights_of_root,
        check=False,
    )
    code, message = json.loads(done.stdout.splitlines()[-1]) if done.stdout else (None, done.stderr)
    assert code == "QH-U30", message
    assert "Permission denied" in message


@pytest.mark.fault("S14")
@pytest.mark.parametrize("name", ["a\0b", "r\ud800"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_an_output_folder_that_no_file_system_can_name_is_refused(
    name: str, dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QloraHalError) as refused:
        train(
            model=str(model_path()),
            data=str(data_path("train")),
            backend="cpu_torch",
            dry_run=dry_run,
            config={"output_dir": name},
        )
    assert (refused.value.code, refused.value.where) == ("QH-S14", "output_dir")
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("U30")
@pytest.mark.skipif(sys.platform == "win32", reason="a working directory cannot be removed there")
def test_a_working_directory_that_is_gone_is_told_before_anything_else(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = "import os, sys; os.rmdir(os.getcwd()); from qlora_hal.cli.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", script, "train", "--demo", "--backend", "cpu_torch", "--dry-run"]
    done = subprocess.run(command, cwd=gone, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "QH-U30" in done.stderr
    assert "The working directory does not exist any more" in done.stderr


@pytest.mark.fault("U01")
@pytest.mark.parametrize("command", [["estimate"], ["train", "--demo", "--dry-run", "--backend", "cpu_torch"]])
def test_a_rank_above_every_side_of_the_targets_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(model_path())] if command == ["estimate"] else []
    assert main([*command, *model, "--lora.r", "1000000000000"]) == 2
    assert "lora.r is 1000000000000; the target modules have at most 768 rows" in capsys.readouterr().err


OTHER_BYTES = os.fsdecode(b"n\xff")


@pytest.mark.fault("U01")
@pytest.mark.parametrize("setting", ["model.name_or_path", "data.path", "data.chat_template", "data.validation_path"])
def test_a_setting_that_is_not_utf8_is_refused_by_name(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, f"--{setting}", OTHER_BYTES]) == 2
    told = capsys.readouterr().err
    assert "QH-U01" in told
    assert setting in told
    assert "the byte 0xff" in told


@pytest.mark.fault("S14")
def test_an_output_folder_that_is_not_utf8_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / OTHER_BYTES
    assert main(["train", "--demo", "--dry-run", "--output_dir", str(folder)]) == 8
    assert "QH-S14" in (told := capsys.readouterr().err)
    assert "is not UTF-8" in told
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(DEMO) in (2, 8)
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.fault("U30")
def test_data_in_a_working_directory_that_is_not_utf8_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / OTHER_BYTES
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(data_path("train").read_bytes()[:2000].rpartition(b"\n")[0])
    monkeypatch.chdir(folder)
    assert main([*DEMO[:3], "--output_dir", str(tmp_path / "run"), "--data", "rows.jsonl"]) == 2
    assert "QH-U30" in (told := capsys.readouterr().err)
    assert "is not UTF-8" in told


@pytest.mark.fault("U30")
@pytest.mark.parametrize("place", [0, 1, 3], ids=["model", "out", "data"])
def test_quantize_refuses_what_is_not_utf8(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(model_path()), "out", "--data", str(data_path("train"))]
    words[place] = OTHER_BYTES
    assert main(["quantize", *words]) == 2
    assert "QH-U30" in capsys.readouterr().err


NOBODY = "~nobody-of-that-name/x"


@pytest.mark.fault("U30")
@pytest.mark.parametrize(
    "words",
    [
        ["train", "--demo", "--dry-run", "--output_dir", NOBODY],
        ["train", "--demo", "--dry-run", "--data", f"{NOBODY}.jsonl"],
        ["train", "--demo", "--dry-run", "--data.validation_path", f"{NOBODY}.jsonl"],
        ["train", "--demo", "--dry-run", "--data.chat_template", f"{NOBODY}.jinja"],
        ["train", "--dry-run", "--model", NOBODY, "--data", str(data_path("train"))],
        ["train", f"{NOBODY}.yaml"],
        ["estimate", "--model", NOBODY],
        ["resume", NOBODY],
        ["runs", NOBODY],
        ["compare", NOBODY, NOBODY],
        ["generate", "--run", NOBODY, "--prompt", "x"],
        ["merge", NOBODY, "out"],
        ["merge", str(model_path()), NOBODY],
        ["push", NOBODY, "owner/name", "--dry-run"],
        ["quantize", NOBODY, "out", "--data", "rows.jsonl"],
        ["quantize", str(model_path()), NOBODY, "--data", str(data_path("train"))],
        ["unpickle", NOBODY, "out"],
        ["unpickle", str(model_path()), NOBODY],
        ["adapter", "convert", NOBODY, "out", "--to", "mlx"],
        ["adapter", "convert", str(model_path()), NOBODY, "--to", "mlx"],
        ["init", NOBODY],
        ["init", "run.yaml", "--from", f"{NOBODY}.yaml"],
    ],
    ids=" ".join,
)
def test_the_home_of_nobody_is_no_defect(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(words)
    told = capsys.readouterr().err
    assert "QH-I01" not in told
    assert "error[QH-" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("U30")
def test_a_folder_for_a_merged_model_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = staging(tmp_path / OTHER_BYTES, prefix=".merging-", what="the merged model")
    with pytest.raises(ConfigError, match="is not UTF-8"), folder:
        pytest.fail("nothing is computed for it")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: load(5), "target"),  # type: ignore[arg-type]
        (lambda: load(None), "target"),  # type: ignore[arg-type]
        (lambda: load("run", model=b"base"), "model"),  # type: ignore[arg-type]
        (lambda: merge(["run"], "out"), "target"),  # type: ignore[arg-type]
        (lambda: merge("run", 5), "out"),  # type: ignore[arg-type]
        (lambda: merge("run", "out", rows={}), "rows"),  # type: ignore[arg-type]
        (lambda: push(5, "owner/name"), "run"),  # type: ignore[arg-type]
        (lambda: push("run", "owner/name", certificate=5), "certificate"),  # type: ignore[arg-type]
        (lambda: resume(5), "run_dir"),  # type: ignore[arg-type]
    ],
    ids=[
        "load",
        "load None",
        "base of load",
        "merge",
        "merge into",
        "rows of merge",
        "push",
        "proof of push",
        "resume",
    ],
)
def test_what_is_no_path_is_refused_by_the_name_of_its_argument(call: Callable[[], object], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"QH-U01. {name} is a value of type \w+; a path was expected"):
        call()
