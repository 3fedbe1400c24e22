"""Progressively aligned reconstruction of TCAQ-DM (arXiv 2412.16700): learning again where the quantised network goes.

Calibration rows are recorded along trajectories of the full-precision network. When it is sampled, the quantised one is
at other latents, the further the more steps it has taken. So rows are recorded again along its own trajectories, and it
is reconstructed on these, a few times over.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tfmq.cost import Shapes, evaluation_bytes, units_of
from tfmq.modules.channel_scales import ChannelScales
from tfmq.modules.fake_quantize import FakeQuantize
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Backbone, Block, Network
from tfmq.network.calibration import CalibrationSet, Spaced, collect_calibration
from tfmq.network.offload import BlockStream, place_for
from tfmq.network.rows import CalibrationRows
from tfmq.network.schedulers import adds_noise
from tfmq.packing import tensors_hash
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.correction import trajectory_evaluations
from tfmq.passes.reconstruction import (
    RoundingConfig,
    StepSizeConfig,
    block_loss,
    learn_roundings,
    learn_scales,
    loss_against,
    rounding_bytes,
    step_size_bytes,
)
from tfmq.plan import activation_quantizers, quantized_layers
from tfmq.session import Session
from tfmq.settings import check_counts
from tfmq.state import check_finished

# How far a weight starts on its way from its place in full precision to its code.
KEPT = 0.5


@dataclass(frozen=True)
class Recalibration(Pass):
    """Sample the calibration trajectories with the quantised network, and reconstruct it on them, in several rounds.

    In a round every block learns its roundings, and then the step sizes of its activations that have one for all time
    steps. Its inputs are those of the quantised network on its own trajectory, and targets the outputs of the
    full-precision network that is given the same latents. All that is quantised is quantised while it learns. Roundings
    start half-way between weight and code (`half_way`), so that a short round changes those that are doubtful. Layers
    that depend on the time step or conditions alone see the same inputs on any trajectory, and stay.

    Trajectories begin with the pool's noise. Steps that add noise draw it anew in each round.

    Attributes:
        rounds: how often.
        rounding: how roundings are learned, with the iterations of one round.
        step_sizes: the same of step sizes; None leaves them as they are.
        data: which rows of each new pool; as many of its images are sampled.
        batch: rows evaluated at once.
        memory_bytes: as in `tfmq.passes.block_reconstruction.BlockReconstruction`.
    """

    rounds: int = 3
    rounding: RoundingConfig = RoundingConfig(iterations=5_000)
    step_sizes: StepSizeConfig | None = StepSizeConfig(iterations=1_000)
    data: Spaced = Spaced(20, 256)
    batch: int = 64
    memory_bytes: int = field(default=8 * 2**30, compare=False)

    def __post_init__(self) -> None:
        check_counts(self, "rounds", "batch", "memory_bytes")

    def run(self, session: Session, rows: None) -> None:
        """See `Pass`. Raises ValueError for a network that is not quantised yet or has branches, and as `resampled`."""
        check_finished(session.network, self.name)
        for path, layer in quantized_layers(session.network).items():
            if layer.rank:
                raise ValueError(f"{path} has a low-rank branch, whose residual is not learned again: leave it out")
        for index in range(self.rounds):
            pool = resampled(session.network, session.pool, self.data.images, self.batch, session.generator)
            session.count_evaluations(trajectory_evaluations(pool, self.data.images))
            found = self.data(pool, session.generator)
            self._reconstruct(session, found.to(session.network.device), f"round {index + 1}, {_hash(found)}")

    def cost(self, shapes: Shapes, rows: None) -> Cost:
        """See `Pass`."""
        rows_of_round = self._rows(shapes)
        evaluations = trajectory_evaluations(shapes.pool, self.data.images) + 2 * len(rows_of_round)
        found = Cost()
        for settings, paths in ((self.rounding, self._rounded(shapes)), (self.step_sizes, self._calibrated(shapes))):
            if settings is not None and paths:
                iterations = settings.iterations
                learned = iterations * min(settings.batch, len(rows_of_round))
                found += Cost(0, iterations * units_of(shapes.backbone, paths), learned)
        once = Cost(evaluations) + found
        return Cost(*(self.rounds * part for part in vars(once).values()))

    def memory(self, shapes: Shapes, rows: None) -> Memory:
        """See `Pass`."""
        found = self._rows(shapes)
        working = [shapes.of_blocks(found, self.batch, evaluation_bytes)]
        measure = partial(_rounding_bytes, self._rounded(shapes), shapes.precision.quantizes_activations)
        working.append(shapes.of_blocks(found, self.rounding.batch, measure))
        if self.step_sizes is not None and (paths := self._calibrated(shapes)):
            working.append(shapes.of_blocks(found, self.step_sizes.batch, partial(step_size_bytes, paths)))
        held = sum(part.nbytes for part in found.tensors.values())
        of_pool = sum(2 * row.nbytes for row in shapes.pool.latents[:, : self.data.images])
        waiting = [2 * each for each in shapes.waiting(found)]
        memory = Memory.of_blocks([max(each) for each in zip(*working, strict=True)], waiting, self.memory_bytes)
        return Memory(memory.held + held + of_pool, memory.on_disk)

    def _reconstruct(self, session: Session, rows: CalibrationRows, unit: str) -> None:
        network, full, backbone = session.network, session.full, session.backbone
        place = place_for(full, backbone, rows, 2, self.memory_bytes, session.workspace.allocate)
        reference, stream = (BlockStream(each, backbone, rows, self.batch, place) for each in (full, network))
        of_time = fixed_on_any_trajectory(backbone)
        for block in tqdm(backbone.blocks, desc=self.name, disable=None):
            targets = reference.outputs(block, reference.inputs(block))
            reference.advance(block, targets)
            inputs = stream.inputs(block)
            predict = partial(stream.evaluate, network, block, inputs)
            layers = {p: e for p, e in quantized_layers(network).items() if block.holds(p) and p not in of_time}
            if layers:
                for path, layer in layers.items():
                    half_way(layer, full.get_submodule(path).weight)
                loss = loss_against(targets, predict, self.rounding.norm)
                learn_roundings(session, f"{unit}, {block.path}", layers, loss, len(rows), self.rounding)
            quantizers = learnable(network, block, of_time)
            if self.step_sizes is not None and quantizers:
                loss = loss_against(targets, predict, self.step_sizes.norm)
                learn_scales(session, f"{unit}, {block.path}", quantizers, loss, len(rows), self.step_sizes)
            stream.advance(block, stream.outputs(block, inputs))
        session.count_evaluations(2 * len(rows))

    def _rows(self, shapes: Shapes) -> CalibrationRows:
        """Rows of the shapes of those of a round."""
        return self.data(shapes.pool, torch.Generator())

    def _rounded(self, shapes: Shapes) -> set[str]:
        return set(shapes.plan.layers) - fixed_on_any_trajectory(shapes.backbone)

    def _calibrated(self, shapes: Shapes) -> set[str]:
        """Paths of what has a step size to learn."""
        if not shapes.calibrates:
            return set()
        given = {*shapes.plan.layers, *shapes.plan.attentions}
        return given - shapes.tabulated - fixed_on_any_trajectory(shapes.backbone)


def resampled(
    network: Network, pool: CalibrationSet, images: int, batch: int, generator: torch.Generator
) -> CalibrationSet:
    """A pool of the trajectories of ``network`` from the first ``images`` of the noise of ``pool``, sampled likewise.

    Raises ValueError for a pool that does not say which scheduler recorded it, or was recorded with a ControlNet.
    """
    scheduler = pool.scheduler
    if scheduler is None:
        raise ValueError(
            "the pool does not say which scheduler recorded it, and Recalibration samples with the same: give "
            "dataclasses.replace(pool, scheduler=...)"
        )
    if pool.residuals:
        raise ValueError(
            "the pool was recorded with a ControlNet, whose residuals follow the latents, and Recalibration samples "
            "other latents: record it without, or take a recipe without Recalibration"
        )
    device = network.device
    first = pool.latents[0, :images].to(device)
    noise = first / _input_factor(pool)
    step_noise = None
    if adds_noise(scheduler, pool.settings.eta):
        step_noise = torch.randn(pool.steps, *first.shape, generator=generator).to(device)
    conditioning = pool.conditioning(0, slice(0, images), device)
    settings = pool.settings
    return collect_calibration(
        network, scheduler, noise, settings, batch=batch, conditioning=conditioning, step_noise=step_noise
    )


def _input_factor(pool: CalibrationSet) -> Tensor:
    """What the noise is multiplied by before the first evaluation, by the schedule and by the scaling of inputs."""
    scheduler = copy.deepcopy(pool.scheduler)
    assert scheduler is not None
    scheduler.set_timesteps(pool.settings.steps)
    return scheduler.scale_model_input(torch.ones(()) * scheduler.init_noise_sigma, scheduler.timesteps[0])


@torch.no_grad()
def half_way(layer: QuantizedLayer, weight: Tensor) -> None:
    """Let a rounded layer have its full-precision ``weight`` again, moved half of the way to its codes.

    Its range stays. Where a code is one of the two next to the weight, as after AdaRound, learning starts between the
    two, nearer to that one; a weight that lies outside of the grid stays at its end.
    """
    scales = layer.input_quantizer
    if isinstance(scales, ChannelScales):
        weight = weight * scales.factors.view(-1, *[1] * (weight.dim() - 2))
    layer.weight = nn.Parameter((weight + KEPT * (layer.weight - weight)).to(weight.dtype), requires_grad=False)
    layer.codes = None


def fixed_on_any_trajectory(backbone: Backbone) -> set[str]:
    """Paths of the layers whose inputs do not depend on the latents."""
    return {*backbone.temporal, *backbone.embedding}


def learnable(network: Network, block: Block, fixed: Collection[str]) -> dict[str, FakeQuantize]:
    """The quantisers of a block that have one scale for all steps, but for those of the layers ``fixed``."""
    before = tuple(f"{path}." for path in fixed)
    found = {path: q for path, q in activation_quantizers(network).items() if q.enabled and not q.per_step}
    return {path: q for path, q in found.items() if block.holds(path) and not path.startswith(before)}


def _hash(rows: CalibrationRows) -> str:
    """What tells rows apart; what is learned on them is kept under it."""
    return tensors_hash({name: part.cpu().contiguous() for name, part in rows.tensors.items()})[:16]


def _rounding_bytes(paths: Collection[str], quantizes: bool, stream: BlockStream, block: Block) -> int:
    """Of learning the roundings of a block's layers at ``paths`` while its activations are quantised."""
    layers = [e for p, e in quantized_layers(stream.network).items() if block.holds(p) and p in paths]
    if not layers:
        return 0
    quantizers = [q for path, q in activation_quantizers(stream.network).items() if block.holds(path)]
    for quantizer in quantizers:
        quantizer.enabled = quantizes
    found = rounding_bytes(layers, partial(block_loss, stream, block))
    for quantizer in quantizers:
        quantizer.enabled = False
    return found
