"""How much faster does a network run in integers? Float32, simulated and executed networks, one after the other.

`python -m benchmarks.upkeep.speed data/emoji-ldm4/unet` prints seconds for one evaluation of a batch and the ratios of
the three. Networks take turns, and each evaluates `--evaluations` times in a row, as sampling does, so that what else
the machine does meets them alike. A folder holds a network of diffusers; `stable-diffusion` stands for the UNet of
Stable Diffusion v1.4 with random weights. Weights are rounded to nearest, and ranges are those of one random batch:
speed does not depend on them. It does on the grids: 8-bit weights with zero points cost a sum of the input more than
those of `--deployable` grids.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.latency.timing import Interval
from benchmarks.runtime import environment
from tfmq.checkpoint import NETWORKS
from tfmq.execution import executed_coverage, executing
from tfmq.network.backbone import Network, backbone_of, evaluate
from tfmq.passes.deployable import Deployable, take_symmetric_weights
from tfmq.passes.grids import Grids
from tfmq.plan import SHARED, activation_quantizers, amended_plan, insert_quantizers, quantized_layers
from tfmq.precision import Precision

STABLE_DIFFUSION = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TOKENS = 77
TIMESTEP = 401


def load(source: str) -> Network:
    """The network in a folder, or Stable Diffusion's with random weights."""
    if source == "stable-diffusion":
        torch.manual_seed(0)
        return NETWORKS[str(STABLE_DIFFUSION["_class_name"])].from_config(STABLE_DIFFUSION).eval()
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    return NETWORKS[config["_class_name"]].from_pretrained(source).eval()


def inputs(network: Network, batch: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random latents, a time step, and a random condition of so many tokens."""
    generator = torch.Generator().manual_seed(0)
    side = network.config.sample_size
    latents = torch.randn(batch, network.config.in_channels, side, side, generator=generator)
    condition = backbone_of(network).random_condition(network, batch, tokens, latents.device, generator)
    return latents, torch.tensor(TIMESTEP), condition


@torch.no_grad()
def quantize_quickly(
    network: Network, precision: Precision, given: tuple[Tensor, Tensor, Tensor | None], deployable: bool = False
) -> None:
    """Quantise in place without a copy: weights to nearest in their extremes, activations in those of one batch."""
    network.requires_grad_(False)
    recipe = (*([Deployable()] if deployable else []), Grids(split_shortcuts=True))
    insert_quantizers(network, amended_plan(network, backbone_of(network), precision, recipe, SHARED))
    if deployable:
        take_symmetric_weights(network)
    for layer in quantized_layers(network).values():
        layer.find_weight_range("minmax")
        layer.fold()
    quantizers = activation_quantizers(network).values()
    for quantizer in quantizers:
        quantizer.observe()
    evaluate(network, *given)
    for quantizer in quantizers:
        quantizer.freeze()


@torch.no_grad()
def alternating(
    networks: dict[str, Network], given: tuple[Tensor, Tensor, Tensor | None], rounds: int, evaluations: int
) -> dict[str, list[float]]:
    """Seconds of an evaluation in each round, by network; one round before does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for index in range(rounds + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            for _ in range(evaluations):
                evaluate(network, *given)
            if index:
                seconds[name].append((time.perf_counter() - start) / evaluations)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Medians of seconds, and of the ratios of the rounds."""
    lines = [f"{name:10} {_text(values, ' s')}" for name, values in seconds.items()]
    executed = seconds["executed"]
    for name, values in seconds.items():
        if name != "executed":
            ratios = [mine / others for mine, others in zip(executed, values, strict=True)]
            lines.append(f"executed / {name}: {_text(ratios)}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upkeep.speed", description=__doc__)
    parser.add_argument("source", help="folder of a network of diffusers, or stable-diffusion")
    parser.add_argument("--precision", default="w8a8")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the condition of a network that takes one")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=20, help="in a row, by each network in each round")
    parser.add_argument("--deployable", action="store_true", help="take the grids that integer kernels execute")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-simulated", action="store_true", help="for large networks: it takes memory and time")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    quantized = load(options.source)
    given = inputs(quantized, options.batch, options.tokens)
    quantize_quickly(quantized, Precision.parse(options.precision), given, options.deployable)
    executed = executing(quantized)
    networks = {} if options.skip_simulated else {"simulated": quantized}
    del quantized
    networks |= {"float32": load(options.source), "executed": executed}
    described = environment.describe()
    grids = "deployable grids" if options.deployable else "grids of the papers"
    print(
        f"{options.source}, {options.precision}, {grids}, batches of {options.batch}, {options.rounds} rounds of "
        f"{options.evaluations} evaluations"
    )
    print(
        f"{described['cpu']} ({torch.backends.cpu.get_cpu_capability()}), {options.threads} threads, "
        f"torch {torch.__version__}, diffusers {described['versions']['diffusers']}"
    )
    print(table(alternating(networks, given, options.rounds, options.evaluations)))
    for (kind, kernel), count in sorted(Counter((row.kind, row.kernel) for row in executed_coverage(executed)).items()):
        print(f"{count:4} {kind}: {kernel}")


def _text(values: Sequence[float], unit: str = "") -> str:
    median = Interval.of(values)
    return f"{median.value:.3g}{unit} [{median.low:.3g}, {median.high:.3g}]"


if __name__ == "__main__":
    main(sys.argv[1:])
