"""How much memory a quantisation will take, said before it is done, from shapes alone.

Counted are the networks, the rows that wait between two blocks, and the block that takes most while it is learned or
evaluated; for that, blocks are run on the meta device. It is an estimate, within a few tenths: what kernels and the
allocator use is only guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tfmq.checkpoint import full_precision_bytes
from tfmq.network.calibration import CalibrationRows
from tfmq.network.offload import BlockStream, Place, stream_bytes
from tfmq.network.unet import Block, UNet, UNetLayout
from tfmq.passes.reconstruction import reconstruction_loss
from tfmq.plan import SHARED, Protocol, insert_quantizers, plan_for, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig

Measure = Callable[[BlockStream, Block], int]
# Tensors of a weight's shape while its rounding is learned: alpha, its gradient, Adam's two; floor, free scale, h,
# slope and the stretched sigmoid of AdaRound; the gradient of the rounded weight.
ROUNDING_TENSORS = 10
# Tensors of the largest size that are there at once besides: gradients on their way, or what kernels work on.
WORKING_TENSORS = 3


@dataclass(frozen=True)
class PlannedMemory:
    """Bytes that a quantisation holds at its peak.

    Attributes:
        networks: the full-precision UNet, the quantised one and its codes.
        waiting: the calibration rows between two blocks, all streams together. Where these would take half of a GPU's
            memory they are in the host's, and where more than ``memory_bytes``, on a disk (`tfmq.network.offload`).
        block: what the block that takes most takes.
    """

    networks: int
    waiting: int
    block: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.networks + self.waiting + self.block


def planned_memory(
    unet: UNet,
    precision: Precision,
    config: QuantizationConfig,
    rows: CalibrationRows,
    activation_rows: CalibrationRows,
    protocol: Protocol = SHARED,
) -> PlannedMemory:
    """What ``quantize_`` with these arguments will hold.

    ``unet`` is on the meta device and stays as it is; of the rows only shapes and counts matter. Raises ValueError for
    a network with weights.
    """
    if unet.device.type != "meta":
        raise ValueError(f"memory is planned for a network on the meta device, and this one is on {unet.device}")
    layout = UNetLayout.of(unet)
    twin = copy.deepcopy(unet)
    insert_quantizers(twin, plan_for(twin, layout, precision, protocol, config.split_shortcuts))
    codes = sum(layer.weight.numel() for layer in quantized_layers(twin).values())
    networks = 2 * full_precision_bytes(unet) + codes
    calibrates = precision.quantizes_activations and not config.dynamic_activations
    streams = 2 if config.rounding is not None else int(calibrates and config.step_sizes is not None)
    waiting = streams * stream_bytes(unet, layout, _on_meta(rows, 1)) * len(rows) if streams else 0
    block = 0
    if config.rounding is not None:
        block = _largest(twin, layout, _on_meta(rows, min(config.rounding.batch, len(rows))), _learning_bytes)
    if streams:
        block = max(block, _largest(twin, layout, _on_meta(rows, min(config.batch, len(rows))), _evaluation_bytes))
    if calibrates:
        observed = _on_meta(activation_rows, min(config.activation_batch, len(activation_rows)))
        block = max(block, _largest(twin, layout, observed, _evaluation_bytes))
    return PlannedMemory(networks, waiting, block)


def _on_meta(rows: CalibrationRows, count: int) -> CalibrationRows:
    return rows[:count].to(torch.device("meta"))


def _largest(unet: UNet, layout: UNetLayout, rows: CalibrationRows, measure: Measure) -> int:
    """The most that ``measure(stream, block)`` finds at any block that all ``rows`` pass at once."""
    stream = BlockStream(unet, rows, len(rows), Place(unet.device))
    most = 0
    with _FusedAttention():
        for block in layout.blocks:
            most = max(most, measure(stream, block))
            stream.advance(block, stream.outputs(block, stream.inputs(block)))
    return most


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


def _learning_bytes(stream: BlockStream, block: Block) -> int:
    """What learning the roundings of a block takes: their state, and what the backward pass needs."""
    layers = quantized_layers(stream.unet.get_submodule(block.path)).values()
    state = sum(ROUNDING_TENSORS * layer.weight.nbytes for layer in layers)
    own = {layer.learn_rounding() for layer in layers}
    inputs = stream.inputs(block)
    known = {tensor.untyped_storage()._cdata for rounding in own for tensor in (*rounding.buffers(), rounding.alpha)}
    known |= {tensor.untyped_storage()._cdata for tensor in stream.unet.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = stream.evaluate(stream.unet, block, inputs, slice(None))
        loss = reconstruction_loss(output, torch.empty_like(output), 2.0)
    found = state + sum(saved.values()) + WORKING_TENSORS * max(saved.values(), default=0)
    del loss
    for layer in layers:
        layer.rounding = None
    return found


def _evaluation_bytes(stream: BlockStream, block: Block) -> int:
    """What evaluating a block takes: the batch, and so many times the largest tensor that a layer puts out."""
    sizes = [0]
    inputs = stream.inputs(block)
    with torch.no_grad(), _watched(stream.unet.get_submodule(block.path), sizes):
        output = stream.evaluate(stream.unet, block, inputs, slice(None))
    return sum(part.nbytes for part in inputs) + output.nbytes + WORKING_TENSORS * max(sizes)


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
