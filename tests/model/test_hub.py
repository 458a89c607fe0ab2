"""Hub models through a real huggingface_hub client in a child process, against a server on 127.0.0.1."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_hal.errors import StorageError
from qlora_hal.model import hub as hub_module
from qlora_hal.model.hub import Repository, Unreachable, in_time
from tests.model.fake_hub import COMMIT, FakeHub, Sparse, serving
from tests.model.hub_client import Client

WriteModel = Callable[..., Path]

NOWHERE = "http://127.0.0.1:9"
"""Port 9 (discard) refuses connections."""


def test_a_hub_model_is_fetched_without_pickles_or_python_and_then_found_offline(
    client: Client, files: dict[str, bytes]
) -> None:
    with serving(FakeHub(files)) as hub:
        answer = client.resolve(hub.address)
        assert answer["files"] == [
            "LICENSE", "NOTICE.txt", "USE_POLICY.md", "chat_template.jinja", "config.json", "model.safetensors",
            "tokenizer.json",
        ]  # fmt: skip
        assert (answer["revision"], answer["linear"], answer["waits"]) == (COMMIT, 14, [])
        assert not any(name in path for path in hub.requests for name in ("pytorch_model", ".py", "README"))
        before = dict(hub.requests)
        assert client.resolve(hub.address, offline=True)["path"] == answer["path"]
        assert hub.requests == before


@pytest.mark.fault("E14")
def test_python_files_come_only_with_trust_and_a_pinned_commit(client: Client, files: dict[str, bytes]) -> None:
    files["config.json"] = json.dumps(
        {**json.loads(files["config.json"]), "auto_map": {"AutoModel": "modeling_tiny.M"}}
    ).encode()
    with serving(FakeHub(files)) as hub:
        refused = client.resolve(hub.address)
        assert (refused["code"], refused["exit_status"]) == ("QH-E14", 10)
        assert "modeling_tiny.py" in refused["message"]
        assert COMMIT in refused["message"]
        unpinned = client.resolve(hub.address, revision="main", trust=True)
        assert (unpinned["code"], unpinned["exit_status"]) == ("QH-E14", 10)
        assert "40-digit commit" in unpinned["help"]
        allowed = client.resolve(hub.address, revision=COMMIT, trust=True)
        assert "modeling_tiny.py" in allowed["files"]


@pytest.mark.fault("C17")
def test_a_pickle_only_hub_model_is_refused_before_anything_is_fetched(client: Client, files: dict[str, bytes]) -> None:
    del files["model.safetensors"]
    with serving(FakeHub(files)) as hub:
        answer = client.resolve(hub.address)
        assert (answer["code"], answer["exit_status"]) == ("QH-C17", 10)
        assert "pytorch_model.bin" in answer["message"]
        assert "--local-dir pickled, then qlora-hal unpickle pickled converted" in answer["help"]
        assert not any("/resolve/" in path for path in hub.requests)


@pytest.mark.fault("E12")
def test_a_missing_model_says_hub_and_folder(client: Client, files: dict[str, bytes]) -> None:
    (client.folder / "tiny-llama").mkdir()
    with serving(FakeHub(files)) as hub:
        answer = client.resolve(hub.address, "tiny-lama")
    assert (answer["code"], answer["exit_status"]) == ("QH-E12", 11)
    assert "There is no folder tiny-lama here" in answer["message"]
    assert "has no model tiny-lama, or it is private" in answer["message"]
    assert "tiny-llama" in answer["cause"]
    assert "hf auth login" in answer["help"]


@pytest.mark.fault("E12")
def test_a_gated_model_is_told_from_a_missing_one(client: Client, files: dict[str, bytes]) -> None:
    with serving(FakeHub(files, gated=True)) as hub:
        answer = client.resolve(hub.address)
    assert (answer["code"], answer["exit_status"]) == ("QH-E12", 11)
    assert "is gated: it exists" in answer["message"]
    assert "hf auth login" in answer["help"]


@pytest.mark.fault("E12")
def test_a_missing_revision_is_named(client: Client, files: dict[str, bytes]) -> None:
    with serving(FakeHub(files)) as hub:
        answer = client.resolve(hub.address, revision="v9")
    assert (answer["code"], answer["exit_status"]) == ("QH-E12", 11)
    assert "no revision 'v9'" in answer["message"]


@pytest.mark.fault("E11")
def test_too_many_requests_and_server_errors_are_waited_out(client: Client, files: dict[str, bytes]) -> None:
    answers = [(429, {"Retry-After": "7"}), (503, {}), (429, {})]
    with serving(FakeHub(files, answers=answers)) as hub:
        answer = client.resolve(hub.address)
    # The server's own wish first, then doubling: attempt 1 waits 2 s, attempt 2 waits 4 s.
    assert answer["waits"] == [7.0, 2.0, 4.0]
    assert answer["linear"] == 14


@pytest.mark.parametrize("asked", ["nan", "inf", "-5", "soon", "1e999"])
def test_a_wait_that_is_none_is_not_waited(client: Client, files: dict[str, bytes], asked: str) -> None:
    with serving(FakeHub(files, answers=[(429, {"Retry-After": asked})])) as hub:
        answer = client.resolve(hub.address)
    assert answer["waits"] == [1.0]


@pytest.mark.fault("E11")
def test_a_hub_that_takes_the_call_and_never_answers_is_left(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client.patience_seconds = 1
        answer = client.resolve(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert answer["code"] == "QH-E11"


@pytest.mark.fault("E11")
def test_an_endless_429_falls_back_to_the_cache_or_ends_with_code_11(client: Client, files: dict[str, bytes]) -> None:
    busy = [(429, {})] * 50
    with serving(FakeHub(files, answers=list(busy))) as hub:
        answer = client.resolve(hub.address)
        assert (answer["code"], answer["exit_status"]) == ("QH-E11", 11)
        assert "answered 429" in answer["cause"]
        hub.answers.clear()
        fetched = client.resolve(hub.address)
        hub.answers.extend(busy)
        assert client.resolve(hub.address)["path"] == fetched["path"]


@pytest.mark.fault("E11")
@pytest.mark.parametrize("address", [NOWHERE, "http://no-such-host.invalid"])
def test_an_unreachable_hub_is_retried_then_named(client: Client, address: str) -> None:
    answer = client.resolve(address)
    assert (answer["code"], answer["exit_status"]) == ("QH-E11", 11)
    assert answer["waits"] == [1.0, 2.0, 4.0]
    assert "no copy" in answer["message"]
    assert "proxy" in answer["help"]


PAGES = [b"<html>Sign in to this network</html>", b"\x00\xff", b"{}", b"[]", b"null", b"7", b'{"id": 5, "siblings": 5}']


@pytest.mark.fault("E11")
@pytest.mark.parametrize("page", PAGES, ids=repr)
def test_the_page_of_a_proxy_is_no_defect(client: Client, page: bytes) -> None:
    with serving(FakeHub({}, page=page)) as hub:
        answer = client.resolve(hub.address)
    assert (answer["code"], answer["exit_status"]) == ("QH-E11", 11)
    assert "is no hub" in answer["cause"]
    assert "proxy" in answer["help"]


@pytest.mark.fault("E11")
@pytest.mark.parametrize(
    ("status", "most"),
    [(200, hub_module.LARGEST_LISTING), (503, hub_module.LARGEST_REFUSAL)],
    ids=["answer", "refusal"],
)
def test_an_answer_without_end_is_left_where_no_listing_is_so_long(client: Client, status: int, most: int) -> None:
    """What the sockets hold is sent beside it."""
    with serving(FakeHub({}, page=Sparse(b"[", 2**40), page_status=status)) as hub:
        answer = client.resolve(hub.address)
    assert answer["code"] == "QH-E11"
    attempts = 1 + len(answer["waits"])
    assert hub.sent <= attempts * (most + 2**24)


def test_an_answer_that_drips_is_left_when_its_time_is_over() -> None:
    seconds = iter(range(0, 10**6, 100))
    chunks, taken = itertools.repeat(b"."), []
    with pytest.raises(Unreachable, match="did not end within 600 s"):
        taken.extend(in_time(chunks, lambda: next(seconds)))
    assert list(in_time([b"a", b"b"])) == [b"a", b"b"]


@pytest.mark.fault("E11")
def test_offline_without_a_copy_is_told_at_once(client: Client) -> None:
    answer = client.resolve(NOWHERE, offline=True)
    assert (answer["code"], answer["waits"]) == ("QH-E11", [])
    assert "HF_HUB_OFFLINE is set" in answer["cause"]


@pytest.mark.fault("E13")
def test_a_download_that_comes_short_once_is_fetched_again(client: Client, files: dict[str, bytes]) -> None:
    with serving(FakeHub(files, cut=1)) as hub:
        answer = client.resolve(hub.address)
    assert answer["linear"] == 14
    assert Path(answer["path"], "model.safetensors").stat().st_size == len(files["model.safetensors"])


@pytest.mark.fault("E13")
def test_a_download_that_always_comes_short_leaves_nothing_and_names_the_file(
    client: Client, files: dict[str, bytes]
) -> None:
    with serving(FakeHub(files, cut=1000)) as hub:
        answer = client.resolve(hub.address)
    if "path" in answer:  # huggingface_hub 1.5 asks for the rest until it has all of it
        assert Path(answer["path"], "model.safetensors").read_bytes() == files["model.safetensors"]
        return
    assert (answer["code"], answer["exit_status"]) == ("QH-E13", 11)
    assert "model.safetensors" in answer["message"]
    assert not list(client.cache.rglob("model.safetensors"))
    # Some releases of huggingface_hub keep the part that came, under a name that nothing takes for the file.
    blobs = [p for p in client.cache.rglob("blobs/*") if p.suffix not in (".incomplete", ".lock")]
    assert {p.stat().st_size for p in blobs} <= {len(content) for content in files.values()}


@pytest.mark.fault("E13")
def test_a_partial_file_in_the_cache_is_replaced(client: Client, files: dict[str, bytes]) -> None:
    with serving(FakeHub(files)) as hub:
        path = Path(client.resolve(hub.address)["path"], "model.safetensors")
        blob = path.resolve()
        blob.write_bytes(blob.read_bytes()[: len(files["model.safetensors"]) // 2])
        assert client.resolve(hub.address)["linear"] == 14
    assert path.read_bytes() == files["model.safetensors"]


@pytest.mark.fault("E11")
def test_weight_files_that_are_complete_are_not_fetched_again_after_a_download_broke_off(
    client: Client, write_model: WriteModel
) -> None:
    files = {path.name: path.read_bytes() for path in write_model("sharded", shards=2).iterdir()}
    first, second = sorted(name for name in files if name.endswith(".safetensors"))
    with serving(FakeHub(files, down=second)) as hub:
        answer = client.resolve(hub.address)
        assert (answer["code"], answer["exit_status"]) == ("QH-E11", 11)
        assert "not all of its weights" in answer["message"]
        hub.down = ""
        before = hub.served[first]
        assert client.resolve(hub.address)["linear"] == 14
        assert hub.served[first] - before <= 16 * 1024


@pytest.mark.fault("C01")
def test_a_partial_file_in_the_cache_is_never_loaded_offline(client: Client, files: dict[str, bytes]) -> None:
    with serving(FakeHub(files)) as hub:
        blob = Path(client.resolve(hub.address)["path"], "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    answer = client.resolve(NOWHERE, offline=True)
    assert (answer["code"], answer["exit_status"]) == ("QH-C01", 5)


@pytest.mark.fault("E22")
def test_a_tokenizer_that_the_disk_cannot_hold_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the weights alone: nothing is asked of the hub."""
    monkeypatch.setattr(hub_module.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_module, "snapshot_download", lambda *names, **given: pytest.fail("it was begun"))
    with pytest.raises(StorageError, match="4096 TiB more") as refused:
        hub_module.fetch(Repository("org/tiny", None, COMMIT, {"tokenizer.json": 2**52}), ["tokenizer.json"])
    assert refused.value.code == "QH-E22"
