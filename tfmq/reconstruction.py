"""Learning roundings and step sizes so that a part of the network reproduces its full-precision output.

One loop each for roundings and step sizes serves single layers, blocks and the temporal information block. Blocks are
fed by streaming: all calibration rows wait between two blocks, full-precision and quantised side by side, and each
block is evaluated once a stream. So one pass over the network serves all blocks, where restarting from the input for
every block costs a number of evaluations quadratic in depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tfmq.calibration import CalibrationRows
from tfmq.fake_quantize import FakeQuantize
from tfmq.layers import QuantizedLayer
from tfmq.plan import activation_quantizers, announce_step, quantized_layers
from tfmq.rounding import annealed_beta
from tfmq.settings import check_counts, check_numbers, check_positive
from tfmq.unet import Block, UNet, UNetLayout, run_block, time_features


@dataclass(frozen=True)
class RoundingConfig:
    """AdaRound's settings; the defaults are those of BRECQ, Q-Diffusion and TFMQ-DM."""

    iterations: int = 20_000
    batch: int = 32
    learning_rate: float = 1e-3
    regularizer_weight: float = 0.01
    warmup: float = 0.2
    norm: float = 2.0

    def __post_init__(self) -> None:
        check_counts(self, "iterations", "batch")
        check_positive(self, "learning_rate", "norm")
        check_numbers(self, "regularizer_weight", least=0)
        check_numbers(self, "warmup", least=0, most=1)


@dataclass(frozen=True)
class StepSizeConfig:
    """Settings of activation step-size learning; the defaults are Q-Diffusion's."""

    iterations: int = 5_000
    batch: int = 32
    learning_rate: float = 4e-4
    norm: float = 2.4

    def __post_init__(self) -> None:
        check_counts(self, "iterations", "batch")
        check_positive(self, "learning_rate", "norm")


@dataclass
class Effort:
    """What a quantisation has spent: sample evaluations of the whole UNet, and optimiser steps."""

    unet_evaluations: int = 0
    optimizer_steps: int = 0


Loss = Callable[[Tensor], Tensor]


def reconstruction_loss(prediction: Tensor, target: Tensor, norm: float) -> Tensor:
    """|prediction - target|^norm summed over dimension 1 and averaged over the others, as in BRECQ's released code."""
    return (prediction - target).abs().pow(norm).sum(1).mean()


def _finite(loss: Tensor) -> float:
    """The loss as a number. Raises ValueError for NaN or infinity, which would round every weight to one side."""
    value = loss.item()
    if not math.isfinite(value):
        raise ValueError("the reconstruction loss is NaN or infinite: lower the learning rate, or check the batch size")
    return value


def _loss(predict: Callable[[Tensor], Tensor], targets: Tensor, norm: float, index: Tensor) -> Tensor:
    return reconstruction_loss(predict(index), targets[index], norm)


def _evaluate_layer(layer: nn.Module, inputs: Tensor, index: Tensor) -> Tensor:
    return layer(inputs[index])


def random_batches(rows: int, batch: int, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row indices of each iteration's batch, drawn without repetition within a batch."""
    for _ in range(iterations):
        yield torch.randperm(rows, generator=generator)[:batch]


def learn_rounding(
    layers: Sequence[QuantizedLayer], loss: Loss, batches: Iterator[Tensor], config: RoundingConfig
) -> list[float]:
    """Learn the rounding of ``layers`` on ``loss(row indices)``, then fold them; returns the loss at each iteration."""
    roundings = [layer.learn_rounding() for layer in layers]
    optimizer = torch.optim.Adam([rounding.alpha for rounding in roundings], lr=config.learning_rate, fused=True)
    trace = []
    with torch.enable_grad():
        for iteration, rows in enumerate(batches, 1):
            value = loss(rows)
            trace.append(_finite(value))
            optimizer.zero_grad()
            value.backward()
            beta = annealed_beta(iteration, config.iterations, config.warmup)
            if beta is not None:
                for rounding in roundings:
                    rounding.add_penalty_gradient(config.regularizer_weight, beta)
            optimizer.step()
    for layer in layers:
        layer.fold()
    return trace


def learn_step_sizes(
    quantizers: Sequence[FakeQuantize], loss: Loss, batches: Iterator[Tensor], config: StepSizeConfig
) -> list[float]:
    """Learn the scales of ``quantizers`` (zero points stay) on ``loss(row indices)``, cosine-annealed to 0.

    A scale that the optimiser would take to 0 or below ends at its start.
    """
    starts = [quantizer.scale for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.scale = quantizer.scale.clone().requires_grad_()
    optimizer = torch.optim.Adam([quantizer.scale for quantizer in quantizers], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iterations, eta_min=0.0)
    trace = []
    with torch.enable_grad():
        for rows in batches:
            value = loss(rows)
            trace.append(_finite(value))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    for quantizer, start in zip(quantizers, starts, strict=True):
        learned = quantizer.scale.detach()
        quantizer.scale = torch.where(learned > 0, learned, start)
    return trace


@dataclass
class BlockStream:
    """All calibration rows, waiting between two blocks of one UNet.

    Attributes:
        hidden: (N, C, H, W), the hidden state.
        skips: the stack of skip connections, each (N, C, H, W).
        embedding: time embedding of each distinct time step, (S, D).
        step: (N,), each row's position in ``timesteps``.
        batch: rows evaluated at once.
    """

    unet: UNet
    rows: CalibrationRows
    batch: int
    hidden: Tensor = field(init=False)
    skips: list[Tensor] = field(default_factory=list)
    embedding: Tensor = field(init=False)
    step: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.hidden = self.rows.latents
        timesteps, self.step = self.rows.timesteps.unique(return_inverse=True)
        announce_step(self.unet, timesteps)
        with torch.no_grad():
            self.embedding = time_features(self.unet, timesteps.to(self.hidden.device))

    def inputs(self, block: Block) -> Tensor:
        """The block's input for all rows."""
        return torch.cat([self.hidden, self.skips[-1]], 1) if block.pop else self.hidden

    def evaluate(self, unet: UNet, block: Block, inputs: Tensor, rows: Tensor | slice) -> Tensor:
        """Output of ``block`` of ``unet`` for some rows of ``inputs``."""
        announce_step(unet, self.rows.timesteps[rows])
        context = None if self.rows.context is None else self.rows.context[rows]
        return run_block(unet, block, inputs[rows], self.embedding[self.step[rows]], context)

    @torch.no_grad()
    def outputs(self, block: Block, inputs: Tensor) -> Tensor:
        """Output of the block for all rows. Raises ValueError if it holds NaN or infinity."""
        parts = [
            self.evaluate(self.unet, block, inputs, slice(start, start + self.batch))
            for start in range(0, len(self.rows), self.batch)
        ]
        outputs = torch.cat(parts)
        if not torch.isfinite(outputs).all():
            raise ValueError(f"{block.path} puts out NaN or infinity on the calibration set")
        return outputs

    def advance(self, block: Block, outputs: Tensor) -> None:
        """Make ``outputs`` the hidden state after ``block``."""
        if block.pop:
            self.skips.pop()
        if block.push:
            self.skips.append(outputs)
        self.hidden = outputs


def stream_bytes(unet: UNet, layout: UNetLayout, row: CalibrationRows) -> int:
    """Peak bytes that one calibration row keeps in one stream, its current block's input and output included."""
    stream = BlockStream(unet, row, batch=1)
    peak = 0
    for block in layout.blocks:
        inputs = stream.inputs(block)
        outputs = stream.outputs(block, inputs)
        # Outputs count twice, since they are put together from batches; the others may be one and the same tensor.
        held = {tensor.data_ptr(): tensor for tensor in (inputs, stream.hidden, *stream.skips)}
        peak = max(peak, sum(tensor.nbytes for tensor in held.values()) + 2 * outputs.nbytes)
        stream.advance(block, outputs)
    return peak


def check_memory(unet: UNet, layout: UNetLayout, rows: CalibrationRows, streams: int, memory_bytes: int) -> None:
    """Raise ValueError if streaming ``rows`` would hold more than ``memory_bytes``, saying how many rows fit."""
    per_row = streams * stream_bytes(unet, layout, rows[:1])
    needed, fitting = per_row * len(rows), memory_bytes // per_row
    if needed > memory_bytes:
        fewer = f"use at most {fitting} rows or " if fitting else ""
        raise ValueError(
            f"{len(rows)} calibration rows need {needed:,} bytes ({needed / 2**30:.2f} GiB) between blocks, one row "
            f"{per_row:,}, and memory_bytes allows {memory_bytes:,}: {fewer}raise memory_bytes"
        )


def reconstruct_weights(
    unet: UNet,
    full: UNet,
    layout: UNetLayout,
    rows: CalibrationRows,
    config: RoundingConfig,
    generator: torch.Generator,
    effort: Effort,
    *,
    batch: int,
    memory_bytes: int,
) -> None:
    """Learn the roundings of all layers not folded yet: first the time-embedding layers, then block by block.

    Inputs come from the network quantised so far, targets from ``full``; activations are not quantised (the weight pass
    of BRECQ as Q-Diffusion and TFMQ-DM run it).
    """
    check_memory(full, layout, rows, 2, memory_bytes)
    layers = quantized_layers(unet)
    for path in layout.time_embedding:
        layer = layers.get(path)
        if layer is not None and layer.codes is None:
            inputs, targets = _time_layer_data(unet, full, path, rows.timesteps.unique())
            loss = partial(_loss, partial(_evaluate_layer, layer, inputs), targets, config.norm)
            batches = random_batches(len(inputs), config.batch, config.iterations, generator)
            effort.optimizer_steps += len(learn_rounding([layer], loss, batches, config))
    reference, stream = BlockStream(full, rows, batch), BlockStream(unet, rows, batch)
    for block in tqdm(layout.blocks, desc="weights", disable=None):
        targets = reference.outputs(block, reference.inputs(block))
        inputs = stream.inputs(block)
        layers = [layer for layer in quantized_layers(unet.get_submodule(block.path)).values() if layer.codes is None]
        if layers:
            loss = partial(_loss, partial(stream.evaluate, unet, block, inputs), targets, config.norm)
            batches = random_batches(len(rows), config.batch, config.iterations, generator)
            effort.optimizer_steps += len(learn_rounding(layers, loss, batches, config))
        reference.advance(block, targets)
        stream.advance(block, stream.outputs(block, inputs))
    effort.unet_evaluations += 2 * len(rows)


def reconstruct_activations(
    unet: UNet,
    full: UNet,
    layout: UNetLayout,
    rows: CalibrationRows,
    config: StepSizeConfig,
    generator: torch.Generator,
    effort: Effort,
    *,
    batch: int,
    memory_bytes: int,
) -> None:
    """Learn the activation step sizes of frozen quantisers: time-embedding layers, then block by block.

    Inputs and targets both come from ``full``, as in Q-Diffusion's released activation pass. Tables stay as they are.
    """
    check_memory(full, layout, rows, 1, memory_bytes)
    layers = quantized_layers(unet)
    for path in layout.time_embedding:
        layer = layers.get(path)
        quantizers = [] if layer is None else _learnable(layer)
        if quantizers:
            inputs, targets = _time_layer_data(full, full, path, rows.timesteps.unique())
            loss = partial(_loss, partial(_evaluate_layer, layer, inputs), targets, config.norm)
            batches = random_batches(len(inputs), config.batch, config.iterations, generator)
            effort.optimizer_steps += len(learn_step_sizes(quantizers, loss, batches, config))
    reference = BlockStream(full, rows, batch)
    for block in tqdm(layout.blocks, desc="activations", disable=None):
        inputs = reference.inputs(block)
        targets = reference.outputs(block, inputs)
        quantizers = _learnable(unet.get_submodule(block.path))
        if quantizers:
            loss = partial(_loss, partial(reference.evaluate, unet, block, inputs), targets, config.norm)
            batches = random_batches(len(rows), config.batch, config.iterations, generator)
            effort.optimizer_steps += len(learn_step_sizes(quantizers, loss, batches, config))
        reference.advance(block, targets)
    effort.unet_evaluations += len(rows)


def _learnable(module: nn.Module) -> list[FakeQuantize]:
    return [q for q in activation_quantizers(module).values() if q.enabled and not q.per_step]


@torch.no_grad()
def _time_layer_data(unet: UNet, full: UNet, path: str, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (S, D_in) of a time-embedding layer in ``unet`` and its outputs (S, D_out) in ``full``, step by step."""
    seen: dict[str, Tensor] = {}
    hooks = [
        unet.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.update(inputs=args[0])),
        full.get_submodule(path).register_forward_hook(lambda module, args, output: seen.update(targets=output)),
    ]
    try:
        for network in (unet, full):
            time_features(network, timesteps.to(network.device))
    finally:
        for hook in hooks:
            hook.remove()
    return seen["inputs"], seen["targets"]
