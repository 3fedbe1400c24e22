"""Which quantised networks integer kernels can execute, and what to say of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tfmq.export.activations import BYTE
from tfmq.modules.adaptive import LOGARITHMIC, AdaptiveQuantize
from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.channel_scales import DIVIDED, divides_channels
from tfmq.modules.fake_quantize import FakeQuantize
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Backbone, Network
from tfmq.numerics.steps import exact_steps
from tfmq.plan import activation_quantizers, quantized_layers
from tfmq.precision import FULL
from tfmq.state import check_finished, check_quantized


def check_executable(network: Network, backbone: Backbone) -> None:
    """Raise ValueError naming the first layer or attention that no integer kernel executes, and why."""
    check_quantized(network)
    check_finished(network)
    if backbone.condition_embedding:
        raise ValueError(
            f"this {type(network).__name__} adds conditions to its time embedding (SDXL, LCM), which an export can not "
            "compute ahead: execute it in torch, by tfmq.executing"
        )
    if network.step_tracker.steps.is_floating_point():
        raise ValueError(
            "the network was calibrated for fractional time steps, and an exported one takes whole ones: take a "
            "scheduler without them, such as DDIMScheduler"
        )
    layers = {path: each for path, each in quantized_layers(network).items() if not _tabulated(path, backbone)}
    for path, layer in layers.items():
        problem = _of_layer(layer)
        if problem:
            raise ValueError(f"{path} cannot be executed in integers: {problem}")
    if not any(layer.activation_bits < FULL for layer in layers.values()):
        raise ValueError(
            "nothing of this network executes in integers: its activations are in full precision; quantise them, "
            "to 8 bits or fewer (w4a8)"
        )
    for path in backbone.attentions:
        processor = network.get_submodule(path).processor
        problem = _of_attention(processor) if isinstance(processor, QuantizedAttention) else ""
        if problem:
            raise ValueError(f"the products of {path} cannot be executed in integers: {problem}")
    for path, quantizer in activation_quantizers(network).items():
        if not torch.isfinite(quantizer.scale).all():
            raise ValueError(f"the range of {path} holds NaN or infinity: quantise again")


def chosen_timesteps(network: Network, given: Tensor | Sequence[int] | None) -> Tensor:
    """The time steps that an export has tables for, int64 (S,), ascending: those given, or the network's own.

    Raises ValueError for steps that the network was not calibrated for, and where neither is known.
    """
    own = network.step_tracker.steps
    if given is None:
        if not len(own):
            raise ValueError(
                "the network does not say at which time steps it is sampled: give timesteps, such as "
                "scheduler.timesteps after scheduler.set_timesteps(20)"
            )
        return own
    steps = exact_steps(torch.as_tensor(given)).reshape(-1).unique()
    if steps.is_floating_point():
        raise ValueError(f"timesteps {steps.tolist()} are not all whole: take a scheduler with whole time steps")
    if not len(steps):
        raise ValueError("timesteps is empty: give the time steps that the network is sampled at")
    foreign = steps[~torch.isin(steps, own)] if len(own) else steps[:0]
    if len(foreign):
        raise ValueError(
            f"the network was calibrated for the time steps {own.tolist()}, and {foreign.tolist()} are not among them"
        )
    return steps


def _tabulated(path: str, backbone: Backbone) -> bool:
    """Whether a layer depends on the time step alone: its outputs are looked up, and it is not executed at all."""
    return path.removesuffix(".layer") in backbone.temporal


def _of_layer(layer: QuantizedLayer) -> str:
    """Why a layer cannot be executed, or an empty text."""
    if layer.dynamic:
        return "the ranges of its input are computed at run time (dynamic); take calibrated ones"
    if layer.rank:
        return "it has a low-rank branch in floating point"
    if divides_channels(layer):
        return DIVIDED
    if BYTE < layer.activation_bits < FULL:
        return f"its input has {layer.activation_bits} bits, and integer kernels take at most {BYTE}"
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.padding_mode != "zeros"):
        return f"it has {layer.groups} groups and padding {layer.padding_mode!r}; known are 1 and 'zeros'"
    return ""


def _of_attention(processor: QuantizedAttention) -> str:
    """Why the products of an attention cannot be executed, or an empty text."""
    if isinstance(processor.probabilities, AdaptiveQuantize):
        return LOGARITHMIC
    operands = (processor.query, processor.key, processor.value, processor.probabilities)
    for operand in operands:
        if not isinstance(operand, FakeQuantize):
            return "the ranges of their operands are computed at run time (dynamic); take calibrated ones"
        if operand.bits > BYTE:
            return f"an operand has {operand.bits} bits, and integer kernels take at most {BYTE}"
    if isinstance(processor.probabilities, FakeQuantize) and processor.probabilities.zero_point.any():
        return "the zero point of the probabilities is not 0"
    return ""
