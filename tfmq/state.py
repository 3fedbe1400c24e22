"""What a quantised network is at this moment: read off its layers, never remembered.

Later calls can change a network: a LoRA is attached or fused, a layer replaced, a weight assigned. So coverage, the
plan that a checkpoint stores and the checks before saving are all read here, from the network as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from tfmq.modules.adaptive import AdaptiveQuantize
from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.cache import CachedProjection, cached_projections
from tfmq.modules.channel_scales import ChannelScales, divides_channels
from tfmq.modules.dynamic import DynamicQuantize
from tfmq.modules.fake_quantize import FakeQuantize, SplitFakeQuantize
from tfmq.modules.later_changes import adapted
from tfmq.modules.layers import QuantizedLayer
from tfmq.modules.rectified import Rectified
from tfmq.network.backbone import Network
from tfmq.plan import AttentionPlan, LayerPlan, QuantizationPlan, activation_quantizers, quantized_layers
from tfmq.precision import FULL

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
BASE = ".base_layer"
CHANGED = "the weight is no longer that of its codes: a LoRA was fused, or another weight loaded or assigned"


def check_quantized(network: Network) -> None:
    """Raise ValueError for a network that holds no quantised layers."""
    if not quantized_layers(network):
        raise ValueError("the network is not quantised: call quantize_ first")


def check_finished(network: Network, before: str = "") -> None:
    """Raise ValueError naming the first layer or activation that a recipe has left unquantised.

    ``before`` is the pass that needs a quantised network, if it is one that asks.
    """
    where = f" before the pass {before}" if before else ""
    for path, layer in quantized_layers(network).items():
        if layer.codes is None:
            raise ValueError(
                f"the recipe leaves the weight of {path} unrounded{where}: add RoundToNearest after what learns"
            )
        if not layer.consistent:
            raise ValueError(
                f"the weight of {path} was changed after it was rounded: let that pass come before rounding"
            )
    for path, quantizer in activation_quantizers(network).items():
        if not quantizer.enabled:
            raise ValueError(f"the recipe gives the activation at {path} no range{where}: add ActivationRanges")


def check_unchanged(network: Network) -> None:
    """Raise ValueError for a full-precision network with later changes that its quantised twin would lose.

    Those are adapters such as LoRA that are attached and not fused, attention processors of another arithmetic (an
    IP-Adapter's), fused projections, and FreeU.
    """
    for path in adapted(network):
        raise ValueError(
            f"{path} carries an adapter (LoRA): call fuse_lora and unload_lora (of a pipeline, unload_lora_weights) "
            "before quantising, so that it is a part of the weights; or unload it, and load it after quantising"
        )
    for path, module in network.named_modules():
        if isinstance(module, Attention):
            name = type(module.processor).__name__
            if module.fused_projections:
                raise ValueError(f"the projections of {path} are fused: call unfuse_qkv_projections before quantising")
            if name not in PROCESSORS:
                raise ValueError(
                    f"{path} has the attention processor {name}, whose arithmetic quantised attention would lose: "
                    "unload the IP-Adapter, or call set_default_attn_processor, before quantising"
                )
    if has_freeu(network):
        raise ValueError("FreeU is on, and would not be seen block by block: call disable_freeu before quantising")


def check_storable(network: Network) -> None:
    """Raise ValueError for a network with later changes that a quantised checkpoint can not hold."""
    for path in adapted(network):
        raise ValueError(
            f"{path} carries an adapter (LoRA), which a quantised checkpoint does not hold: save it by itself "
            "(save_lora_adapter), call unload_lora (of a pipeline, unload_lora_weights), and load it again afterwards"
        )
    for path, layer in quantized_layers(network).items():
        if layer.codes is not None and not layer.consistent:
            raise ValueError(
                f"{path}: {CHANGED}. Call tfmq.restore_weights to have the quantised weights again; to keep the "
                "change, make it on the full-precision network and quantise that"
            )
    if has_freeu(network):
        raise ValueError("FreeU is on, which is not stored: call disable_freeu, save, and switch it on after loading")


@torch.no_grad()
def restore_weights(network: Network) -> None:
    """Give every quantised layer the weight of its codes again, in place: after a LoRA was unfused, for example."""
    check_quantized(network)
    for layer in quantized_layers(network).values():
        if layer.codes is not None and not layer.consistent:
            layer.load_codes(layer.codes)


def has_freeu(network: nn.Module) -> bool:
    """Whether FreeU scales the features of an up block."""
    blocks = getattr(network, "up_blocks", ())
    return any(getattr(block, name, None) is not None for block in blocks for name in ("s1", "s2", "b1", "b2"))


@dataclass(frozen=True)
class Coverage:
    """How one Conv2d, Linear or attention product is treated.

    Attributes:
        path: of the module.
        kind: ``conv2d``, ``linear``, ``lookup table``, or which product.
        weight_bits, activation_bits: 32 where not quantised; a product of two activations has no weights.
        reason: why weights or activations are not quantised, or an empty text.
    """

    path: str
    kind: str
    weight_bits: int
    activation_bits: int
    reason: str = ""


def coverage(network: Network) -> list[Coverage]:
    """Every Conv2d, Linear and attention product of the network as it is, with its bits or why it is not quantised.

    It tells of later changes too: the layers of a LoRA, a layer or processor that was put in place after quantising, a
    weight that is no longer that of its codes. Raises ValueError if ``network`` is not quantised.
    """
    check_quantized(network)
    return [*_rows(network)]


def _rows(network: Network) -> Iterator[Coverage]:
    adapters = adapted(network)
    for path, module in network.named_modules():
        later = "it was put in place after quantising"
        around = next((adapter for adapter in adapters if path.startswith(f"{adapter}.")), None)
        if around is not None:
            own = path.removesuffix(BASE) == around
            path, later = (around, later) if own else (path, f"it belongs to an adapter of {around}")
        reason = network.full_precision_reasons.get(path, "")
        if isinstance(module, QuantizedLayer) and module.weight_bits != FULL:
            yield _of_layer(path, module, reason)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
            yield Coverage(path, kind, FULL, FULL, reason or later)
        elif isinstance(module, CachedProjection):
            reason = "the precision leaves activations in full precision" if module.bits == FULL else ""
            yield Coverage(path, "lookup table", module.bits, module.bits, reason)
        elif isinstance(module, Attention):
            processor = module.processor
            quantized = isinstance(processor, QuantizedAttention)
            for product, bits in (
                ("query-key product", processor.query.bits if quantized else FULL),
                ("probability-value product", processor.probabilities.bits if quantized else FULL),
            ):
                yield Coverage(path, product, FULL, bits, reason if quantized else reason or later)


def _of_layer(path: str, layer: QuantizedLayer, reason: str) -> Coverage:
    kind = "conv2d" if isinstance(layer, nn.Conv2d) else "linear"
    changed = layer.codes is not None and not layer.consistent
    weight_bits = FULL if changed else layer.weight_bits
    activation_bits = _bits_of(layer.input_quantizer)
    if changed:
        reason = CHANGED
    elif activation_bits != layer.activation_bits:
        reason = "its input's quantiser was replaced after quantising"
    elif FULL in (weight_bits, activation_bits):
        reason = reason or "the precision leaves this side in full precision"
    return Coverage(path, kind, weight_bits, activation_bits, reason)


def _bits_of(quantizer: nn.Module) -> int:
    """The bits of a layer's input; 32 where nothing quantises it."""
    if isinstance(quantizer, SplitFakeQuantize):
        return max(_bits_of(part) for part in quantizer.parts)
    if isinstance(quantizer, ChannelScales):
        return _bits_of(quantizer.quantizer)
    return quantizer.bits if isinstance(quantizer, FakeQuantize | DynamicQuantize) else FULL


def plan_of(network: Network) -> QuantizationPlan:
    """The plan of which a quantised network is made."""
    # A layer inside a table of temporal features was inserted at the table's path.
    original = {f"{path}.layer": path for path in cached_projections(network)}
    layers = {}
    for path, layer in quantized_layers(network).items():
        layers[original.get(path, path)] = LayerPlan(
            layer.weight_bits,
            layer.activation_bits,
            () if layer.block else layer.splits,
            layer.symmetric,
            layer.dynamic,
            layer.rank,
            layer.block,
            layer.scales,
            layer.unsigned,
            divides_channels(layer),
        )
    attentions = {
        path.removesuffix(".processor"): AttentionPlan(
            processor.query.bits,
            processor.probabilities.bits,
            processor.symmetric,
            processor.dynamic,
            isinstance(processor.probabilities, AdaptiveQuantize),
        )
        for path, processor in network.named_modules()
        if isinstance(processor, QuantizedAttention)
    }
    rectified = tuple(path for path, module in network.named_modules() if isinstance(module, Rectified))
    return QuantizationPlan(layers, attentions, network.full_precision_reasons, rectified)
