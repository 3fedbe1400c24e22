"""Estimate the cost of a quantisation before running it: evaluations, optimiser steps and memory, pass by pass.

Each pass counts its own cost from shapes alone: the network is on the meta device, and memory is that of the tensors
which live there at once while it is evaluated and learned (`tfmq.live_bytes`). That is an estimate: of what kernels
take for themselves only the copies of a convolution are counted, and nothing of the allocator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tfmq.live_bytes import FusedAttention, LiveBytes
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Backbone, Block, Network, backbone_of, full_precision_bytes
from tfmq.network.calibration import CalibrationSet
from tfmq.network.number_types import in_float32, pool_in_float32
from tfmq.network.offload import BlockStream, Place, waiting_bytes
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Memory, Recipe
from tfmq.plan import SHARED, Protocol, QuantizationPlan, amended_plan, insert_quantizers, quantized_layers
from tfmq.precision import Precision

Measure = Callable[[BlockStream, Block], int]


@dataclass(frozen=True)
class Planned:
    """What a quantisation will cost.

    Attributes:
        costs: of each pass, in order, with its name.
        networks: bytes of the full-precision network, and of the quantised one with its codes, groups and branches.
        rows: bytes of the calibration rows of all passes, which are drawn before the first one.
        memories: of each pass, None where that is not known; empty if memory was not asked for.
    """

    costs: tuple[tuple[str, Cost], ...]
    networks: int
    rows: int = 0
    memories: tuple[Memory | None, ...] = ()

    @property
    def cost(self) -> Cost:
        """Of all passes together."""
        return sum((cost for _, cost in self.costs), Cost())

    @property
    def held(self) -> int | None:
        """Most bytes that are held in memory at once; None where that is not known."""
        return (
            None
            if self._memories is None
            else self.networks + self.rows + max((memory.held for memory in self._memories), default=0)
        )

    @property
    def on_disk(self) -> int | None:
        """Most bytes of rows that wait on a disk meanwhile; None where that is not known."""
        known = self._memories
        return None if known is None else max((memory.on_disk for memory in known), default=0)

    @property
    def _memories(self) -> list[Memory] | None:
        if len(self.memories) < len(self.costs):
            raise ValueError("memory was not planned: call plan_cost with memory=True")
        known = [memory for memory in self.memories if memory is not None]
        return known if len(known) == len(self.memories) else None


@dataclass
class Shapes:
    """What passes count from, and what the passes before have left behind.

    Attributes:
        network: with quantised layers in place, on the meta device; weights have ranges and are not rounded yet.
        full: the full-precision network, likewise.
        backbone, plan, precision: of it.
        pool: its time steps and shapes; its latents may be on the meta device.
        rounded: paths of the layers whose weights are rounded.
        tabulated: paths of layers and attentions whose activations have a table over time steps.
        calibrated: whether all activations have ranges.
    """

    network: Network
    full: Network
    backbone: Backbone
    plan: QuantizationPlan
    precision: Precision
    pool: CalibrationSet
    rounded: set[str] = field(default_factory=set)
    tabulated: set[str] = field(default_factory=set)
    calibrated: bool = False

    @property
    def unrounded(self) -> set[str]:
        """Paths of the quantised layers whose weights no pass has rounded yet."""
        return set(self.plan.layers) - self.rounded

    @property
    def calibrates(self) -> bool:
        """Whether there are activations whose ranges come from calibration rows."""
        dynamic = any(layer.dynamic for layer in self.plan.layers.values())
        return self.precision.quantizes_activations and not dynamic

    def stream(self, rows: CalibrationRows, batch: int, network: Network | None = None) -> BlockStream:
        """At most ``batch`` of the rows before the first block of ``network``, by default the quantised one."""
        few = _on_meta(rows, min(batch, len(rows)))
        return BlockStream(network or self.network, self.backbone, few, len(few), Place(self.network.device))

    def waiting(self, rows: CalibrationRows) -> list[int]:
        """Bytes that ``rows`` keep in one stream while each block is worked on."""
        return [each * len(rows) for each in waiting_bytes(self.network, self.backbone, _on_meta(rows, 1))]

    def of_blocks(self, rows: CalibrationRows, batch: int, measure: Measure) -> list[int]:
        """What ``measure(stream, block)`` finds at each block that ``batch`` of the rows pass at once."""
        stream, found = self.stream(rows, batch), []
        with FusedAttention():
            for block in self.backbone.blocks:
                found.append(measure(stream, block))
                stream.advance(block, stream.outputs(block, stream.inputs(block)))
        return found

    def evaluated(self, rows: CalibrationRows, batch: int, network: Network | None = None) -> int:
        """What evaluating the whole network on ``batch`` of the rows takes."""
        stream = self.stream(rows, batch, network)
        with FusedAttention(), torch.no_grad(), LiveBytes() as live:
            run_through(stream)
        return live.most

    def of_largest_layer(self, action: Callable[[QuantizedLayer], object]) -> int:
        """What ``action`` takes on the quantised layer whose weight is the largest."""
        layer = max(quantized_layers(self.network).values(), key=lambda layer: layer.weight.numel())
        with torch.no_grad(), LiveBytes() as live:
            action(layer)
        restore_unrounded(layer)
        return live.most


def plan_cost(
    network: Network,
    precision: Precision,
    recipe: Recipe,
    pool: CalibrationSet,
    protocol: Protocol = SHARED,
    memory: bool = True,
) -> Planned:
    """What ``quantize_`` with these arguments will cost.

    ``network`` is on the meta device and stays as it is. Raises ValueError for a network with weights.
    """
    if network.device.type != "meta":
        raise ValueError(f"cost is planned for a network on the meta device, and this one is on {network.device}")
    backbone = backbone_of(network)
    plan = amended_plan(network, backbone, precision, recipe, protocol)
    given, network, pool = network, in_float32(network), pool_in_float32(pool)
    twin = copy.deepcopy(network).requires_grad_(False)
    insert_quantizers(twin, plan)
    for layer in quantized_layers(twin).values():
        restore_unrounded(layer)
    networks = full_precision_bytes(network) + _quantized_bytes(twin)
    if given is not network:  # which is kept beside them until it is known that nothing fails
        networks += sum(parameter.nbytes for parameter in given.parameters())
    shapes = Shapes(twin, network, backbone, plan, precision, pool)
    generator = torch.Generator()
    drawn = [step.draw(pool, generator) for step in recipe]
    costs, memories = [], []
    for step, rows in zip(recipe, drawn, strict=True):
        if memory:
            memories.append(step.memory(shapes, rows))
        costs.append((step.name, step.cost(shapes, rows)))
    held = sum(_rows_bytes(rows) for rows in drawn if rows is not None)
    return Planned(tuple(costs), networks, held, tuple(memories))


def units_of(backbone: Backbone, paths: Iterable[str]) -> int:
    """How many of the layers of embeddings, and of the blocks, are or hold any of ``paths``."""
    embedding = set(backbone.embedding) & set(paths)
    rest = set(paths) - embedding
    return len(embedding) + sum(any(block.holds(path) for path in rest) for block in backbone.blocks)


def run_through(stream: BlockStream) -> Tensor:
    """The prediction for all rows of a stream at once, with the gradients that are asked for."""
    for block in stream.backbone.blocks:
        stream.advance(block, stream.evaluate(stream.network, block, stream.inputs(block), slice(None)))
    return stream.hidden


def evaluation_bytes(stream: BlockStream, block: Block) -> int:
    """Bytes that evaluating a block on all rows of a stream takes, besides these."""
    inputs = stream.inputs(block)
    with torch.no_grad(), LiveBytes() as live:
        stream.evaluate(stream.network, block, inputs, slice(None))
    return live.most


def restore_unrounded(layer: QuantizedLayer) -> None:
    """Let a layer on the meta device have a range and no codes, as each has before it is learned."""
    layer.ranged, layer.codes, layer.rounding = True, None, None


def _quantized_bytes(network: Network) -> int:
    codes = sum(layer.weight.numel() for layer in quantized_layers(network).values())
    return codes + sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def _rows_bytes(rows: CalibrationRows) -> int:
    return sum(part.nbytes for part in rows.tensors.values())


def _on_meta(rows: CalibrationRows, count: int) -> CalibrationRows:
    return rows[:count].to(torch.device("meta"))
