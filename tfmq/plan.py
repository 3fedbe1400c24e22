"""Which layers of a network are quantised at how many bits, and putting the quantised layers in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tfmq.modules.adaptive import AdaptiveQuantize
from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.block_scaled import block_layer
from tfmq.modules.channel_scales import divide_channels
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.modules.guarded_attention import GuardedAttention
from tfmq.modules.later_changes import guard
from tfmq.modules.layers import QuantizedLayer, quantized_layer
from tfmq.modules.rectified import Rectified
from tfmq.network.backbone import Backbone, Network, refuse_unknown
from tfmq.numerics.block_scales import ScaleFormat
from tfmq.precision import FULL, Precision

if TYPE_CHECKING:
    from tfmq.passes import Recipe


@dataclass(frozen=True)
class Protocol:
    """Which layers a comparison quantises.

    Attributes:
        name: ``shared`` for the same layers under every method, ``published`` for what a method's paper leaves out,
            ``as_run`` for what its released code does.
        bits: role (see ``Backbone.roles``) -> bits that weights and inputs get at least; 32 leaves the role in full
            precision. Layers of no such role get the bits of the precision.
        inputs: the same for inputs alone.
        softmax_bits: least bits of attention probabilities.
    """

    name: str
    bits: Mapping[str, int]
    inputs: Mapping[str, int] = field(default_factory=dict)
    softmax_bits: int = 0

    def __post_init__(self) -> None:
        for role, bits in self.bits.items():
            if bits != FULL and not 2 <= bits <= 8:
                raise ValueError(f"protocol {self.name} gives {role} {bits} bits: choose 2 to 8, or {FULL} for none")
        for role, bits in self.inputs.items():
            if bits != FULL and not 2 <= bits <= 16:
                raise ValueError(f"protocol {self.name} gives inputs of {role} {bits} bits: choose 2 to 16, or {FULL}")


SHARED = Protocol("shared", {"boundary": 8})


# Parts of a layer's or an attention's plan that are left out of files where they are off.
LATER, OF_BLOCKS = ("channel_scales", "adaptive"), ("block", "scales", "unsigned")


@dataclass(frozen=True)
class LayerPlan:
    """Treatment of one Conv2d or Linear.

    Attributes:
        weight_bits, activation_bits: 32 where not quantised.
        splits: sizes of consecutive groups of input channels with ranges of their own.
        symmetric: signed grid with zero point 0 for the input.
        dynamic: ranges of the input are computed at run time.
        rank: of the branch in 16 bits that takes the largest part of the weight; 0 for none.
        block: consecutive channels of weight and input that share a scale (`tfmq.modules.block_scaled`); 0 for none.
            Inputs in blocks are dynamic and symmetric, and there are no splits and no branch.
        scales: the format of a block's scale.
        unsigned: the input, in blocks, is not negative, and its codes begin at 0.
        channel_scales: the channels of the input are divided by factors before they are quantised.
    """

    weight_bits: int
    activation_bits: int
    splits: tuple[int, ...] = ()
    symmetric: bool = False
    dynamic: bool = False
    rank: int = 0
    block: int = 0
    scales: ScaleFormat = "float32"
    unsigned: bool = False
    channel_scales: bool = False

    def __post_init__(self) -> None:
        if self.block and (self.splits or self.rank):
            raise ValueError("a layer in blocks has no splits and no low-rank branch: leave these out")


@dataclass(frozen=True)
class AttentionPlan:
    """Treatment of one attention module.

    Attributes:
        activation_bits: of query, key and value.
        softmax_bits: of the probabilities.
        symmetric, dynamic: as in ``LayerPlan``.
        adaptive: the grid of the probabilities is uniform or logarithmic, as their distribution asks for.
    """

    activation_bits: int
    softmax_bits: int
    symmetric: bool = False
    dynamic: bool = False
    adaptive: bool = False


@dataclass(frozen=True)
class QuantizationPlan:
    """Treatment of each layer and attention module, by path.

    What is not listed stays in full precision; ``reasons`` says why, by path. ``rectified`` are the paths of activation
    functions that become ReLU.
    """

    layers: dict[str, LayerPlan]
    attentions: dict[str, AttentionPlan]
    reasons: dict[str, str] = field(default_factory=dict)
    rectified: tuple[str, ...] = ()

    def stored(self) -> dict[str, object]:
        """The plan as JSON, without what is off of `LATER` and of blocks: files from before these are the same."""
        found = asdict(self)
        for part in (*found["layers"].values(), *found["attentions"].values()):
            off = [name for name in LATER if not part.get(name, True)]
            for name in [*off, *(OF_BLOCKS if not part.get("block", True) else ())]:
                del part[name]
        if not self.rectified:
            del found["rectified"]
        return found

    def described(self, activations: bool) -> list[object]:
        """What of the plan decides how the network computes: all of it once ``activations`` are quantised, else a part.

        Before activations are calibrated, their grids change nothing; but dynamic ones quantise from the beginning.
        """
        if activations or any(layer.dynamic for layer in self.layers.values()):
            found = self.stored()
            return [found[part] for part in ("layers", "attentions", "rectified") if part in found]
        parts = ("weight_bits", "splits", "rank", "channel_scales")
        weights = {path: [getattr(layer, part) for part in parts] for path, layer in self.layers.items()}
        return [weights, *([self.rectified] if self.rectified else [])]


def plan_for(
    network: Network, backbone: Backbone, precision: Precision, protocol: Protocol = SHARED
) -> QuantizationPlan:
    """The plan of a protocol at a precision: every Conv2d, Linear and attention product, but for its exceptions.

    Layers get the bits of the precision, attention operands its activation bits, attention probabilities
    ``precision.attention_bits``; passes may amend it. Raises ValueError for a role that there is not.
    """
    roles = backbone.roles
    for role in (*protocol.bits, *protocol.inputs):
        if role not in roles:
            raise ValueError(f"protocol {protocol.name} names the role {role!r}; roles are {', '.join(roles)}")
    exceptions: dict[str, tuple[int, str]] = {}
    for role, bits in protocol.bits.items():
        for path in roles[role]:
            exceptions[path] = max(exceptions.get(path, (0, "")), (bits, role))
    inputs: dict[str, int] = {}
    for role, bits in protocol.inputs.items():
        for path in roles[role]:
            inputs[path] = max(inputs.get(path, 0), bits)
    layers, attentions, reasons = {}, {}, {}
    for path, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear | Attention):
            continue
        least, role = exceptions.get(path, (0, ""))
        activation_bits = max(precision.activation_bits, least)
        if least == FULL:
            reasons[path] = f"protocol {protocol.name} leaves this out ({role.replace('_', ' ')})"
        elif not isinstance(module, Attention):
            layers[path] = LayerPlan(max(precision.weight_bits, least), max(activation_bits, inputs.get(path, 0)))
            if inputs.get(path) == FULL:
                reasons[path] = f"protocol {protocol.name} leaves its input out"
        elif precision.quantizes_activations:
            softmax_bits = max(precision.attention_bits, least, protocol.softmax_bits)
            attentions[path] = AttentionPlan(activation_bits, softmax_bits)
        else:
            reasons[path] = "the precision leaves activations in full precision"
    return QuantizationPlan(layers, attentions, reasons)


def amended_plan(
    network: Network, backbone: Backbone, precision: Precision, recipe: Recipe, protocol: Protocol
) -> QuantizationPlan:
    """The protocol's plan at a precision, as the passes of a recipe amend it."""
    plan = plan_for(network, backbone, precision, protocol)
    for step in recipe:
        plan = step.amend(plan, network, backbone)
    return plan


def insert_quantizers(network: Network, plan: QuantizationPlan) -> StepTracker:
    """Swap the planned layers and attention processors of ``network`` for quantised ones, in place.

    Nothing is quantised yet: ranges come from calibration or from a checkpoint. The tracker also stands in
    ``network.step_tracker``. Raises ValueError if the network holds quantised layers already.
    """
    check_unquantized(network)
    tracker = StepTracker()
    tracker.watch(network)
    network.register_forward_pre_hook(refuse_unknown, with_kwargs=True)
    network.step_tracker = tracker
    network.full_precision_reasons = dict(plan.reasons)
    device = network.device
    for path, layer in plan.layers.items():
        original = network.get_submodule(path)
        bits = (layer.weight_bits, layer.activation_bits)
        swapped: QuantizedLayer
        if layer.block:
            swapped = block_layer(original, *bits, tracker, layer.block, layer.scales, layer.unsigned)
        else:
            swapped = quantized_layer(
                original, *bits, tracker, layer.splits, layer.symmetric, layer.dynamic, layer.rank
            )
        if layer.channel_scales:
            divide_channels(swapped)
        network.set_submodule(path, swapped.to(device))
    for path in plan.rectified:
        network.set_submodule(path, Rectified())
    for path, module in [*network.named_modules()]:
        if isinstance(module, Attention):
            network.set_submodule(path, GuardedAttention.of(module))
    for path, attention in plan.attentions.items():
        processor = QuantizedAttention(
            attention.activation_bits,
            attention.softmax_bits,
            tracker,
            attention.symmetric,
            attention.dynamic,
            network.get_submodule(path).processor,
        )
        if attention.adaptive:
            processor.probabilities = AdaptiveQuantize(attention.softmax_bits, tracker)
        network.get_submodule(path).set_processor(processor.to(device))
    for path, quantizer in activation_quantizers(network).items():
        quantizer.path = path
    guard(network, tracker)
    return tracker


def check_unquantized(network: Network) -> None:
    """Raise ValueError for a network that holds quantised layers, or executes those of another."""
    if hasattr(network, "not_executed"):
        raise ValueError("the network is a copy that executes in integers: start from the full-precision one")
    if quantized_layers(network):
        raise ValueError("the network is quantised already: start from the full-precision one")


def announce_step(network: Network, timesteps: Tensor) -> None:
    """Tell the quantisers the time steps of the rows to come, where blocks are evaluated without the whole network."""
    tracker = getattr(network, "step_tracker", None)
    if tracker is not None:
        tracker.set(timesteps)


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers inside ``module``, by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}


def activation_quantizers(module: nn.Module) -> dict[str, FakeQuantize]:
    """The activation quantisers inside ``module``, by path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, FakeQuantize)}
