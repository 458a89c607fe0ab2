"""A model, not a measurement: tokens a second on up to 64 devices, from what one device and its links were measured at.

    python benchmarks/scaling_model.py --compute-seconds 0.481 --tokens 8192 --gradient-bytes 167772160 \\
        --link-in 150 --link-out 25 --markdown

Data mode, weak scaling (each device keeps its batch): with N devices, g of them on a host and h = ceil(N / g) hosts,

    T(N)      = C + reduce(N) + vote(N)
    reduce(N) = 2 (N - 1) / N * G / B + 2 (n - 1) Li + 2 (h - 1) Lo       a ring; B = Bi on one host, else min(Bi, Bo)
    vote(N)   = ceil(log2 N) * V                                          sums of a few numbers on the host

C is a step of one device in seconds, G the bytes of the adapter's gradients (float32), Bi and Bo bytes a second through
each device on one host and between hosts, Li and Lo the time of one hop, n the devices of a full host (N or g). Nothing
is overlapped, as in the code. Shard mode adds, for M micro-batches of a step, two gathers of the packed base each,

    gather(N) = M * 2 * ((N - 1) / N * P / B + K * ((n - 1) Li + (h - 1) Lo))
    T(N)      = C + max(0, gather(N) - o C) + reduce(N) + vote(N)

P being the packed bytes, K the layers, o the share of C behind which gathers hide. Strong scaling (a fixed batch) puts
C / N in the place of C; a step cannot be cut below one micro-batch, so its micro-batches are the most devices it has.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

DEVICES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured: seconds, bytes and bytes a second, as the formulas of this module name them."""

    compute_seconds: float
    tokens: int
    gradient_bytes: int
    link_in: float
    link_out: float
    latency_in: float
    latency_out: float
    vote_seconds: float
    devices_per_host: int
    packed_bytes: int = 0
    layers: int = 1
    micro_batches: int = 1
    overlap: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One number of devices: seconds of a step and their parts, tokens a second of all, share of ideal speed."""

    devices: int
    seconds: float
    reduce_seconds: float
    gather_seconds: float
    tokens_per_second: float
    efficiency: float


def ring_seconds(rates: Rates, devices: int, payload: float, rounds: int, messages: int = 1) -> float:
    """`rounds` times around a ring (2 to reduce, 1 to gather), each device passing on all but its own share."""
    if devices == 1:
        return 0.0
    hosts = math.ceil(devices / rates.devices_per_host)
    on_host = min(devices, rates.devices_per_host)
    speed = rates.link_in if hosts == 1 else min(rates.link_in, rates.link_out)
    hops = (on_host - 1) * rates.latency_in + (hosts - 1) * rates.latency_out
    return rounds * ((devices - 1) / devices * payload / speed + messages * hops)


def row(rates: Rates, devices: int, *, shard: bool = False, strong: bool = False) -> Row:
    """The model for so many devices."""
    compute = rates.compute_seconds / (devices if strong else 1)
    reduce = ring_seconds(rates, devices, rates.gradient_bytes, rounds=2)
    gather = 0.0
    if shard:
        passes = 2 * (rates.micro_batches / devices if strong else rates.micro_batches)
        gather = passes * ring_seconds(rates, devices, rates.packed_bytes, rounds=1, messages=rates.layers)
    vote = math.ceil(math.log2(devices)) * rates.vote_seconds
    seconds = compute + max(0.0, gather - rates.overlap * compute) + reduce + vote
    tokens = rates.tokens * (1 if strong else devices)
    ideal = rates.tokens / rates.compute_seconds * devices
    return Row(devices, seconds, reduce, gather, tokens / seconds, tokens / seconds / ideal)


def table(rates: Rates, *, shard: bool = False, strong: bool = False) -> list[Row]:
    """Up to 64 devices; a fixed batch up to one micro-batch each."""
    most = rates.micro_batches if strong else DEVICES[-1]
    return [row(rates, devices, shard=shard, strong=strong) for devices in DEVICES if devices <= most]


def as_markdown(rows: Sequence[Row]) -> str:
    lines = ["| devices | seconds a step | of them gradients | tokens/s (model) | of ideal |", "|---|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| {each.devices} | {each.seconds:.3f} | {each.reduce_seconds:.4f} | {each.tokens_per_second:,.0f} | "
            f"{100 * each.efficiency:.1f} % |"
            for each in rows
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compute-seconds", type=float, required=True, help="a step of one device")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of that step")
    parser.add_argument("--gradient-bytes", type=int, required=True, help="4 bytes for each weight of the adapter")
    parser.add_argument("--link-in", type=float, required=True, help="GB/s through a device on one host")
    parser.add_argument("--link-out", type=float, required=True, help="GB/s through a device between hosts")
    parser.add_argument("--latency-in", type=float, default=5.0, help="microseconds of a hop on one host")
    parser.add_argument("--latency-out", type=float, default=20.0, help="microseconds of a hop between hosts")
    parser.add_argument("--vote", type=float, default=200.0, help="microseconds of a sum of a few numbers, two ranks")
    parser.add_argument("--devices-per-host", type=int, default=8)
    parser.add_argument("--packed-bytes", type=int, default=0, help="of the base; with it the table is of shard mode")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--overlap", type=float, default=0.0, help="share of the computing that hides gathers")
    parser.add_argument("--strong", action="store_true", help="a fixed batch instead of one for each device")
    parser.add_argument("--markdown", action="store_true")
    chosen = parser.parse_args(argv)
    rates = Rates(
        compute_seconds=chosen.compute_seconds,
        tokens=chosen.tokens,
        gradient_bytes=chosen.gradient_bytes,
        link_in=chosen.link_in * 1e9,
        link_out=chosen.link_out * 1e9,
        latency_in=chosen.latency_in * 1e-6,
        latency_out=chosen.latency_out * 1e-6,
        vote_seconds=chosen.vote * 1e-6,
        devices_per_host=chosen.devices_per_host,
        packed_bytes=chosen.packed_bytes,
        layers=chosen.layers,
        micro_batches=chosen.micro_batches,
        overlap=chosen.overlap,
    )
    rows = table(rates, shard=chosen.packed_bytes > 0, strong=chosen.strong)
    told = {"is": "a model, not a measurement", "rates": asdict(rates), "rows": [asdict(each) for each in rows]}
    print(as_markdown(rows) if chosen.markdown else json.dumps(told, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
