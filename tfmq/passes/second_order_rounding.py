"""Rounding weights by second-order statistics of their inputs, against full-precision outputs, without learning.

Each layer first takes the weight that best gives its full-precision output from the inputs that it has in the network
quantised so far, then that weight is rounded with the same statistics (`tfmq.numerics.second_order`; GPTQ,
arXiv 2210.17323, has the second step). Full precision and quantised stream side by side, block after block. Where
activations have ranges already, the inputs are quantised ones, so that weights make up for that too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tfmq.cost import Shapes, evaluation_bytes
from tfmq.live_bytes import LiveBytes
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Block
from tfmq.network.calibration import CalibrationRows, CalibrationSet, Draw, Spaced
from tfmq.network.offload import BlockStream, place_for
from tfmq.numerics.second_order import (
    SecondMoments,
    best_codes,
    best_scales,
    damped,
    least_squares,
    nearest_plane,
    weighted_range,
)
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.block_reconstruction import unrounded_layers
from tfmq.passes.reconstruction import time_layer_data
from tfmq.plan import announce_step, quantized_layers
from tfmq.session import Session
from tfmq.settings import check_choices, check_counts, check_numbers

FLOAT = 4
Moments = Mapping[str, SecondMoments]
Range = Literal["minmax", "search", "thresholds", "weighted"]


@dataclass(frozen=True)
class SecondOrderRounding(Pass[CalibrationRows]):
    """Round all layers that no earlier pass has rounded: time-embedding layers, then block by block.

    Every layer gets its range here, so that `WeightRanges` need not come before.

    Attributes:
        share: how much of what a layer's output lacks, by the mistakes of its inputs, its weight makes up for: 0 none
            (GPTQ), 1 all.
        damping: as in `tfmq.numerics.second_order`.
        range: how ranges are found, on the weights that make up for mistakes: ``weighted`` for the smallest squared
            error weighted by the second moment of each input, or as in `WeightRanges`.
        sweeps: how often scales and codes are each made the best ones, in turn, after rounding.
        biases: whether biases take up what outputs lack on average.
        in_turn: whether layers of a block are rounded one after the other, each by what it sees once those before are.
            All rows are evaluated at once then, which takes memory. Otherwise they are rounded together.
        data: which rows of the pool.
        batch: rows evaluated at once, where layers are not rounded in turn.
        memory_bytes: as in `BlockReconstruction`.
    """

    share: float = 0.7
    damping: float = 0.1
    range: Range = "weighted"
    sweeps: int = 1
    biases: bool = True
    in_turn: bool = True
    data: Draw = Spaced(20, 64)
    batch: int = 64
    memory_bytes: int = field(default=8 * 2**30, compare=False)

    sees_activations = False

    def __post_init__(self) -> None:
        check_choices(self)
        check_counts(self, "batch", "memory_bytes")
        check_counts(self, "sweeps", least=0)
        check_numbers(self, "share", least=0, most=1)
        check_numbers(self, "damping", least=0)

    @property
    def evaluations(self) -> int:
        """Of each row: in full precision where it is wanted, and quantised, before layers are rounded and after."""
        return 3 if self.share else 2

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    @torch.no_grad()
    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. Raises ValueError for rows that do not fit, and a block's NaN or infinity."""
        network, full, backbone = session.network, session.full, session.backbone
        place = place_for(full, backbone, rows, self.evaluations - 1, self.memory_bytes, session.workspace.allocate)
        for path in backbone.embedding:
            layers = unrounded_layers(network, Block(path))
            if layers:
                self._learn(session, path, layers, partial(self._round_embedding, session, path, rows))
        # What is computed anew after a resumed run has to be what was computed while layers were rounded, to the bit.
        batch = len(rows) if self.in_turn else self.batch
        stream = BlockStream(network, backbone, rows, batch, place)
        reference = BlockStream(full, backbone, rows, batch, place) if self.share else None
        for block in tqdm(backbone.blocks, desc=self.name, disable=None):
            layers = unrounded_layers(network, block)
            made = _Outputs()
            if layers:
                learn = partial(self._round_block, reference, stream, block, layers, made)
                self._learn(session, block.path, layers, learn)
            if reference is not None:
                reference.advance(block, _either(made.full, reference, block))
            stream.advance(block, _either(made.quantized, stream, block))
        session.count_evaluations(self.evaluations * len(rows))

    def _learn(
        self, session: Session, unit: str, layers: Mapping[str, QuantizedLayer], round_all: Callable[[], None]
    ) -> None:
        """Round some layers as one unit of learning."""

        def learn() -> list[float]:
            round_all()
            return []

        def learned() -> dict[str, Tensor]:
            return {
                f"{path}.{name}": tensor for path, layer in layers.items() for name, tensor in _parts(layer).items()
            }

        def restore(kept: dict[str, Tensor]) -> None:
            for path, layer in layers.items():
                device = layer.weight.device
                parts = {name: kept[f"{path}.{name}"].to(device) for name in ("codes", *_parts(layer))}
                layer.weight_scale, layer.weight_zero_point = parts["weight_scale"], parts["weight_zero_point"]
                if layer.bias is not None:
                    layer.bias = nn.Parameter(parts["bias"], requires_grad=False)
                layer.ranged = True
                layer.load_codes(parts["codes"])

        session.learn(unit, learn, learned, restore)

    def _round_embedding(self, session: Session, path: str, rows: CalibrationRows) -> None:
        """Round a layer that embeds time steps, or conditions."""
        backbone, network, layer = session.backbone, session.network, quantized_layers(session.network)[path]
        announce_step(network, rows.timesteps if path in backbone.condition_embedding else rows.timesteps.unique())
        x, targets = time_layer_data(backbone, network, session.full, path, rows)
        moments = SecondMoments.of(layer.weight)
        moments.add(layer.input_quantizer(x), targets - layer(x))
        self._round_layer(layer, moments)

    def _round_block(
        self,
        reference: BlockStream | None,
        stream: BlockStream,
        block: Block,
        layers: Mapping[str, QuantizedLayer],
        made: _Outputs,
    ) -> None:
        """Round layers of a block, and keep the block's outputs where all rows were evaluated for it."""
        rows = len(stream.rows)
        batch = rows if self.in_turn else self.batch
        moments = {} if self.in_turn else {path: SecondMoments.of(layer.weight) for path, layer in layers.items()}
        inputs: dict[str, Tensor] = {}
        wanted: dict[str, Tensor] = {}

        def see(path: str, layer_input: Tensor, output: Tensor) -> Tensor | None:
            found = SecondMoments.of(layers[path].weight) if self.in_turn else moments[path]
            _add(found, layers[path], inputs.pop(path), wanted.pop(path) - output if self.share else None)
            if not self.in_turn:
                return None
            self._round_layer(layers[path], found)
            output = layers[path].forward(layer_input)
            inputs.clear()  # once more recorded
            return output

        full = {} if reference is None else {path: reference.network.get_submodule(path) for path in layers}
        quantizers = {path: layer.input_quantizer for path, layer in layers.items()}
        for start in range(0, rows, batch):
            chosen = slice(start, start + batch)
            if reference is not None:
                with _watched(full, lambda path, _, output: _keep(wanted, path, output)):
                    part = reference.evaluate(reference.network, block, reference.inputs(block), chosen)
                made.full = _put(reference, made.full, part, chosen)
            with (
                _watched(quantizers, lambda path, _, output: _keep(inputs, path, output)),
                _watched(layers, see),
            ):
                part = stream.evaluate(stream.network, block, stream.inputs(block), chosen)
            if self.in_turn:
                made.quantized = _put(stream, None, part, chosen)
        for path, found in moments.items():
            self._round_layer(layers[path], found)

    def _round_layer(self, layer: QuantizedLayer, moments: SecondMoments) -> None:
        weight, bias = layer.weight.flatten(1), _bias(layer) if self.biases else None
        squares, products = (moments.squares, moments.products) if bias is None else moments.centred()
        squares = damped(squares, self.damping)
        wanted = least_squares(weight, squares, self.share * products) if self.share else weight
        self._find_range(layer, wanted, squares)
        scale, zero_point = _spread(layer, layer.weight_scale), _spread(layer, layer.weight_zero_point)
        codes = nearest_plane(wanted, scale, zero_point, layer.grid, squares)
        for _ in range(self.sweeps):
            layer.weight_scale = best_scales(wanted, codes - zero_point, layer.weight_scale, _columns(layer), squares)
            scale = _spread(layer, layer.weight_scale)
            codes = best_codes(wanted, codes, scale, zero_point, layer.grid, squares)
        layer.load_codes(codes.to(torch.uint8).view_as(layer.weight))
        if bias is not None:
            mean, lacking = moments.inputs / moments.count, moments.lacking / moments.count
            wanted_mean = weight @ mean + bias + lacking
            layer.bias = nn.Parameter(wanted_mean - layer.weight.flatten(1) @ mean, requires_grad=False)

    def _find_range(self, layer: QuantizedLayer, wanted: Tensor, squares: Tensor) -> None:
        """Give a layer the range in which the weight ``wanted`` (O, D) is rounded."""
        if self.range != "weighted":
            layer.weight = nn.Parameter(wanted.view_as(layer.weight), requires_grad=False)
            layer.find_weight_range(self.range)
            return
        columns = _columns(layer)
        groups = zip(wanted.split(columns, 1), squares.diagonal().split(columns), strict=True)
        found = [weighted_range(*group, layer.weight_bits, layer.symmetric_weight) for group in groups]
        layer.weight_scale, layer.weight_zero_point = (torch.stack(each, 1) for each in zip(*found, strict=True))
        layer.ranged = True

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        shapes.rounded |= shapes.unrounded
        return Cost(self.evaluations * len(rows))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        at_once = len(rows) if self.in_turn else self.batch
        working = shapes.of_blocks(rows, at_once, partial(self._working_bytes, shapes))
        waiting = [(self.evaluations - 1) * each for each in shapes.waiting(rows)]
        return Memory.of_blocks(working, waiting, self.memory_bytes)

    def _working_bytes(self, shapes: Shapes, stream: BlockStream, block: Block) -> int:
        """What rounding a block takes, with a batch of rows evaluated at once."""
        layers = {
            path: layer
            for path, layer in quantized_layers(shapes.network).items()
            if block.holds(path) and path in shapes.unrounded
        }
        if not layers:
            return evaluation_bytes(stream, block)
        outputs: dict[str, Tensor] = {}
        with (
            torch.no_grad(),
            LiveBytes() as live,
            _watched(layers, lambda path, _, output: _keep(outputs, path, output)),
        ):
            stream.evaluate(stream.network, block, stream.inputs(block), slice(None))
        of_layers = [_moment_bytes(layer) for layer in layers.values()]
        moments = max(of_layers) if self.in_turn else sum(of_layers)
        return live.most + moments + max(map(_rounding_bytes, layers.values()))


def _add(moments: SecondMoments, layer: nn.Module, x: Tensor, lacking: Tensor | None) -> None:
    """Add what a layer sees of some rows, and what its outputs lack."""
    if not isinstance(layer, nn.Conv2d):
        moments.add(x.flatten(0, -2), None if lacking is None else lacking.flatten(0, -2))
        return
    if layer.groups > 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(
            f"{layer} has groups, dilation or padding whose patches are not known: round it by another pass"
        )
    (high, wide), (down, across), (top, left) = layer.kernel_size, layer.stride, layer.padding
    moments.add_convolution(x, lacking, (high, wide), (down, across), (top, left))


@dataclass
class _Outputs:
    """Of a block, for all rows, as far as they are known."""

    full: Tensor | None = None
    quantized: Tensor | None = None


def _put(stream: BlockStream, outputs: Tensor | None, part: Tensor, rows: slice) -> Tensor:
    """Put a batch of a block's outputs where the rows of a stream wait."""
    if outputs is None:
        outputs = stream.place.empty(len(stream.rows), part)
    outputs[rows] = part
    return outputs


def _either(outputs: Tensor | None, stream: BlockStream, block: Block) -> Tensor:
    """A block's outputs for all rows: those given, or else they are computed."""
    return stream.outputs(block, stream.inputs(block)) if outputs is None else outputs


def _keep(outputs: dict[str, Tensor], path: str, output: Tensor) -> None:
    outputs[path] = output


@contextmanager
def _watched(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``see`` with path, input and output of modules as they are evaluated; what it returns replaces these."""
    hooks = [
        module.register_forward_hook(lambda module, args, output, path=path: see(path, args[0], output))
        for path, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _columns(layer: QuantizedLayer) -> tuple[int, ...]:
    """How many columns of the weight as a matrix (O, D) share a range, group after group."""
    return tuple(size * layer.weight[0, 0].numel() for size in layer.splits)


def _spread(layer: QuantizedLayer, per_group: Tensor) -> Tensor:
    """What there is of each output channel and group, for each element of the weight as a matrix (O, D)."""
    return layer.spread(per_group).expand_as(layer.weight).flatten(1)


def _moment_bytes(layer: QuantizedLayer) -> int:
    inputs = layer.weight[0].numel()
    return FLOAT * inputs * (inputs + len(layer.weight))


def _rounding_bytes(layer: QuantizedLayer) -> int:
    """Of rounding a layer: second moments centred, damped, sorted and factorised, and copies of the weight."""
    inputs = layer.weight[0].numel()
    return FLOAT * (5 * inputs**2 + 8 * layer.weight.numel())


def _bias(layer: QuantizedLayer) -> Tensor | None:
    return layer.bias if isinstance(layer.bias, Tensor) else None


def _parts(layer: QuantizedLayer) -> dict[str, Tensor]:
    """What rounding a layer sets; its codes are none before."""
    found = {
        "codes": layer.codes,
        "weight_scale": layer.weight_scale,
        "weight_zero_point": layer.weight_zero_point,
        "bias": _bias(layer),
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}
