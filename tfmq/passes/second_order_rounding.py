"""Rounding weights by second-order statistics of their inputs, against full-precision outputs, without learning.

Each layer first takes the weight that best gives its full-precision output from the inputs that it has in the network
quantised so far, then that weight is rounded with the same statistics (`tfmq.numerics.second_order`; GPTQ,
arXiv 2210.17323, has the second step). Full precision and quantised stream side by side, block after block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from tfmq.cost import Shapes, evaluation_bytes
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Block
from tfmq.network.calibration import CalibrationRows, CalibrationSet, Draw, Spaced
from tfmq.network.offload import BlockStream, place_for
from tfmq.numerics.second_order import SecondMoments, least_squares, nearest_plane
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.block_reconstruction import unrounded_layers
from tfmq.passes.reconstruction import time_layer_data
from tfmq.passes.weight_ranges import WeightRange
from tfmq.plan import quantized_layers
from tfmq.session import Session
from tfmq.settings import check_choices, check_counts, check_numbers

FLOAT = 4


@dataclass(frozen=True)
class SecondOrderRounding(Pass[CalibrationRows]):
    """Round all layers that no earlier pass has rounded: time-embedding layers, then block by block.

    Attributes:
        share: how much of a layer's own inputs' mistakes its weight makes up for: 0 none (GPTQ), 1 all.
        damping: as in `tfmq.numerics.second_order`.
        range: how ranges are found, on the weights that make up for mistakes.
        pixels: of each row that a layer is seen at, drawn at random; tokens likewise.
        data: which rows of the pool.
        batch: rows evaluated at once.
        memory_bytes: as in `BlockReconstruction`.
    """

    share: float = 0.5
    damping: float = 0.01
    range: WeightRange = "search"
    pixels: int = 16
    data: Draw = Spaced(20, 64)
    batch: int = 64
    memory_bytes: int = field(default=8 * 2**30, compare=False)

    sees_activations = False

    def __post_init__(self) -> None:
        check_choices(self)
        check_counts(self, "pixels", "batch", "memory_bytes")
        check_numbers(self, "share", least=0, most=1)
        check_numbers(self, "damping", least=0)

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    @torch.no_grad()
    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. Raises ValueError for rows that do not fit, and a block's NaN or infinity."""
        network, full, backbone = session.network, session.full, session.backbone
        place = place_for(full, backbone, rows, 2, self.memory_bytes, session.workspace.allocate)
        for path in backbone.embedding:
            layers = unrounded_layers(network, Block(path))
            if layers:
                self._round(session, path, layers, partial(_of_embedding, session, path, rows))
        reference, stream = (BlockStream(each, backbone, rows, self.batch, place) for each in (full, network))
        for block in tqdm(backbone.blocks, desc=self.name, disable=None):
            layers = unrounded_layers(network, block)
            if layers:
                self._round(
                    session, block.path, layers, partial(self._of_block, session, reference, stream, block, layers)
                )
            for each in (reference, stream):
                each.advance(block, each.outputs(block, each.inputs(block)))
        session.count_evaluations(4 * len(rows))

    def _round(
        self,
        session: Session,
        unit: str,
        layers: Mapping[str, QuantizedLayer],
        moments: Callable[[], Mapping[str, SecondMoments]],
    ) -> None:
        """Round some layers as one unit of learning."""

        def learn() -> list[float]:
            found = moments()
            for path, layer in layers.items():
                self._round_layer(layer, found[path])
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

    def _round_layer(self, layer: QuantizedLayer, moments: SecondMoments) -> None:
        weight, bias = layer.weight.flatten(1), _bias(layer)
        if bias is None:
            squares, products = moments.squares, moments.products
        else:
            squares, products = moments.centred()
        products = self.share * products + (1 - self.share) * (weight @ squares)
        wanted = least_squares(weight, squares, products, self.damping)
        layer.weight = nn.Parameter(wanted.view_as(layer.weight), requires_grad=False)
        layer.find_weight_range(self.range)
        scale, zero_point = (
            each.expand_as(layer.weight).flatten(1)
            for each in (layer.spread(layer.weight_scale), layer.spread(layer.weight_zero_point))
        )
        codes = nearest_plane(wanted, scale, zero_point, layer.grid, squares, self.damping)
        layer.load_codes(codes.to(torch.uint8).view_as(layer.weight))
        if bias is not None:
            mean = moments.inputs / moments.count
            full_mean = self.share * moments.outputs / moments.count + (1 - self.share) * (weight @ mean + bias)
            layer.bias = nn.Parameter(full_mean - layer.weight.flatten(1) @ mean, requires_grad=False)

    def _of_block(
        self,
        session: Session,
        reference: BlockStream,
        stream: BlockStream,
        block: Block,
        layers: Mapping[str, QuantizedLayer],
    ) -> dict[str, SecondMoments]:
        """Second moments of layers of a block over all rows."""
        moments = {
            path: SecondMoments.empty(layer.weight[0].numel(), len(layer.weight), layer.weight.device)
            for path, layer in layers.items()
        }
        full = {path: session.full.get_submodule(path) for path in layers}
        for start in range(0, len(reference.rows), self.batch):
            chosen = slice(start, start + self.batch)
            outputs: dict[str, Tensor] = {}
            inputs: dict[str, Tensor] = {}
            with _watched(full, outputs, after=True):
                reference.evaluate(session.full, block, reference.inputs(block), chosen)
            with _watched(layers, inputs, after=False):
                stream.evaluate(session.network, block, stream.inputs(block), chosen)
            for path, layer in layers.items():
                x, y = samples(layer, inputs[path], outputs[path], self.pixels, session.generator)
                moments[path].add(x, y)
        return moments

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        shapes.rounded |= shapes.unrounded
        return Cost(4 * len(rows))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        evaluated = shapes.of_blocks(rows, self.batch, evaluation_bytes)
        layers = quantized_layers(shapes.network)
        moments = [
            sum(
                _moment_bytes(layer) for path, layer in layers.items() if block.holds(path) and path in shapes.unrounded
            )
            for block in shapes.backbone.blocks
        ]
        waiting = [2 * each for each in shapes.waiting(rows)]
        working = [a + b for a, b in zip(evaluated, moments, strict=True)]
        return Memory.of_blocks(working, waiting, self.memory_bytes)


def samples(layer: nn.Module, x: Tensor, y: Tensor, pixels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (n, D) and outputs (n, O) of a layer at so many places of each row, drawn at random.

    Of a convolution the input at a place is the patch that gives the output there.
    """
    if x.dim() == 2:
        return x, y
    if x.dim() == 3:
        if pixels >= x.shape[1]:
            return x.flatten(0, 1), y.flatten(0, 1)
        places = torch.randint(x.shape[1], (len(x), pixels), generator=generator).to(x.device)
        image = torch.arange(len(x), device=x.device)[:, None].expand_as(places)
        return x[image, places].flatten(0, 1), y[image, places].flatten(0, 1)
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(f"a {type(layer).__name__} with inputs of shape {tuple(x.shape)} has no known patches")
    (high, wide), (down, across) = layer.kernel_size, layer.stride
    top, left = (int(width) for width in layer.padding)
    patches = F.pad(x, (left, left, top, top)).unfold(2, high, down).unfold(3, wide, across)
    outputs = y.shape[2] * y.shape[3]
    if pixels >= outputs:
        chosen = torch.arange(outputs).expand(len(x), -1)
    else:
        chosen = torch.randint(outputs, (len(x), pixels), generator=generator)
    chosen = chosen.to(x.device)
    image = torch.arange(len(x), device=x.device)[:, None].expand_as(chosen)
    row, column = chosen // y.shape[3], chosen % y.shape[3]
    return patches[image, :, row, column].flatten(2).flatten(0, 1), y[image, :, row, column].flatten(0, 1)


@contextmanager
def _watched(layers: Mapping[str, nn.Module], found: dict[str, Tensor], after: bool) -> Iterator[None]:
    """Record the inputs of layers, or their outputs ``after`` the call."""
    hooks = []
    for path, layer in layers.items():
        if after:
            hooks.append(layer.register_forward_hook(lambda module, args, output, p=path: found.update({p: output})))
        else:
            hooks.append(layer.register_forward_pre_hook(lambda module, args, p=path: found.update({p: args[0]})))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _of_embedding(session: Session, path: str, rows: CalibrationRows) -> dict[str, SecondMoments]:
    """Second moments of a layer that embeds time steps, or conditions."""
    x, targets = time_layer_data(session.backbone, session.network, session.full, path, rows)
    moments = SecondMoments.empty(x.shape[1], targets.shape[1], x.device)
    moments.add(x, targets)
    return {path: moments}


def _moment_bytes(layer: QuantizedLayer) -> int:
    """Of a layer's second moments, and of as much again while they are factorised."""
    inputs = layer.weight[0].numel()
    return 2 * FLOAT * inputs * (inputs + len(layer.weight))


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
