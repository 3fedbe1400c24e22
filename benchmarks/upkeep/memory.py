"""Is the memory that a quantisation is planned to hold what it takes? Planned and measured for rows of several kinds.

`python -m benchmarks.upkeep.memory` quantises a network with random weights for each row, in a process of its own, and
prints a table; it exits 1 where planned is more than a quarter off. What is measured is the peak of the process, or of
the GPU, above what it held before the network was built. Libraries are not in it: a small network is quantised first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import pandas as pd
import torch

from benchmarks.planning.planner import KnownNetwork
from benchmarks.runtime.devices import device_of
from benchmarks.runtime.workspace import MIB, peak_memory, restart_peak
from benchmarks.stages.plan import build
from benchmarks.suite import discover
from benchmarks.upkeep import DEVICE_VARIABLE
from tfmq.cost import plan_cost
from tfmq.network.sampling import SamplingSettings
from tfmq.passes import Recipe
from tfmq.precision import Precision
from tfmq.quantization import quantize_

MOST_OFF = 0.25
STEPS, IMAGES, TOKENS, SMALL = 4, 8, 16, 32

COMMON = {"in_channels": 4, "out_channels": 4, "sample_size": 16}
# 52 million parameters, and 50 million with a context of 16 tokens.
UNCONDITIONAL = COMMON | {
    "_class_name": "UNet2DModel",
    "block_out_channels": (64, 128, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
}
CONDITIONAL = COMMON | {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": (128, 256, 512),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
    "cross_attention_dim": 256,
}


@dataclass(frozen=True)
class Row:
    """A method with few rows and iterations, at a precision, on a network that is given by diffusers' settings."""

    method: str
    precision: str
    network: Mapping[str, object] = field(hash=False)
    settings: Mapping[str, object] = field(hash=False)

    @property
    def recipe(self) -> Recipe:
        """The method's passes."""
        return discover.method(self.method).config(**self.settings).recipe()


ROWS = {
    row.method: row
    for row in (
        # Learns block by block and on time steps; all that waits and is learned counts.
        Row("tfmq", "w4a8", UNCONDITIONAL, {"images": IMAGES, "iterations": 2, "temporal_iterations": 2}),
        # Has low-rank branches, and a range for each group of input channels.
        Row("svdquant", "w4a4", CONDITIONAL, {"images": IMAGES, "candidates": 2, "search_rows": 16}),
        # Learns a small network for each activation.
        Row("tdq", "w4a8", UNCONDITIONAL, {"rows": 32, "fit_iterations": 2}),
        # Trains the whole network with them.
        Row("tdq_qat", "w4a8", UNCONDITIONAL, {"rows": 32, "fit_iterations": 2, "iterations": 2, "batch": 8}),
    )
}


@dataclass(frozen=True)
class Memory:
    """Bytes that a row was planned to hold at most, and that it held."""

    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """Planned over measured."""
        return self.planned / self.measured

    @property
    def agrees(self) -> bool:
        """Whether they are as near as planning claims."""
        return abs(self.ratio - 1) <= MOST_OFF


def measure(row: Row, device: torch.device) -> Memory:
    """Plan a row, then quantise. In a process that does nothing else, since what it holds otherwise would count too."""
    torch.set_num_threads(1)
    shapes = _known(row.network)
    on_meta = shapes.random_pool(IMAGES, SamplingSettings(STEPS), torch.device("meta"))
    planned = plan_cost(shapes.unet, Precision.parse(row.precision), row.recipe, on_meta).held
    if planned is None:
        raise ValueError(f"{row.method} does not say what it holds: give each of its passes a `memory`")
    widths = (SMALL,) * len(row.network["block_out_channels"])
    small = row.network | {"block_out_channels": widths}
    _quantize(row, small, device)
    return Memory(planned, _quantize(row, row.network, device))


def _known(network: Mapping[str, object]) -> KnownNetwork:
    timesteps = torch.linspace(1, 901, STEPS).to(torch.int64).flip(0)
    return KnownNetwork(build(network, torch.device("meta")), timesteps, TOKENS)


def _quantize(row: Row, settings: Mapping[str, object], device: torch.device) -> float:
    """Quantise a network with random weights; returns the bytes that this took at most, the network among them."""
    generator = torch.Generator(device).manual_seed(0)
    pool = _known(settings).random_pool(IMAGES, SamplingSettings(STEPS), device, generator)
    restart_peak(device)
    before = peak_memory(device)
    network = build(settings, device)
    quantize_(network, Precision.parse(row.precision), row.recipe, pool, torch.Generator().manual_seed(0))
    return (peak_memory(device) - before) * MIB


def table(found: Mapping[str, Memory]) -> str:
    """Markdown: a line a row."""
    lines = {
        "Row": [f"{name}, {ROWS[name].precision}" for name in found],
        "Planned (MiB)": [f"{memory.planned / MIB:,.0f}" for memory in found.values()],
        "Measured (MiB)": [f"{memory.measured / MIB:,.0f}" for memory in found.values()],
        "Planned / measured": [f"{memory.ratio:.2f}" for memory in found.values()],
    }
    align = ["left", "right", "right", "right"]
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True, colalign=align)


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upkeep.memory", description=__doc__)
    parser.add_argument("--row", nargs="+", default=list(ROWS), choices=tuple(ROWS), help="(default: all)")
    device = device_of(os.environ.get(DEVICE_VARIABLE, "auto"))
    found = {}
    for name in parser.parse_args(arguments).row:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            found[name] = process.submit(measure, ROWS[name], device).result()
    print(table(found))
    return 0 if all(memory.agrees for memory in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
