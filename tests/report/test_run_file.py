"""run.json: what enters, and what never does."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import ConfigError, UnsafeInputError
from qlora_hal.errors.redaction import published, redacted
from qlora_hal.files import sealed_json, strict_json
from qlora_hal.report.html import write_report
from qlora_hal.report.run_file import (
    Detection,
    RunRecord,
    read_run_config,
    read_run_file,
    record_from,
    run_facts,
    write_run_file,
)
from qlora_hal.report.series import read_series


def record_of(settings_tree: dict[str, object]) -> RunRecord:
    settings = resolve_settings(settings_tree, environ={})
    return RunRecord(config=settings.config.model_dump(mode="json"), origins=settings.origins)


def test_a_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    home = Path.home()
    tree: dict[str, object] = {
        "output_dir": str(home / "runs" / "a"),
        "model": {"name_or_path": str(home / "models" / "m")},
        "training": {"sample_prompts": ["What is ~/ in a path?"]},
    }
    write_run_file(tmp_path, record_of(tree))
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert str(home) not in text
    assert "~/models/m" in text
    assert read_run_config(tmp_path) == resolve_settings(tree, environ={}).config


@pytest.mark.fault("X11")
def test_tokens_never_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = {
        "HF_TOKEN": "canary-hub-1234567",
        "WANDB_API_KEY": "canary-wandb-1234567",
        "MY_SECRET": "canary-secret-1234567",
    }
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    patterned = "hf_abcdefghijklmnop1234"
    record = replace(
        record_of({"data": {"path": f"https://user:pass-word@host/{canaries['HF_TOKEN']}"}}),
        notes=(f"used {canaries['WANDB_API_KEY']}", patterned),
        environment={"api_key": "plain-canary", "nested": {"text": canaries["MY_SECRET"]}},
    )
    write_run_file(tmp_path, record)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    for secret in (*canaries.values(), patterned, "plain-canary", "pass-word"):
        assert secret not in text
    assert "[removed]" in text


def test_the_home_folder_is_shortened_only_where_it_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    said = redacted(["/home/ada", "/home/ada/x", "in /home/ada/x, y", "/home/adam/x", "/srv/home/ada/x"], secrets=())
    assert said == ["~", "~/x", "in ~/x, y", "/home/adam/x", "/srv/home/ada/x"]


def test_of_a_path_only_the_last_name_is_published() -> None:
    given = {
        "data": ["/srv/mine/rows.jsonl", "../rows/b.csv", "~/c/", "C:\\mine\\d.txt"],
        "model": {"name_or_path": "org/model", "api_key": "0123456789"},
        "pattern": ".*q_proj",
        "r": 16,
    }
    assert published(given) == {
        "data": ["rows.jsonl", "b.csv", "c", "d.txt"],
        "model": {"name_or_path": "org/model", "api_key": "[removed]"},
        "pattern": ".*q_proj",
        "r": 16,
    }


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    write_run_file(tmp_path, replace(record_of({}), eval_loss_after=math.nan))
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["eval_loss_after"] is None


def test_writing_again_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    record = record_of({})
    write_run_file(tmp_path, record)
    write_run_file(tmp_path, replace(record, status="finished"))
    assert read_run_file(tmp_path)["status"] == "finished"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    record = replace(
        record_of({"lora": {"r": 4}}),
        detection=Detection("cpu_torch", "named", ({"backend": "cpu_torch"},), {"cuda_bnb": "no driver"}),
        notes=("one", "two"),
        samples=({"prompt": "p", "before": "b", "after": "a"},),
        timings={"train_seconds": 1.5},
    )
    write_run_file(tmp_path, record)
    again = record_from(read_run_file(tmp_path))
    assert run_facts(again) == run_facts(record)
    assert (again.notes, again.detection) == (record.notes, record.detection)


@pytest.mark.fault("S50")
@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": 3}'])
def test_a_folder_without_a_whole_run_json_is_no_run_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run folder: run\.json is unusable") as caught:
        read_run_config(tmp_path)
    assert (caught.value.code, caught.value.exit_status) == ("QH-S50", 2)


@pytest.mark.fault("X11")
@pytest.mark.parametrize(
    "name",
    [
        "WANDB_KEY",
        "OPENAI_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "AZURE_STORAGE_KEY_1",
        "SSH_PRIVATE_KEY",
        "GH_PAT",
        "NPM_AUTH",
        "REGISTRY_AUTH",
        "PGPASSWORD",
        "DB_PASS",
        "SSHPASS",
        "VAULT_TOKEN",
        "GITLAB_TOKENS",
        "AWS_CREDENTIALS",
        "my_secret",
        "SENTRY_DSN",
        "SESSION_COOKIE",
        "CI_JOB_JWT",
        "STORAGE_CONN_STR",
        "AZURE_CONNECTION_STRING",
        "KEY",
        "API_KEYS",
    ],
)
def test_names_that_say_secret_keep_their_values_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "canary-0123456789")
    record = replace(
        record_of({"data": {"path": "rows/canary-0123456789"}}),
        notes=("said canary-0123456789",),
        versions={"canary-0123456789": "1"},
    )
    write_run_file(tmp_path, record)
    (tmp_path / "metrics.jsonl").touch()
    report = write_report(tmp_path)
    for file in (tmp_path / "run.json", report):
        assert "canary" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["PWD", "SSH_AUTH_SOCK", "TOKENIZERS_PARALLELISM", "KEYBOARD_LAYOUT", "COMPASS_PATH"])
def test_names_that_say_no_secret_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "ordinary-value")
    assert redacted("an ordinary-value") == "an ordinary-value"


@pytest.mark.fault("X11")
@pytest.mark.parametrize(
    "text",
    [
        "postgres://ada:canary@host/db",
        "postgres://ada:can/ary@canary@host/db",
        "https://canary@github.com/a/b",
        "mysql://:canary99@host",
        "Server=db;User Id=ada;Password=canary99;",
        "AccountKey = canary99==;EndpointSuffix=x",
        "https://host/x?token=canary99&y=1",
        "https://host/x?sig=canary99",
        "api_key=canary99",
        "hf_token=canary99",
        "Authorization: Bearer canary.canary.canary99",
        "github_pat_canaryCANARYcanary012345",
        "glpat-canarycanary123456",
        "AKIACANARYCANARY1234",
        "xoxb-canary-0123456789",
        "eyJcanarycanary.eyJcanarycanary.canarycanary",
    ],
)
def test_texts_that_look_like_secrets_are_removed(text: str) -> None:
    said = str(redacted(f"({text})", secrets=()))
    assert "canary" not in said.lower()
    assert "[removed]" in said


@pytest.mark.fault("X11")
@pytest.mark.parametrize(
    "text",
    ["-eyJ" * 500_000, "://a:" * 400_000, "://a:@" * 300_000, "-_password" * 200_000, "eyJaaaaaaaa." * 150_000,
     "x@" + "://a:b" * 300_000, "hf_" * 600_000, "bearer " * 300_000],
)  # fmt: skip
def test_the_time_to_look_for_secrets_grows_with_the_length_of_a_text_alone(text: str) -> None:
    started = time.process_time()
    redacted(text, secrets=())
    assert time.process_time() - started < 10.0  # some tenths of a second; minutes where it grows with the square


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("-eyJaaaaaaaa-eyJbbbbbbbb.cccccccc.dddddddd.", "-[removed]."),
        ("eyJaaaaaaaa.bbb.eyJcccccccc.dddddddd.eeeeeeee", "eyJaaaaaaaa.bbb.[removed]"),
        ("see s3://a/b and ftp://ada:x@host/a", "see s3://a/b and ftp://[removed]@host/a"),
        ("s3://a:b/c", "s3://a:b/c"),
        ("eyJaaaaaaaa", "eyJaaaaaaaa"),
    ],
)
def test_what_begins_like_a_secret_is_none_without_its_end(text: str, left: str) -> None:
    assert redacted(text, secrets=()) == left


def test_a_password_in_an_address_of_the_environment_is_removed_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://ada:canary-0123@host/db")
    assert redacted("denied: canary-0123") == "denied: [removed]"


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a",
        "a@b.org wrote",
        "the key is x",
        "password",
        "token count = 5",
        "the bearer of news",
        "s3://b/k",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    assert redacted(text, secrets=()) == text


@pytest.mark.fault("S50")
@pytest.mark.parametrize(
    "changes",
    [
        {"steps": "many"},
        {"steps": True},
        {"notes": 3},
        {"timings": []},
        {"status": 5},
        {"detection": "none"},
        {"detection": {"chosen": "x"}},
        {"detection": {"chosen": "x", "why": "", "reports": 5}},
        {"eval_loss_before": "x"},
    ],
)
def test_an_edited_record_of_another_kind_is_no_run(tmp_path: Path, changes: dict[str, object]) -> None:
    write_run_file(tmp_path, record_of({}))
    content = {**read_run_file(tmp_path), **changes}
    with pytest.raises(ConfigError, match="QH-S50"):
        record_from(content)


@pytest.mark.fault("S50")
@pytest.mark.parametrize(
    "text", ["[" * 90_000, '{"config":' * 900, '{"config": {}, "a": ' + "9" * 5000 + "}", "[]", "\ud800"]
)
def test_a_run_file_that_is_deep_large_or_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError, match="QH-S50"):
        read_run_file(tmp_path)


@pytest.mark.fault("X03")
def test_a_record_is_no_permission_to_run_the_code_of_a_base(tmp_path: Path) -> None:
    """A run folder can be a stranger's: what runs its base's Python files is the present call alone."""
    tree: dict[str, object] = {"model": {"name_or_path": "m", "trust_remote_code": True, "revision": "a" * 40}}
    write_run_file(tmp_path, record_of(tree))
    with pytest.raises(UnsafeInputError, match="QH-X03"):
        read_run_config(tmp_path)
    assert read_run_config(tmp_path, trust_remote_code=True).model.trust_remote_code


@pytest.mark.parametrize("move", [{}, {"step": 3}, 7, None, {"exact": 1, "inexact": 2}])
def test_a_damaged_record_of_a_transfer_does_not_keep_the_report_from_being_written(
    tmp_path: Path, move: object
) -> None:
    write_run_file(tmp_path, record_of({}))
    content = {**read_run_file(tmp_path), "hand_overs": [move]}
    (tmp_path / "run.json").write_bytes(strict_json.encode(sealed_json.sealed(content)))
    assert "a transfer whose record is damaged" in write_report(tmp_path).read_text(encoding="utf-8").lower()


def test_a_number_of_hundreds_of_digits_in_the_metrics_is_left_out_of_the_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": ' + "9" * 400 + '}\n{"step": 2, "loss": 2.5}\n')
    assert read_series(tmp_path).loss == [(2.0, 2.5)]


def test_tokens_of_a_vocabulary_are_no_secrets() -> None:
    kept = {"pad_token": "<|end|>", "special_tokens": "<a>"}
    assert redacted({**kept, "hub_token": "x", "token": "y"}, secrets=()) == {
        **kept,
        "hub_token": "[removed]",
        "token": "[removed]",
    }
