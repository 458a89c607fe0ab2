"""A run's adapter goes to a hub by the real huggingface_hub, comes back and opens; against a server on 127.0.0.1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from small_runs import small_run
from transformers import AutoModelForCausalLM

from qlora_hal import TrainResult, merge, push
from qlora_hal.adapter import read_adapter
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import AdapterError, ConfigError
from qlora_hal.report.metrics import smoothed
from qlora_hal_conformance.certificate import content_hash
from tests.model.fake_hub import READ_TOKEN, WRITE_TOKEN, WritableHub, serving
from tests.model.hub_client import Client

CERTIFICATES = Path(__file__).resolve().parents[2] / "docs" / "certificates"
NOWHERE = "http://127.0.0.1:9"
"""Port 9 (discard) refuses connections."""
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "qlora_hal.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    rows = tmp_path_factory.mktemp("rows") / "held-out.jsonl"
    rows.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:8]))
    changes: dict[str, Any] = {
        "data.validation_path": str(rows),
        "training.max_steps": 2,
        "training.sample_prompts": ["A question that is nobody's business"],
    }
    return small_run(tmp_path_factory.mktemp("runs") / "first", changes)


@pytest.fixture
def own_run(run: TrainResult, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(run.run_dir, tmp_path / "run", symlinks=True))


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


def judged(run_dir: Path, **changes: object) -> None:
    """Put a signed conformance.json beside a run."""
    document: dict[str, object] = {
        "kind": "run",
        "holds": True,
        "backend": {"name": "cpu_torch"},
        "totals": {"passed": 61, "refused": 0, "failed": 0},
        "run": {"dtype": "float32", "combination": {"weight_format": "nf4"}, "judged": ["a drawn Llama"]},
        **changes,
    }
    signed = {**document, "sha256": content_hash(document)}
    (run_dir / "conformance.json").write_text(json.dumps(signed))


def test_an_adapter_goes_up_comes_back_and_opens(run: TrainResult, client: Client) -> None:
    with serving(WritableHub(name="me/first")) as hub:
        done = client.command(
            *(hub.address, "push", str(run.run_dir), "me/first", "--private", "--base-model", "org/base"),
            token=WRITE_TOKEN,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("uploaded to a new private repository me/first:")
        assert hub.private
        assert hub.files.keys() == ADAPTER_FILES
        assert hub.commits == [["header", "file", "file", "file", "lfsFile"]]
        back = client.download(hub.address, "me/first", token=WRITE_TOKEN)
    here, there = read_adapter(run.adapter_dir), read_adapter(back)
    assert there.config == here.config
    assert all(np.array_equal(there.tensors[name], tensor) for name, tensor in here.tensors.items())
    assert json.loads((back / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    opened = PeftModel.from_pretrained(base, back)
    name, tensor = next(iter(here.tensors.items()))
    own = opened.state_dict()[name.replace(".weight", ".default.weight")]
    assert np.array_equal(own.numpy(), tensor)


def test_what_goes_up_names_no_place_and_no_secret(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = json.loads((own_run / "adapter" / "adapter_config.json").read_text())
    secret = "hf_" + "s" * 30
    (own_run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "revision": secret}))
    (own_run / "adapter" / "notes.txt").write_text("mine")
    with serving(WritableHub(name="me/first")) as hub:
        client = Client(tmp_path)
        (answer,) = client.push(hub.address, (WRITE_TOKEN, own_run, "me/first", {}))
    assert answer["files"].keys() == hub.files.keys() == ADAPTER_FILES
    sent = b"".join(content[:] for name, content in hub.files.items() if not name.endswith(".safetensors")).decode()
    for unwanted in (str(tmp_path), str(model_path().parent), str(Path.home()), secret, "nobody's business"):
        assert unwanted not in sent


def test_the_card_tells_data_settings_losses_versions_and_how_to_open(run: TrainResult) -> None:
    card = push(run.run_dir, "me/first", base_model="org/base", dry_run=True, quiet=True).card
    assert 'base_model: "org/base"' in card
    assert 'PeftModel.from_pretrained(base, "me/first")' in card
    assert "mlx_lm.generate --model org/base --adapter-path adapter-mlx" in card
    assert "| data | rows.jsonl |" in card
    assert "| training.max_steps | 2 |" in card
    losses = [loss for _, loss in run.losses]
    average = smoothed(losses)[-1]
    assert f"| loss of the first step, average at the last | {losses[0]:.4f} -> {average:.4f} |" in card
    assert f"| {run.eval_loss_before:.4f} -> {run.eval_loss_after:.4f} |" in card
    assert f"| torch | {torch.__version__} |" in card
    assert "## Conformance" not in card


def test_rows_that_were_held_out_are_not_told_as_trained(tmp_path: Path) -> None:
    done = small_run(tmp_path / "run", {"data.validation_fraction": 0.25, "training.max_steps": 1})
    card = push(done.run_dir, "me/a", dry_run=True, quiet=True).card
    assert "; a share of 0.25 of the rows was held out |" in card


def test_a_dry_run_shows_files_and_card_and_asks_nothing_of_the_hub(run: TrainResult, client: Client) -> None:
    done = client.command(NOWHERE, "push", str(run.run_dir), "me/first", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("would go to me/first; nothing was sent:")
    assert "adapter_model.safetensors" in done.stdout
    assert "# LoRA adapter" in done.stdout
    assert "--base-model OWNER/NAME" in done.stderr


@pytest.mark.fault("E23", "E24", "E25")
def test_the_hub_says_no_and_each_no_is_told(run: TrainResult, client: Client) -> None:
    with serving(WritableHub(name="me/first", exists=True, files={"README.md": b"hers"})) as hub:
        answers = client.push(
            hub.address,
            ("", run.run_dir, "me/first", {}),
            ("hf_" + "x" * 30, run.run_dir, "me/first", {"exist_ok": True}),
            (WRITE_TOKEN, run.run_dir, "me/first", {}),
            (WRITE_TOKEN, run.run_dir, "me/first", {"exist_ok": True, "private": True}),
            (READ_TOKEN, run.run_dir, "me/first", {"exist_ok": True}),
        )
        assert hub.files == {"README.md": b"hers"}
    with serving(WritableHub(name="me/first")) as hub:
        answers += client.push(hub.address, (WRITE_TOKEN, run.run_dir, "you/first", {}))
    assert [answer["code"] for answer in answers] == ["QH-E23", "QH-E23", "QH-E25", "QH-E25", "QH-E24", "QH-E24"]
    assert {answer["exit_status"] for answer in answers} == {11}
    assert "hf auth login" in answers[0]["help"]
    assert "--exist-ok" in answers[2]["help"]
    assert "is public, and private was asked for" in answers[3]["message"]


@pytest.mark.fault("E26")
def test_an_upload_that_does_not_go_through_says_so(run: TrainResult, client: Client) -> None:
    (offline,) = client.push(NOWHERE, (WRITE_TOKEN, run.run_dir, "me/first", {}), offline=True)
    with serving(WritableHub(name="me/first", full=True)) as hub:
        full, _ = client.push(hub.address, *[(WRITE_TOKEN, run.run_dir, "me/first", {"exist_ok": True})] * 2)
    (gone,) = client.push(NOWHERE, (WRITE_TOKEN, run.run_dir, "me/first", {}))
    with serving(WritableHub(name="me/first", exists=True, ignored=frozenset({"qlora_hal.json"}))) as hub:
        (ignored,) = client.push(hub.address, (WRITE_TOKEN, run.run_dir, "me/first", {"exist_ok": True}))
    assert {answer["code"] for answer in (offline, full, gone, ignored)} == {"QH-E26"}
    assert "HF_HUB_OFFLINE" in offline["help"]
    assert "507" in full["message"]
    assert "--exist-ok" in full["help"]  # the repository is there, and empty
    assert "left out qlora_hal.json" in ignored["message"]


@pytest.mark.fault("E26")
def test_what_answers_and_is_no_hub_is_no_defect(run: TrainResult, client: Client) -> None:
    for page in (b"<html>Sign in</html>", b"[]", b"null", b"{}"):
        with serving(WritableHub(name="me/first", exists=True, page=page)) as hub:
            (answer,) = client.push(hub.address, (WRITE_TOKEN, run.run_dir, "me/first", {"exist_ok": True}))
        assert answer["code"] == "QH-E26", page
        assert "HF_ENDPOINT is a hub" in answer["help"]


def test_a_repository_that_exists_is_added_to_with_consent_and_nothing_is_deleted(
    run: TrainResult, client: Client
) -> None:
    with serving(WritableHub(name="me/first", exists=True, private=True, files={"hers.txt": b"hers"})) as hub:
        (answer,) = client.push(hub.address, (WRITE_TOKEN, run.run_dir, "me/first", {"exist_ok": True}))
        assert hub.files["hers.txt"] == b"hers"
        assert hub.files.keys() == ADAPTER_FILES | {"hers.txt"}
    assert (answer["created"], answer["private"]) == (False, True)


@pytest.mark.fault("U21")
@pytest.mark.parametrize("name", ["first", "a/b/c", "me/fir st", "me/-first", ""])
def test_a_name_without_an_owner_is_refused(run: TrainResult, name: str) -> None:
    with pytest.raises(ConfigError, match=r"QH-U21.*owner/name is expected"):
        push(run.run_dir, name, dry_run=True, quiet=True)


@pytest.mark.fault("C61")
def test_a_run_without_a_finished_adapter_is_refused(own_run: Path) -> None:
    shutil.rmtree(own_run / "adapter")
    with pytest.raises(AdapterError, match="QH-C61"):
        push(own_run, "me/first", dry_run=True, quiet=True)


def test_the_card_quotes_what_conformance_says_of_the_run(own_run: Path) -> None:
    judged(own_run)
    card = push(own_run, "me/first", dry_run=True, quiet=True).card
    assert "what this run computes holds (61 of 61 cases passed): a drawn Llama" in card
    assert json.loads((own_run / "conformance.json").read_text())["sha256"] in card


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": {"name": "cuda_bnb"}}, "backend cuda_bnb, this run has cpu_torch"),
        ({"run": {"dtype": "bfloat16", "combination": {"weight_format": "nf4"}}}, "dtype bfloat16"),
        (
            {"run": {"dtype": "float32", "combination": {"weight_format": "nf4", "fp8_products": True}}},
            "products in fp8 True, this run has False",
        ),
        ({"filtered": True}, "it is no whole record of a run"),
    ],
)
def test_a_record_of_something_else_is_left_out_with_a_note(
    own_run: Path, changes: Mapping[str, object], said: str
) -> None:
    judged(own_run, **changes)
    told = push(own_run, "me/first", dry_run=True, quiet=True)
    assert "## Conformance" not in told.card
    assert any(said in note for note in told.notes)


@pytest.mark.fault("B54")
def test_an_edited_record_is_refused(own_run: Path) -> None:
    judged(own_run, holds=False)
    path = own_run / "conformance.json"
    path.write_text(path.read_text().replace('"holds": false', '"holds": true'))
    with pytest.raises(ConfigError, match=r"QH-B54.*does not have the hash"):
        push(own_run, "me/first", dry_run=True, quiet=True)


@pytest.mark.fault("B54")
def test_only_a_certificate_that_verifies_and_is_of_the_backend_is_named(run: TrainResult, tmp_path: Path) -> None:
    certificate = CERTIFICATES / "cpu_torch.json"
    card = push(run.run_dir, "me/first", certificate=certificate, dry_run=True, quiet=True).card
    assert json.loads(certificate.read_text())["sha256"] in card
    with pytest.raises(ConfigError, match=r"QH-B54.*it is of mlx_lora, and cpu_torch trained this run"):
        push(run.run_dir, "me/first", certificate=CERTIFICATES / "mlx_lora_cpu.json", dry_run=True, quiet=True)
    edited = tmp_path / "certificate.json"
    edited.write_text(certificate.read_text().replace('"seed": ', '"seed": 1'))
    with pytest.raises(ConfigError, match=r"QH-B54.*edited or damaged"):
        push(run.run_dir, "me/first", certificate=edited, dry_run=True, quiet=True)


@pytest.mark.slow
@pytest.mark.fault("C81")
def test_a_merged_model_goes_up_without_what_else_lies_there(run: TrainResult, client: Client, tmp_path: Path) -> None:
    merged = merge(run.run_dir, tmp_path / "merged", dtype="float32", row_limit=2, quiet=True).path
    (merged / "optimizer.bin").write_bytes(b"mine")
    (merged / "additional_chat_templates").mkdir()
    (merged / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "_name_or_path": str(tmp_path / "base")}))
    with serving(WritableHub(name="me/whole")) as hub:
        (answer,) = client.push(hub.address, (WRITE_TOKEN, run.run_dir, "me/whole", {"merged": str(merged)}))
        back = client.download(hub.address, "me/whole", token=WRITE_TOKEN)
    assert "optimizer.bin" not in hub.files
    assert "additional_chat_templates/tools.jinja" in hub.files
    assert str(tmp_path) not in hub.files["config.json"][:].decode()
    assert any("optimizer.bin" in note for note in answer["notes"])
    assert {"config.json", "merge.json", "model.safetensors", "tokenizer.json"} <= hub.files.keys()
    assert 'AutoModelForCausalLM.from_pretrained("me/whole")' in answer["card"]
    assert "KL to the adapter" in answer["card"]
    AutoModelForCausalLM.from_pretrained(back)

    with (merged / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x7f")
    with pytest.raises(AdapterError, match=r"QH-C81.*model\.safetensors changed"):
        push(run.run_dir, "me/whole", merged=merged, dry_run=True, quiet=True)


@pytest.mark.fault("C81")
def test_a_folder_that_is_no_merge_of_this_run_is_refused(run: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"QH-C81.*merge\.json is missing or damaged"):
        push(run.run_dir, "me/whole", merged=tmp_path, dry_run=True, quiet=True)
