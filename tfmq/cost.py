"""Estimate the cost of a quantisation before running it: evaluations, optimiser steps and memory, pass by pass.

Each pass counts its own cost from shapes alone: the network is on the meta device. Memory is an estimate. It counts the
networks, the rows that wait between two blocks, and what the most demanding block needs while it is learned or
evaluated, for which that block runs on the meta device; what kernels and the allocator use is a guess.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tfmq.network.backbone import Backbone, Block, Network, backbone_of, full_precision_bytes
from tfmq.network.calibration import CalibrationRows, CalibrationSet
from tfmq.network.offload import BlockStream, Place, stream_bytes
from tfmq.passes import Cost, Memory, Recipe
from tfmq.plan import SHARED, Protocol, QuantizationPlan, amended_plan, insert_quantizers, quantized_layers
from tfmq.precision import Precision

Measure = Callable[[BlockStream, Block], int]
# Tensors of the largest size that coexist with these: gradients, and the workspace of kernels.
WORKING_TENSORS = 3


@dataclass(frozen=True)
class Planned:
    """What a quantisation will cost.

    Attributes:
        costs: of each pass, in order, with its name.
        networks: bytes of the full-precision network, the quantised one and its codes.
        memories: of each pass, None where that is not known; empty if memory was not asked for.
    """

    costs: tuple[tuple[str, Cost], ...]
    networks: int
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
            else self.networks + max((memory.held for memory in self._memories), default=0)
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
        network: with quantised layers in place, on the meta device.
        backbone, plan, precision: of it.
        pool: its time steps and shapes; its latents may be on the meta device.
        rounded: paths of the layers whose weights are rounded.
        tabulated: paths of layers and attentions whose activations have a table over time steps.
        calibrated: whether all activations have ranges.
    """

    network: Network
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

    def waiting(self, rows: CalibrationRows) -> int:
        """Peak bytes that ``rows`` keep in one stream between two blocks."""
        return stream_bytes(self.network, self.backbone, _on_meta(rows, 1)) * len(rows)

    def largest(self, rows: CalibrationRows, batch: int, measure: Measure) -> int:
        """The most that ``measure(stream, block)`` finds at any block that ``batch`` of the rows pass at once."""
        rows = _on_meta(rows, min(batch, len(rows)))
        stream = BlockStream(self.network, self.backbone, rows, len(rows), Place(self.network.device))
        most = 0
        with _FusedAttention():
            for block in self.backbone.blocks:
                most = max(most, measure(stream, block))
                stream.advance(block, stream.outputs(block, stream.inputs(block)))
        return most


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
    twin = copy.deepcopy(network)
    insert_quantizers(twin, plan)
    for layer in quantized_layers(twin).values():
        layer.ranged = True  # as each will be when it is learned
    shapes = Shapes(twin, backbone, plan, precision, pool)
    generator = torch.Generator()
    drawn = [step.draw(pool, generator) for step in recipe]
    costs, memories = [], []
    for step, rows in zip(recipe, drawn, strict=True):
        if memory:
            memories.append(step.memory(shapes, rows))
        costs.append((step.name, step.cost(shapes, rows)))
    codes = sum(layer.weight.numel() for layer in quantized_layers(twin).values())
    return Planned(tuple(costs), 2 * full_precision_bytes(network) + codes, tuple(memories))


def units_of(backbone: Backbone, paths: Iterable[str]) -> int:
    """How many of the time-embedding layers, and of the blocks, are or hold any of ``paths``."""
    embedding = set(backbone.time_embedding) & set(paths)
    rest = set(paths) - embedding
    return len(embedding) + sum(any(block.holds(path) for path in rest) for block in backbone.blocks)


def evaluation_bytes(stream: BlockStream, block: Block) -> int:
    """Bytes that evaluating a block takes: the batch, and WORKING_TENSORS times the largest output of a layer."""
    sizes = [0]
    inputs = stream.inputs(block)
    with torch.no_grad(), _watched(stream.network.get_submodule(block.path), sizes):
        output = stream.evaluate(stream.network, block, inputs, slice(None))
    return sum(part.nbytes for part in inputs) + output.nbytes + WORKING_TENSORS * max(sizes)


def backward_bytes(network: Network, loss: Callable[[], Tensor], own: Iterable[Tensor] = ()) -> int:
    """Bytes that the backward pass of ``loss()`` needs, besides the network's parameters and the learner's ``own``."""
    known = {tensor.untyped_storage()._cdata for tensor in (*own, *network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    found = sum(saved.values()) + WORKING_TENSORS * max(saved.values(), default=0)
    del value
    return found


class _FusedAttention(TorchFunctionMode):
    """Attention in floating point without its matrix of probabilities, as CPUs and GPUs compute it.

    The meta device has the unfused form alone.
    """

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return function(*args, **(kwargs or {}))


def _on_meta(rows: CalibrationRows, count: int) -> CalibrationRows:
    return rows[:count].to(torch.device("meta"))


@contextmanager
def _watched(module: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Append to ``sizes`` the bytes that each layer below ``module`` puts out."""

    def note(layer: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    handles = [layer.register_forward_hook(note) for layer in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
