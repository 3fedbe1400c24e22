"""Quantised tiny networks, and how an exported one compares with its simulation."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch

from baselines import recipe_under
from benchmarks.suite import discover
from tests.baselines.test_contract import small
from tests.tfmq import networks
from tests.tfmq.export.kernels import SATURATES, difference
from tests.tfmq.network import test_transformer as transformers
from tfmq.export.description import InputShape
from tfmq.export.kernels import TABLE, Kernel
from tfmq.export.openvino import export_openvino
from tfmq.export.runner import ExportedNetwork
from tfmq.network.backbone import backbone_of, evaluate
from tfmq.plan import SHARED
from tfmq.precision import Precision
from tfmq.quantization import quantize_

SHAPE = InputShape(batch=4, height=8, width=8, tokens=5)


@cache
def quantized(method, precision, protocol=SHARED.name, kind="unconditional"):
    """A tiny network, quantised, in full precision, and the pool."""
    found = discover.method(method)
    if kind == "transformer":
        network = transformers.transformer()
        pool = transformers.pool(network)
    else:
        network = networks.KINDS[kind].build()
        pool = networks.KINDS[kind].pool(network)
    full = copy.deepcopy(network)
    recipe = recipe_under(protocol, small(found))
    quantize_(network, Precision.parse(precision), recipe, pool, networks.generator(), found.protocol(protocol))
    return network, full, pool


def check_executed(method: str, precision: str, protocol: str, kind: str, folder: Path) -> list[Kernel]:
    """Export a network, and compare its predictions with the simulated ones at all time steps."""
    network, full, pool = quantized(method, precision, protocol, kind)
    found = export_openvino(network, folder, SHAPE, pool.timesteps)
    layers = [row for row in found if row.kind != TABLE]
    assert len(layers) > 20 and all(row.integer and not row.reason for row in layers)
    assert {row.path for row in found if row.kind == TABLE} == set(backbone_of(full).time_projections)
    run = ExportedNetwork(folder, threads=1)
    x = networks.noise(4)
    condition = backbone_of(full).random_condition(full, 4, SHAPE.tokens, full.device, networks.generator())
    errors, cost = [], []
    for step in pool.timesteps.unique():
        with torch.no_grad():
            simulated, exact = (evaluate(each, x, step, condition) for each in (network, full))
        errors.append(difference(evaluate(run, x, step, condition), simulated))
        cost.append(difference(simulated, exact))
    # A value half-way between two codes may fall to either side, and later layers see the other code.
    assert SATURATES or sum(errors) < sum(cost) / 2
    assert not any(path.name.startswith(".") for path in folder.iterdir())
    return found
