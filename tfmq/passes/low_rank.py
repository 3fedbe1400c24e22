"""A low-rank branch with smoothing beside a quantised layer, in the manner of SVDQuant (arXiv 2411.05007).

    W x = (W diag(s)) (x / s) = L1 L2 (x / s) + R (x / s)

The factors L1 L2, the largest part of the smoothed weight, stay in 16 bits and take the smoothed input unquantised; the
residual R and its input are quantised. A convolution's kernel counts as the matrix (O, I * k * k), and its branch is a
convolution to r channels followed by one of a single pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from tfmq.cost import Shapes, restore_unrounded
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Backbone, Network, evaluate
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.weight_ranges import WeightRange
from tfmq.plan import QuantizationPlan, quantized_layers
from tfmq.session import Session
from tfmq.settings import check_choices, check_counts

HALF = torch.float16
# What a split replaces in a layer.
REPLACED = ("weight", "codes", "smoothing", "up", "down", "weight_scale", "weight_zero_point")
Hook = Callable[[str, nn.Conv2d | nn.Linear, Tensor, Tensor], None]


@dataclass(frozen=True)
class LowRankBranches(Pass[CalibrationRows]):
    """Smooth each layer and give it a low-rank branch; the residual is left for a later pass to round.

    Attributes:
        rank: of the branch; a layer with a dimension no larger than this gets no branch.
        candidates: how many migration strengths are tried, i / (candidates - 1); a single one is 0.5.
        search_rows: calibration rows, spread evenly, on which candidates are compared.
        range: of the residual while they are compared, as in `tfmq.passes.weight_ranges.WeightRanges`.
        data: which rows of the pool the largest input of each channel is taken from.
        batch: rows evaluated at once.
    """

    rank: int
    candidates: int
    search_rows: int
    range: WeightRange = "minmax"
    data: Draw = Spaced(20, 64)
    batch: int = 64

    def __post_init__(self) -> None:
        check_choices(self)
        check_counts(self, "rank", "candidates", "search_rows", "batch")

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`."""
        layers = {
            path: replace(layer, rank=self.rank if has_branch(network.get_submodule(path), self.rank) else 0)
            for path, layer in plan.layers.items()
        }
        return replace(plan, layers=layers)

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`; ``migration_strengths`` among the report's details are by layer, None for no smoothing."""
        layers = {path: layer for path, layer in quantized_layers(session.network).items() if layer.rank}
        strengths = add_branches(session.full, layers, rows, self, session.learn)
        session.report.details |= {"migration_strengths": strengths}
        session.count_evaluations(self._evaluations(rows))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        return Cost(self._evaluations(rows))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        layers = {path: layer for path, layer in quantized_layers(shapes.network).items() if layer.rank}

        def record(path: str, layer: nn.Conv2d | nn.Linear, x: Tensor, output: Tensor) -> None:
            channel_largest(layer, x)

        def choose(path: str, layer: nn.Conv2d | nn.Linear, x: Tensor, output: Tensor) -> None:
            twin, smoothing = layers[path], layer.weight.new_empty(layer.weight.shape[1])
            before = {name: getattr(twin, name) for name in REPLACED}
            split_error(twin, layer.weight, smoothing, x, output, self.range)
            for name, tensor in before.items():  # in whose place the new ones stand, and not beside them
                setattr(twin, name, tensor)

        with hooked(shapes.full, layers, record):
            recorded = shapes.evaluated(rows, self.batch, shapes.full)
        with hooked(shapes.full, layers, choose):
            chosen = shapes.evaluated(rows, self.search_rows, shapes.full)
        for layer in layers.values():
            restore_unrounded(layer)
        return Memory(max(recorded, chosen))

    def _evaluations(self, rows: CalibrationRows) -> int:
        return len(rows) + min(self.search_rows, len(rows))


def smoothing_factors(input_largest: Tensor, weight_largest: Tensor, strength: float) -> Tensor:
    """s = max|X|^a / max|W|^(1 - a) for each input channel, from both maxima (I,); 1 where either is 0.

    SmoothQuant's eq. 4 (arXiv 2211.10438), with a the migration strength.
    """
    factors = input_largest.pow(strength) / weight_largest.pow(1 - strength)
    return torch.where((input_largest > 0) & (weight_largest > 0), factors, torch.ones_like(factors))


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L1 (m, r) and L2 (r, n) whose product is the matrix of rank r nearest to ``matrix`` (Eckart and Young).

    Both carry the square root of the singular values, so that 16 bits hold either. The singular vectors of the shorter
    side are eigenvectors of its Gram matrix, in float64: several times faster than a singular value decomposition.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right = truncate(matrix.T, rank)
        return right.T, left.T
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    vectors = vectors[:, -rank:]
    # A singular value of 0 comes out as a rounding error of either sign.
    limits = torch.finfo(values.dtype)
    root = values[-rank:].clamp_min((values[-1] * limits.eps).clamp_min(limits.tiny)).pow(0.25)
    return vectors * root, (vectors / root).T @ matrix


def has_branch(layer: nn.Conv2d | nn.Linear, rank: int) -> bool:
    """Whether a branch of ``rank`` is smaller than the layer; a grouped convolution is no matrix and gets none."""
    return 0 < rank < min(layer.weight.flatten(1).shape) and getattr(layer, "groups", 1) == 1


@torch.no_grad()
def split_weight(layer: QuantizedLayer, weight: Tensor, smoothing: Tensor) -> None:
    """Give ``layer`` the branch of a full-precision weight smoothed by ``smoothing`` (I,), and the residual as weight.

    The residual is what the factors leave after their rounding to 16 bits.
    """
    smoothed = weight * smoothing.view(-1, *[1] * (weight.dim() - 2))
    up, down = truncate(smoothed.flatten(1), layer.rank)
    layer.smoothing = smoothing
    layer.up = up.to(HALF).reshape(layer.up.shape).contiguous()
    layer.down = down.to(HALF).reshape(layer.down.shape).contiguous()
    product = layer.up.flatten(1).to(weight.dtype) @ layer.down.flatten(1).to(weight.dtype)
    layer.codes, layer.ranged = None, False
    layer.weight = nn.Parameter(smoothed - product.view(weight.shape), requires_grad=False)


def split_error(
    layer: QuantizedLayer, weight: Tensor, smoothing: Tensor, x: Tensor, output: Tensor, range: WeightRange
) -> Tensor:
    """Split a weight as ``split_weight`` does, round the residual, and take the mean squared error of the output."""
    split_weight(layer, weight, smoothing)
    layer.find_weight_range(range)
    layer.fold()
    return (layer(x) - output).square().mean()


def channel_largest(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """The largest magnitude of each channel (I,) of the input of ``layer``."""
    return x.transpose(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1).abs().amax(1)


@torch.no_grad()
def add_branches(
    full: Network,
    layers: dict[str, QuantizedLayer],
    rows: CalibrationRows,
    config: LowRankBranches,
    once: Callable[..., None] | None = None,
) -> dict[str, float | None]:
    """Smooth each of ``layers`` and split its weight; returns the migration strength of each, None for no smoothing.

    Two passes of the full-precision network ``full``, from which ``layers`` were inserted at the same paths with a
    branch: the first takes the largest input of each channel over all ``rows``, the second compares the candidates, and
    no smoothing, by the squared error of the quantised layer's output. ``once`` is `tfmq.session.Session.learn`, which
    takes a layer's strength from a workspace where it is there. Raises ValueError for activations that are not finite.
    """
    largest: dict[str, Tensor] = {}
    chosen: dict[str, float | None] = {}

    def record(path: str, layer: nn.Conv2d | nn.Linear, x: Tensor, output: Tensor) -> None:
        found = channel_largest(layer, x)
        if not torch.isfinite(found).all():
            raise ValueError(f"the activation at {path} holds NaN or infinity on the calibration set")
        largest[path] = torch.maximum(largest.get(path, found), found)

    def choose(path: str, layer: nn.Conv2d | nn.Linear, x: Tensor, output: Tensor) -> None:
        twin, weight = layers[path], layer.weight
        weight_largest = weight.transpose(0, 1).flatten(1).abs().amax(1)
        smoothings: dict[float | None, Tensor] = {None: torch.ones_like(weight_largest)}
        for i in range(config.candidates):
            strength = i / (config.candidates - 1) if config.candidates > 1 else 0.5
            smoothings[strength] = smoothing_factors(largest[path], weight_largest, strength)

        def error(strength: float | None) -> float:
            return split_error(twin, weight, smoothings[strength], x, output, config.range).item()

        def search() -> list[float]:
            chosen[path] = min(smoothings, key=error)
            return []

        def restore(kept: dict[str, Tensor]) -> None:
            chosen[path] = strengths[int(kept["strength"])]

        strengths = list(smoothings)
        if once is None:
            search()
        else:
            once(path, search, lambda: {"strength": torch.tensor(strengths.index(chosen[path]))}, restore)
        split_weight(twin, weight, smoothings[chosen[path]])

    _run_hooked(full, layers, rows, config.batch, record)
    spread = torch.arange(min(config.search_rows, len(rows))) * len(rows) // min(config.search_rows, len(rows))
    _run_hooked(full, layers, rows[spread], len(spread), choose)
    return chosen


def _run_hooked(network: Network, paths: Iterable[str], rows: CalibrationRows, batch: int, hook: Hook) -> None:
    """Evaluate ``rows`` with ``hook`` called after each layer at ``paths``."""
    with hooked(network, paths, hook):
        for start in tqdm(range(0, len(rows), batch), desc="low-rank branches", disable=None):
            part = rows[slice(start, start + batch)]
            evaluate(network, part.latents, part.timesteps.to(network.device), part.context, part.inputs)


@contextmanager
def hooked(network: Network, paths: Iterable[str], hook: Hook) -> Iterator[None]:
    """Call ``hook(path, layer, input, output)`` after each layer of ``network`` at ``paths``."""

    def attach(path: str) -> RemovableHandle:
        layer = network.get_submodule(path)
        return layer.register_forward_hook(lambda module, args, output: hook(path, module, args[0], output))

    handles = [attach(path) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
