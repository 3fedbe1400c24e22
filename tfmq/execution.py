"""Networks that execute: the same quantised network, computed in integers instead of simulated in floating point."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from tfmq.modules import integer, integer_attention
from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.cache import CachedProjection
from tfmq.modules.in_cache import CodesUpsample, InPlaceResnetBlock, PixelsGroupNorm, RowsFeedForward
from tfmq.modules.integer import IntegerLayer
from tfmq.modules.integer_attention import IntegerAttention
from tfmq.modules.integer_products import cpu_is_exact
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Network
from tfmq.state import check_finished, check_quantized

PROJECTIONS = ("to_q", "to_k", "to_v")
KERNEL = "8-bit integers"
FLOAT = "float32"
SIMULATED = "simulated in float32"


@dataclass(frozen=True)
class Executed:
    """What computes one Conv2d, Linear or attention of an executing network.

    Attributes:
        path: of the module.
        kind: ``conv2d``, ``linear``, ``lookup table`` or ``attention products``.
        kernel: ``8-bit integers``; ``float32`` for what is not quantised, ``simulated in float32`` for what is, and
            cannot be executed.
        reason: why it is not executed, or an empty text.
    """

    path: str
    kind: str
    kernel: str
    reason: str = ""


def executing(network: Network, partly: bool = False) -> Network:
    """A copy of a quantised network that computes in integers: of the same class, called in the same way.

    Its layers and attention products are integer sums with one float factor, which is what simulation computes up to
    the rounding of floats; softmax, norms, activation functions and residual sums stay in float32. ``network`` stays as
    it is, and the copy shares the weights of what is not quantised with it. The copy is for inference: it has no
    gradients, and it cannot be saved; save ``network``, and make the copy when that is loaded.

    Layers that are in full precision by plan stay in it. See ``executed_coverage`` for what computes each.

    Args:
        network: finished by ``quantize_``, or loaded by ``load_quantized``; float32.
        partly: simulate what cannot be executed, instead of refusing the network.

    Raises:
        ValueError: ``network`` is not quantised, or not in float32, or holds what cannot be executed, or the processor
            has no exact 8-bit kernels.
    """
    check_quantized(network)
    if network.dtype != torch.float32:
        raise ValueError(f"the network computes in {network.dtype}: only networks in float32 can be executed")
    check_finished(network)
    refused = not_executable(network)
    if refused and not partly:
        path, reason = next(iter(refused.items()))
        raise ValueError(
            f"{path} cannot be executed: {reason} ({len(refused)} such in all); with partly=True these stay simulated"
        )
    check_processor(network.device)
    # What is in the memo takes the place of its original in the copy.
    tracker = copy.copy(network.step_tracker)
    memo: dict[int, object] = {id(network.step_tracker): tracker}
    for path, module in network.named_modules():
        if path in refused:
            continue
        if isinstance(module, QuantizedLayer):
            memo[id(module)] = IntegerLayer(module, tracker).to(network.device)
        elif isinstance(module, QuantizedAttention):
            attention = network.get_submodule(path.rpartition(".")[0])
            named = {f"{path.rpartition('.')[0]}.{name}": getattr(attention, name) for name in PROJECTIONS}
            layers = [
                layer for name, layer in named.items() if isinstance(layer, QuantizedLayer) and name not in refused
            ]
            memo[id(module)] = IntegerAttention(module, tracker, layers).to(network.device)
    memo |= {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, memo)
    for faster in (PixelsGroupNorm, RowsFeedForward, InPlaceResnetBlock, CodesUpsample):
        for path, module in [*twin.named_modules()]:
            if faster.suits(module):
                twin.set_submodule(path, faster(module))
    twin.not_executed = refused
    return twin


def check_processor(device: torch.device) -> None:
    """Raise ValueError for a processor that cannot execute a network."""
    if device.type == "cpu" and not cpu_is_exact():
        raise ValueError(
            "the 8-bit kernels of this processor are not exact (VNNI instructions are missing, or torch was built "
            "without oneDNN): simulate the network here, and execute it on another processor"
        )


def not_executable(network: Network) -> dict[str, str]:
    """What of a quantised network cannot be executed, by path, with the reason."""
    found = {}
    for path, module in network.named_modules():
        if isinstance(module, QuantizedLayer):
            found[path] = integer.not_executable(module)
        elif isinstance(module, QuantizedAttention):
            found[path] = integer_attention.not_executable(module)
    return {path: reason for path, reason in found.items() if reason}


def executed_coverage(network: Network) -> list[Executed]:
    """What computes each Conv2d, Linear and attention of an executing network.

    Raises ValueError for a network that is not ``executing``.
    """
    if not hasattr(network, "not_executed"):
        raise ValueError("the network does not execute: give the copy that tfmq.executing makes")
    reasons = {**network.full_precision_reasons, **network.not_executed}
    rows = []
    for path, module in network.named_modules():
        reason = reasons.get(path, "")
        if isinstance(module, IntegerLayer):
            rows.append(Executed(path, "linear" if module.window is None else "conv2d", KERNEL))
        elif isinstance(module, QuantizedLayer):
            rows.append(Executed(path, "conv2d" if isinstance(module, nn.Conv2d) else "linear", SIMULATED, reason))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            rows.append(Executed(path, type(module).__name__.lower(), FLOAT, reason))
        elif isinstance(module, CachedProjection):
            rows.append(Executed(path, "lookup table", "no product"))
        elif isinstance(module, Attention):
            processor = module.processor
            if isinstance(processor, IntegerAttention):
                rows.append(Executed(path, "attention products", KERNEL))
            elif isinstance(processor, QuantizedAttention):
                reason = reasons.get(f"{path}.processor", "")
                rows.append(Executed(path, "attention products", SIMULATED, reason))
            else:
                rows.append(Executed(path, "attention products", FLOAT, reason))
    return rows
