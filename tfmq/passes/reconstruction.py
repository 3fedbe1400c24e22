"""Learning roundings and step sizes so that a part of the network reproduces its full-precision output.

One loop each for roundings and step sizes serves single layers, blocks and the temporal information block. Blocks are
fed by `tfmq.network.offload`, and what is learned goes through `tfmq.journal`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tfmq.journal import Effort, learn_unit
from tfmq.modules.fake_quantize import FakeQuantize
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.calibration import CalibrationRows
from tfmq.network.offload import BlockStream, place_for
from tfmq.network.unet import UNet, UNetLayout, time_features
from tfmq.numerics.rounding import annealed_beta
from tfmq.plan import activation_quantizers, quantized_layers
from tfmq.settings import check_counts, check_numbers, check_positive


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
    prediction = predict(index)
    return reconstruction_loss(prediction, targets[index].to(prediction.device), norm)


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


def learn_roundings(
    name: str,
    layers: Mapping[str, QuantizedLayer],
    loss: Loss,
    rows: int,
    config: RoundingConfig,
    generator: torch.Generator,
    effort: Effort,
) -> None:
    """Learn the rounding of ``layers`` as one unit, on random batches of so many ``rows``, and fold them."""

    def learn() -> list[float]:
        batches = random_batches(rows, config.batch, config.iterations, generator)
        return learn_rounding(list(layers.values()), loss, batches, config)

    def learned() -> dict[str, Tensor]:
        return {path: layer.codes for path, layer in layers.items()}

    def restore(codes: dict[str, Tensor]) -> None:
        for path, layer in layers.items():
            layer.load_codes(codes[path].to(layer.weight.device))

    learn_unit(name, learn, learned, restore, generator, effort)


def learn_scales(
    name: str,
    quantizers: Mapping[str, FakeQuantize],
    loss: Loss,
    rows: int,
    config: StepSizeConfig,
    generator: torch.Generator,
    effort: Effort,
) -> None:
    """Learn the scales of ``quantizers`` as one unit, on random batches of so many ``rows``."""

    def learn() -> list[float]:
        batches = random_batches(rows, config.batch, config.iterations, generator)
        return learn_step_sizes(list(quantizers.values()), loss, batches, config)

    def learned() -> dict[str, Tensor]:
        return {path: quantizer.scale for path, quantizer in quantizers.items()}

    def restore(scales: dict[str, Tensor]) -> None:
        for path, quantizer in quantizers.items():
            quantizer.scale = scales[path].to(quantizer.scale.device)

    learn_unit(name, learn, learned, restore, generator, effort)


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
    place = place_for(full, layout, rows, 2, memory_bytes)
    for path in layout.time_embedding:
        layers = _unfolded(unet, path)
        if layers:
            inputs, targets = _time_layer_data(unet, full, path, rows.timesteps.unique())
            loss = partial(_loss, partial(_evaluate_layer, layers[path], inputs), targets, config.norm)
            learn_roundings(f"weights-{path}", layers, loss, len(inputs), config, generator, effort)
    reference, stream = BlockStream(full, rows, batch, place), BlockStream(unet, rows, batch, place)
    for block in tqdm(layout.blocks, desc="weights", disable=None):
        targets = reference.outputs(block, reference.inputs(block))
        reference.advance(block, targets)
        inputs = stream.inputs(block)
        layers = _unfolded(unet, block.path)
        if layers:
            loss = partial(_loss, partial(stream.evaluate, unet, block, inputs), targets, config.norm)
            learn_roundings(f"weights-{block.path}", layers, loss, len(rows), config, generator, effort)
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
    place = place_for(full, layout, rows, 1, memory_bytes)
    for path in layout.time_embedding:
        quantizers = _learnable(unet, path)
        if quantizers:
            inputs, targets = _time_layer_data(full, full, path, rows.timesteps.unique())
            layer = unet.get_submodule(path)
            loss = partial(_loss, partial(_evaluate_layer, layer, inputs), targets, config.norm)
            learn_scales(f"activations-{path}", quantizers, loss, len(inputs), config, generator, effort)
    reference = BlockStream(full, rows, batch, place)
    for block in tqdm(layout.blocks, desc="activations", disable=None):
        inputs = reference.inputs(block)
        targets = reference.outputs(block, inputs)
        quantizers = _learnable(unet, block.path)
        if quantizers:
            loss = partial(_loss, partial(reference.evaluate, unet, block, inputs), targets, config.norm)
            learn_scales(f"activations-{block.path}", quantizers, loss, len(rows), config, generator, effort)
        reference.advance(block, targets)
    effort.unet_evaluations += len(rows)


def _unfolded(unet: UNet, path: str) -> dict[str, QuantizedLayer]:
    """The quantised layers at or below ``path`` whose weights are not rounded yet, by path in ``unet``."""
    return {name: layer for name, layer in _below(path, quantized_layers(unet)) if layer.codes is None}


def _learnable(unet: UNet, path: str) -> dict[str, FakeQuantize]:
    """The quantisers at or below ``path`` that have one scale for all steps, by path in ``unet``."""
    return {name: q for name, q in _below(path, activation_quantizers(unet)) if q.enabled and not q.per_step}


def _below(path: str, parts: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in parts.items() if name == path or name.startswith(f"{path}.")]


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
