"""Feeding the blocks of a network: all calibration rows wait between two blocks, and each block is evaluated once.

So one pass over the network serves all blocks, where restarting from the input for every block costs a number of
evaluations quadratic in depth. Full precision and quantised stream side by side. Where rows wait changes nothing of
what comes out; too many for the memory can wait on a disk (`tfmq.workspace`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tfmq.network.backbone import Backbone, Block, Network
from tfmq.network.conditioning import with_channels
from tfmq.network.rows import CalibrationRows
from tfmq.numerics.finite import all_finite
from tfmq.plan import announce_step
from tfmq.workspace import Allocate

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Place:
    """Where rows wait: the device, and the allocator to use there instead of torch's."""

    device: torch.device
    allocate: Allocate | None = None

    def empty(self, rows: int, part: Tensor) -> Tensor:
        """A tensor for so many rows like those of ``part`` (B, ...), in the same order of dimensions in memory."""
        images = part.dim() == 4
        last = images and part.is_contiguous(memory_format=torch.channels_last) and not part.is_contiguous()
        if self.allocate is None:
            order = torch.channels_last if last else torch.contiguous_format
            return torch.empty(rows, *part.shape[1:], dtype=part.dtype, device=self.device, memory_format=order)
        flat = self.allocate(rows * part[0].numel(), part.dtype)
        if last:
            _, channels, height, width = part.shape
            return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(rows, *part.shape[1:])


@dataclass
class BlockStream:
    """All calibration rows, waiting between two blocks of one network.

    Attributes:
        batch: rows evaluated at once.
        place: where rows wait.
        hidden: (N, ...), the hidden state.
        skips: the stack of skip connections, each (N, ...).
        time: what blocks take of each distinct time step, (S, ...); of each row, (N, ...), where conditions are in it.
        step: (N,), each row's position in ``time``.
    """

    network: Network
    backbone: Backbone
    rows: CalibrationRows
    batch: int
    place: Place
    hidden: Tensor = field(init=False)
    skips: list[Tensor] = field(default_factory=list)
    time: Tensor = field(init=False)
    step: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.hidden = with_channels(self.rows.latents, self.rows.inputs).to(self.place.device)
        with torch.no_grad():
            self.time, self.step = self.time_inputs()

    def time_inputs(self) -> tuple[Tensor, Tensor]:
        """``time`` and ``step``, computed by the network as it is now."""
        network, rows = self.network, self.rows
        if not self.backbone.condition_embedding:
            timesteps, step = rows.timesteps.unique(return_inverse=True)
            announce_step(network, timesteps)
            return self.backbone.time_input(network, timesteps.to(network.device)), step
        parts = []
        for batch in rows.batches(self.batch):
            announce_step(network, batch.timesteps)
            timesteps = batch.timesteps.to(network.device)
            parts.append(self.backbone.time_input(network, timesteps, batch.inputs))
        return torch.cat(parts), torch.arange(len(rows))

    def inputs(self, block: Block) -> Inputs:
        """The block's input for all rows: tensors that are concatenated along the channels, a batch at a time."""
        return (self.hidden, self.skips[-1]) if block.pop else (self.hidden,)

    def evaluate(self, network: Network, block: Block, inputs: Inputs, rows: Tensor | slice) -> Tensor:
        """Output of ``block`` of ``network`` for some rows of ``inputs``."""
        announce_step(network, self.rows.timesteps[rows])
        context = None if self.rows.context is None else self.rows.context[rows]
        # Where the network is; diffusers walks through all its modules to say so.
        device = self.time.device
        parts = [part[rows].to(device) for part in inputs]
        added = self.rows.inputs
        if block.pop_adds in added:
            parts[-1] = parts[-1] + added[block.pop_adds][rows]
        hidden = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        size = self.skips[-1].shape[2:] if self.skips else None
        output = self.backbone.run_block(network, block, hidden, self.time[self.step[rows]], context, size)
        for name in block.adds:
            # An adapter's residual for the middle block is left out where its shape is another one, as diffusers does.
            if name in added and added[name].shape[1:] == output.shape[1:]:
                output = output + added[name][rows]
        return output

    @torch.no_grad()
    def outputs(self, block: Block, inputs: Inputs) -> Tensor:
        """Output of the block for all rows. Raises ValueError if it holds NaN or infinity."""
        outputs = torch.empty(0)
        for start in range(0, len(self.rows), self.batch):
            rows = slice(start, start + self.batch)
            part = self.evaluate(self.network, block, inputs, rows)
            if not part.is_meta and not all_finite(part):
                raise ValueError(f"{block.path} puts out NaN or infinity on the calibration set")
            if start == 0:
                outputs = self.place.empty(len(self.rows), part)
            outputs[rows] = part
        return outputs

    def advance(self, block: Block, outputs: Tensor) -> None:
        """Make ``outputs`` the hidden state after ``block``."""
        if block.pop:
            self.skips.pop()
        if block.push:
            self.skips.append(outputs)
        self.hidden = outputs


def stream_bytes(network: Network, backbone: Backbone, row: CalibrationRows) -> int:
    """Peak bytes that one calibration row keeps in one stream, its current block's input and output included.

    A network and a row on the meta device will do.
    """
    return max(waiting_bytes(network, backbone, row))


def waiting_bytes(network: Network, backbone: Backbone, row: CalibrationRows) -> list[int]:
    """Bytes that one calibration row keeps in one stream while each block is worked on; see `stream_bytes`."""
    stream = BlockStream(network, backbone, row, 1, Place(network.device))
    found = []
    for block in backbone.blocks:
        outputs = stream.outputs(block, stream.inputs(block))
        # The hidden state may be the top of the stack.
        held = {id(tensor): tensor for tensor in (stream.hidden, *stream.skips, outputs)}
        found.append(sum(tensor.nbytes for tensor in held.values()))
        stream.advance(block, outputs)
    return found


def place_for(
    network: Network,
    backbone: Backbone,
    rows: CalibrationRows,
    streams: int,
    memory_bytes: int,
    allocate: Allocate | None,
) -> Place:
    """Where ``rows`` wait: with the network; in the host's memory where they would take half of a GPU's.

    More than ``memory_bytes`` wait in what ``allocate`` gives; without it, raises ValueError, saying how many rows fit.
    """
    per_row = streams * stream_bytes(network, backbone, rows[:1])
    needed, fitting = per_row * len(rows), memory_bytes // per_row
    host = torch.device("cpu")
    if needed > memory_bytes:
        if allocate is not None:
            return Place(host, allocate)
        fewer = f"use at most {fitting} rows or " if fitting else ""
        raise ValueError(
            f"{len(rows)} calibration rows need {needed:,} bytes ({needed / 2**30:.2f} GiB) between blocks, one row "
            f"{per_row:,}, and memory_bytes allows {memory_bytes:,}: {fewer}raise memory_bytes, or give a workspace "
            "that lets rows wait on a disk"
        )
    if network.device.type == "cuda" and needed > torch.cuda.mem_get_info(network.device)[0] // 2:
        return Place(host)
    return Place(network.device)
