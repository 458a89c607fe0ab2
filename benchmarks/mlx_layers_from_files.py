"""What MLX keeps in memory of layers whose weights are files that are read when they are needed.

Each way runs in a process of its own, over the same files: all weights read before; lazily loaded weights in one graph
with its gradient; the same with each layer recomputed (`mx.checkpoint`); layer by layer, each loaded, evaluated and
let go, and the gradient of each taken from a new load.

python benchmarks/mlx_layers_from_files.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

LAYERS, WIDTH, ROWS = 24, 1024, 16
Weights = dict[str, mx.array]
WAYS = ("resident", "one graph", "one graph, recomputed", "layer by layer")


def layer(x: mx.array, scale: mx.array, weights: Weights) -> mx.array:
    """A gateless feed-forward with a residual, and a scale for each column as its adapter."""
    return x + mx.maximum(x @ weights["up"].T, 0) @ weights["down"].T + x * scale


def in_one_graph(load: Callable[[int], Weights], scales: list[mx.array], way: str) -> tuple[mx.array, list[mx.array]]:
    weights = [load(number) for number in range(LAYERS)]
    if way == "resident":
        mx.eval(weights)

    def loss(scales: list[mx.array]) -> mx.array:
        x = mx.ones((ROWS, WIDTH))
        for one, scale in zip(weights, scales, strict=True):
            if way == "one graph, recomputed":
                x = mx.checkpoint(lambda x, scale, one=one: layer(x, scale, one))(x, scale)
            else:
                x = layer(x, scale, one)
        return (x * x).mean()

    found: tuple[mx.array, list[mx.array]] = mx.value_and_grad(loss)(scales)
    return found


def layer_by_layer(load: Callable[[int], Weights], scales: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
    inputs = [mx.ones((ROWS, WIDTH))]
    for number in range(LAYERS):
        inputs.append(layer(inputs[-1], scales[number], load(number)))
        mx.eval(inputs[-1])
    loss, upstream = mx.value_and_grad(lambda x: (x * x).mean())(inputs[-1])
    gradients = []
    for number in reversed(range(LAYERS)):
        weights = load(number)
        _, (upstream, gradient) = mx.vjp(
            lambda x, scale, weights=weights: layer(x, scale, weights), [inputs[number], scales[number]], [upstream]
        )
        mx.eval(upstream, gradient)
        gradients.append(gradient)
    return loss, gradients[::-1]


def measure(way: str, folder: Path) -> None:
    scales = [mx.full((WIDTH,), 0.01) for _ in range(LAYERS)]
    mx.eval(scales)
    mx.reset_peak_memory()
    began = time.perf_counter()

    def load(number: int) -> Weights:
        read: Weights = mx.load(str(folder / f"{number}.safetensors"))
        return read

    by_layer = way == "layer by layer"
    loss, gradients = layer_by_layer(load, scales) if by_layer else in_one_graph(load, scales, way)
    mx.eval(loss, gradients)
    size = float(mx.stack([mx.abs(one).sum() for one in gradients]).sum().item())
    print(
        f"{way:<22} peak {mx.get_peak_memory() / 1e6:6.0f} MB  {time.perf_counter() - began:5.1f} s  "
        f"loss {float(loss.item()):.6g}, gradients {size:.6g} in all"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help="measure one way, over the files in --folder")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.way is not None:
        measure(asked.way, asked.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        shapes = {"up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
        for number in range(LAYERS):
            weights = {name: mx.random.normal(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
            mx.save_safetensors(str(Path(scratch) / f"{number}.safetensors"), weights)
        print(f"{LAYERS} layers of {8 * WIDTH * WIDTH * 4 / 1e6:.0f} MB, MLX {mx.__version__}, {mx.default_device()}")
        for way in WAYS:
            subprocess.run([sys.executable, __file__, "--way", way, "--folder", scratch], check=True)


if __name__ == "__main__":
    main()
