"""The torch family's ranks: whose fault a failed collective is, devices that are not there, and what joins them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from qlora_hal.contract.world import World
from qlora_hal.errors import BackendError, ConfigError
from qlora_hal_backends.torch_family import launching, links, ranks
from qlora_hal_backends.torch_family.ranks import Ranks, device_of_rank

CPU = torch.device("cpu")


class Kept(dict[str, str]):
    """A store as torch's, of one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], Ranks]:
    """Ranks whose collectives raise this."""

    def make(error: Exception) -> Ranks:
        def all_reduce(tensor: torch.Tensor) -> None:
            raise error

        monkeypatch.setattr(ranks.dist, "all_reduce", all_reduce)
        kept = Kept({"qlora_hal/1": "0"})  # and no host: it never came so far
        monkeypatch.setattr(ranks, "_store", lambda: kept)
        return Ranks(World(0, 2, 0), "nccl", timeout_seconds=60.0)

    return make


def test_one_rank_asks_nobody_and_leaves_nothing() -> None:
    alone = Ranks.join(World(), CPU, 1.0)
    values = np.array([1.0, 2.0])
    assert alone.sum_on_host(values) is values
    alone.agree(None)
    assert alone.seconds == 0.0
    alone.leave()


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external "
    "library call failed or device error.\nLast error:\nBootstrap : no socket interface found"
)
LOST = (
    "NCCL error in: ProcessGroupNCCL.cpp:2345, remote process exited or there was a network error\nncclRemoteError: A "
    "call failed possibly due to a network error or a remote process exiting prematurely."
)


@pytest.mark.fault("R07")
@pytest.mark.parametrize(
    "words",
    [NCCL, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000; ncclInvalidUsage", "RCCL: no device"],
)
def test_an_error_of_the_library_keeps_its_text_and_names_the_rank(
    words: str, failing: Callable[[Exception], Ranks]
) -> None:
    with pytest.raises(BackendError, match="The collective library failed on rank 0 of 2") as caught:
        failing(dist.DistBackendError(words)).sum_on_device(torch.ones(1))
    assert caught.value.code == "QH-R07"
    assert words in caught.value.cause
    assert "NCCL_DEBUG" in caught.value.fix


@pytest.mark.fault("R02")
@pytest.mark.parametrize(
    "words",
    [
        LOST,
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242",
        "Timed out waiting 8000ms for recv operation to complete",
        "NCCL communicator was aborted on rank 0.",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 8000 milliseconds before timing out.",
    ],
)
def test_a_peer_that_is_gone_is_no_error_of_the_library_and_is_named(
    words: str, failing: Callable[[Exception], Ranks]
) -> None:
    with pytest.raises(BackendError, match=r"Rank 1 of 2 is gone or does not answer\.") as caught:
        failing(RuntimeError(words)).sum_on_host(np.ones(1))
    assert caught.value.code == "QH-R02"
    assert words in caught.value.cause
    assert caught.value.context == {"ranks": [1]}
    assert caught.value.where == "rank 1 on an unknown host"


@pytest.mark.fault("R02")
def test_a_peer_that_was_waited_for_as_long_as_is_allowed_is_said_to_hang(
    failing: Callable[[Exception], Ranks],
) -> None:
    slow = failing(RuntimeError("Timed out waiting 0ms for recv operation to complete"))
    slow.timeout_seconds = 1e-9
    with pytest.raises(BackendError, match=r"It was waited for 0 s \(parallel\.timeout_seconds\)\.") as caught:
        slow.sum_on_host(np.ones(1))
    assert caught.value.context["waited_seconds"] >= 0


@pytest.mark.fault("R07")
def test_an_error_of_the_library_while_ranks_meet_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def init_process_group(*given: object, **more: object) -> None:
        raise dist.DistBackendError(NCCL)

    monkeypatch.setattr(ranks.dist, "init_process_group", init_process_group)
    monkeypatch.setattr(ranks, "rendezvous", lambda *given, **more: iter([(dist.HashStore(), 0, 2)]))
    with pytest.raises(BackendError) as caught:
        Ranks.join(World(0, 2, 0), CPU, 1.0)
    assert caught.value.code == "QH-R07"


def test_each_start_of_torchrun_meets_in_its_own_part_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch issue 135712: the address of a rank of an earlier start is still there."""
    given: dict[str, dist.Store] = {}
    store = dist.HashStore()
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *_, **more: given.update(more))
    monkeypatch.setattr(ranks, "rendezvous", lambda *_, **more: iter([(store, 0, 2)]))
    for start in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        Ranks.join(World(0, 2, 0), CPU, 1.0)
        assert not given["store"].check(["address"])
        given["store"].set("address", start)


def test_machines_that_count_their_starts_otherwise_meet_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the machine on which a rank failed counts it."""
    given: dict[str, dist.Store] = {}
    store = dist.HashStore()
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *_, **more: given.update(more))
    monkeypatch.setattr(ranks, "rendezvous", lambda *_, **more: iter([(store, 0, 2)]))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    Ranks.join(World(0, 2, 0), CPU, 1.0)
    given["store"].set("address", "here")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Ranks.join(World(1, 2, 0), CPU, 1.0)
    assert given["store"].check(["address"])


def test_ranks_of_one_machine_meet_where_no_name_has_to_be_looked_up(tmp_path: Path) -> None:
    """torch looks up the machine's own name otherwise, and ranks whose machine has one that nobody knows never meet."""
    settings = launching._settings(2, 0, tmp_path)
    assert (settings.local_addr, settings.rdzv_endpoint) == ("localhost", "localhost:0")


@pytest.mark.fault("R04")
def test_a_start_of_several_machines_that_would_meet_what_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GROUP_WORLD_SIZE": "2",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match="would meet the ranks that are gone") as caught:
        Ranks.join(World(0, 2, 0), CPU, 1.0)
    assert caught.value.code == "QH-R04"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caught.value.fix


@pytest.mark.fault("R01")
def test_a_rank_without_a_device_of_its_own_is_told_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.torch, "get_device_module", lambda device: SimpleNamespace(device_count=lambda: 2))
    with pytest.raises(ConfigError, match="Rank 5 needs cuda device 2 of this machine, which has 2") as caught:
        device_of_rank(torch.device("cuda", 0), World(5, 6, 2))
    assert caught.value.code == "QH-R01"
    assert device_of_rank(CPU, World(5, 6, 2)) == CPU


HEAD = "\t\x1b[4mGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
LEGEND = (
    "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe\n  NV#  = Connection traversing a bonded set\n"
)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("GPU0\t X \tNV18\tNV18\t0-95\t0\nGPU1\tNV18\t X \tNV18\t0-95\t0\nGPU2\tNV18\tNV18\t X \t0-95\t0\n", "NVLink"),
        ("GPU0\t X \tPHB\tSYS\t0-95\t0\nGPU1\tPHB\t X \tNODE\t0-95\t0\nGPU2\tSYS\tNODE\t X \t0-95\t0\n", "PCIe"),
        (
            "GPU0\t X \tNV4\tSYS\t0-95\t0\nGPU1\tNV4\t X \tSYS\t0-95\t0\nGPU2\tSYS\tSYS\t X \t0-95\t0\n",
            "NVLink and PCIe",
        ),
        ("GPU0\t X \t0-95\t0\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_links_of_a_machine_are_read_from_nvidias_table(rows: str, words: str) -> None:
    assert links.links_in(HEAD + rows + LEGEND) == words


def test_where_no_tool_tells_the_links_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "TOPOLOGY", ("no-such-tool-anywhere",))
    links.links_between.cache_clear()
    assert links.links_between(torch.device("cuda", 0)) == "unknown"
    assert links.links_between(CPU) == "this machine"
    links.links_between.cache_clear()
