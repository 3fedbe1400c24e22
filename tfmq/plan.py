"""Which layers of a UNet are quantised at how many bits, and putting the quantised layers in place."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tfmq.fake_quantize import FakeQuantize, StepTracker
from tfmq.layers import QuantizedAttention, QuantizedLayer, quantized_layer
from tfmq.precision import FULL, Precision
from tfmq.unet import UNet, UNetLayout

BOUNDARY_BITS = 8


@dataclass(frozen=True)
class LayerPlan:
    """Bits of one Conv2d or Linear (32: not quantised), and sizes of the channel groups with ranges of their own."""

    weight_bits: int
    activation_bits: int
    splits: tuple[int, ...] = ()
    symmetric: bool = False


@dataclass(frozen=True)
class AttentionPlan:
    """Bits of query, key and value, and of the probabilities."""

    activation_bits: int
    softmax_bits: int
    symmetric: bool = False


@dataclass(frozen=True)
class QuantizationPlan:
    """Treatment of each layer and attention module, by path; what is not listed stays in full precision."""

    layers: dict[str, LayerPlan]
    attentions: dict[str, AttentionPlan]


def shared_plan(
    unet: UNet, layout: UNetLayout, precision: Precision, split_shortcuts: bool = False, symmetric: bool = False
) -> QuantizationPlan:
    """The ``shared`` protocol: the same layers for every method.

    Every Conv2d and Linear at the target bits, the first and the last layer at 8 bits or more (weights and input),
    attention operands at the activation bits, attention probabilities at ``precision.attention_bits``.
    """
    layers = {}
    for path, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight_bits, activation_bits = precision.weight_bits, precision.activation_bits
            if path in layout.boundary:
                weight_bits, activation_bits = max(weight_bits, BOUNDARY_BITS), max(activation_bits, BOUNDARY_BITS)
            splits = layout.shortcut_splits.get(path, ()) if split_shortcuts else ()
            layers[path] = LayerPlan(weight_bits, activation_bits, splits, symmetric)
    attentions = {}
    if precision.quantizes_activations:
        attention = AttentionPlan(precision.activation_bits, precision.attention_bits, symmetric)
        attentions = dict.fromkeys(layout.attentions, attention)
    return QuantizationPlan(layers, attentions)


def insert_quantizers(unet: UNet, plan: QuantizationPlan) -> StepTracker:
    """Swap the planned layers and attention processors of ``unet`` for quantised ones, in place.

    Nothing is quantised yet: ranges come from calibration or from a checkpoint. The tracker also stands in
    ``unet.step_tracker``. Raises ValueError if the network holds quantised layers already.
    """
    if quantized_layers(unet):
        raise ValueError("the UNet is quantised already: start from the full-precision one")
    tracker = StepTracker()
    tracker.watch(unet)
    unet.step_tracker = tracker
    for path, layer in plan.layers.items():
        original = unet.get_submodule(path)
        swapped = quantized_layer(
            original, layer.weight_bits, layer.activation_bits, tracker, layer.splits, layer.symmetric
        )
        unet.set_submodule(path, swapped)
    for path, attention in plan.attentions.items():
        processor = QuantizedAttention(attention.activation_bits, attention.softmax_bits, tracker, attention.symmetric)
        unet.get_submodule(path).set_processor(processor)
    for path, quantizer in activation_quantizers(unet).items():
        quantizer.path = path
    unet.to(unet.device)
    return tracker


def announce_step(unet: UNet, timesteps: Tensor) -> None:
    """Tell the quantisers the time steps of the rows to come, where blocks are evaluated without the whole UNet."""
    tracker = getattr(unet, "step_tracker", None)
    if tracker is not None:
        tracker.set(timesteps)


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers inside ``module``, by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}


def activation_quantizers(module: nn.Module) -> dict[str, FakeQuantize]:
    """The activation quantisers inside ``module``, by path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, FakeQuantize)}


@dataclass(frozen=True)
class Coverage:
    """How one Conv2d, Linear or attention product is treated; ``reason`` says why a side is not quantised."""

    path: str
    kind: str
    weight_bits: int
    activation_bits: int
    reason: str = ""


def coverage(unet: UNet) -> list[Coverage]:
    """Every Conv2d, Linear and attention product of the UNet with its bits, or the reason it is not quantised."""
    rows = []
    for path, module in unet.named_modules():
        if isinstance(module, QuantizedLayer):
            kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
            full = FULL in (module.weight_bits, module.activation_bits)
            reason = "the precision leaves this side in full precision" if full else ""
            rows.append(Coverage(path, kind, module.weight_bits, module.activation_bits, reason))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            rows.append(Coverage(path, type(module).__name__.lower(), FULL, FULL, "not swapped"))
        elif isinstance(module, Attention):
            processor = module.processor
            quantized = isinstance(processor, QuantizedAttention)
            for product, bits in (
                ("query-key product", processor.query.bits if quantized else FULL),
                ("probability-value product", processor.probabilities.bits if quantized else FULL),
            ):
                reason = "" if quantized else "the precision leaves activations in full precision"
                rows.append(Coverage(path, product, FULL, bits, reason))
    return rows
