"""What a suite will cost, said before it is run: evaluations of the network, steps, images, disk, memory and hours.

Counts follow from settings and from the networks' structure alone, by the code that later does the work; hours follow
from them and from one evaluation that was timed. Nothing here touches files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from baselines import recipe_under
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, SIMULATED, Cell
from benchmarks.suite.tasks import Task
from tfmq.cost import Planned, plan_cost
from tfmq.live_bytes import FusedAttention, LiveBytes
from tfmq.network.backbone import Network, backbone_of, full_precision_bytes
from tfmq.network.calibration import CalibrationSet
from tfmq.network.sampling import SamplingSettings, predict_noise
from tfmq.packing import packed_bytes
from tfmq.passes import Recipe
from tfmq.plan import Protocol, amended_plan, insert_quantizers
from tfmq.precision import Precision

GIB = 2**30
FLOAT = 4
NOT_APPLICABLE = "not applicable"
# What a quantised evaluation, and a row that is learned on, take in evaluations of full precision: about the medians
# over the rows of the small suite, on a CPU. On a GPU learning takes less: by operations alone it is 3. With 4, at 40
# TFLOP/s, TFMQ-DM and Q-Diffusion together take 8.2 hours on LSUN-Bedrooms at w4a8, where TFMQ-DM's authors report 7.6
# on an H800 (arXiv 2407.19547).
QUANTIZED, LEARNED, LEARNED_ON_GPU = 1.1, 6.0, 4.0
# Numbers that stay on the disk for each full-precision image: features, and feature maps where they are kept.
KEPT = {
    "inception": 2048 + 2023 + 1008,
    "efficientnet_lite0": 1280 + 1960 + 1000 + 16 * 112**2 + 24 * 56**2 + 40 * 28**2 + 112 * 14**2 + 320 * 7**2,
}


@dataclass(frozen=True)
class KnownNetwork:
    """What is known of a task's model without its weights.

    Attributes:
        unet: on the meta device.
        timesteps: (T,), those of the task's schedule.
        tokens: of its context, where it has one.
        counted: what `prediction_bytes` has counted, by its arguments.
    """

    unet: Network
    timesteps: torch.Tensor
    tokens: int
    counted: dict[tuple[int, SamplingSettings], int] = field(default_factory=dict)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, size, size

    @cached_property
    def bytes(self) -> int:
        """Of the network in full precision."""
        return full_precision_bytes(self.unet)

    def latents(self, images: int) -> int:
        """Bytes that the latents of some images take."""
        return images * math.prod(self.latent_shape) * FLOAT

    def prediction_bytes(self, images: int, settings: SamplingSettings) -> int:
        """Most bytes that live at once while full precision predicts the noise of so many images at a step.

        The network and its inputs do not count. Bytes are counted from shapes alone, and are those of every machine.
        """
        if (images, settings) not in self.counted:
            meta = torch.device("meta")
            pool = self.random_pool(images, settings, meta)
            timestep = torch.zeros((), dtype=torch.int64, device=meta)
            given = pool.latents[0], timestep, pool.conditioning(0, slice(None), meta), settings.guidance_scale
            with FusedAttention(), torch.no_grad(), LiveBytes() as live:
                predict_noise(self.unet, *given)
            self.counted[images, settings] = live.most
        return self.counted[images, settings]

    def random_pool(
        self,
        images: int,
        settings: SamplingSettings,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> CalibrationSet:
        """A calibration pool of random numbers, drawn on ``device``, with the shapes and time steps of a real one."""
        shape = len(self.timesteps), images, *self.latent_shape
        latents, noise = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
        backbone, guided = backbone_of(self.unet), settings.guidance_scale > 1
        condition = partial(backbone.random_condition, self.unet, images, self.tokens, device, generator)
        inputs = partial(backbone.random_inputs, self.unet, images, device, generator)
        return CalibrationSet(
            latents=latents,
            timesteps=self.timesteps,
            noise=noise,
            samples=torch.randn(shape[1:], device=device, generator=generator),
            alphas=torch.linspace(0.01, 1, shape[0] + 1, dtype=torch.float64),
            settings=settings,
            context=condition(),
            unconditional=condition() if guided else None,
            inputs=inputs(),
            unconditional_inputs=inputs() if guided else {},
        )


@dataclass(frozen=True)
class Rate:
    """One timed evaluation: where, of how many samples at once, and seconds a sample.

    Attributes:
        operations: in floating point that a sample takes, a multiplication and an addition counted as two.
        assumed: a sample's seconds on another device, a GPU, which stand in place of the timed ones.
        on_cpu: whether it was timed on a CPU.
        quantized: what a quantised evaluation takes, in evaluations.
        learning: what a row that is learned on takes, in evaluations; None where it was not measured.
        tf32: what an evaluation in TF32 takes, in evaluations; 1 where it was not measured.
    """

    device: str
    rows: int
    seconds: float
    operations: int
    assumed: float | None = None
    on_cpu: bool = True
    quantized: float = QUANTIZED
    learning: float | None = None
    tf32: float = 1.0

    @property
    def of_gpu(self) -> bool:
        """Whether it is planned for a GPU."""
        return not self.on_cpu or self.assumed is not None

    @property
    def planned(self) -> float:
        """The seconds to plan with."""
        return self.seconds if self.assumed is None else self.assumed

    @property
    def learned(self) -> float:
        """What a row that is learned on takes, in evaluations."""
        if self.learning is not None:
            return self.learning
        return LEARNED_ON_GPU if self.of_gpu else LEARNED


@dataclass(frozen=True)
class Item:
    """What one step of a task takes.

    Attributes:
        calibration, quantising, sampling, reference: evaluations of the network for a sample, by what they are
            for; under guidance an image takes two a step.
        optimizer_steps: of all reconstructions.
        images: that stay.
        disk, memory: bytes that stay, and that are held at most; None where that is not known.
        seconds: on one device, on a CPU with one thread.
        drawing: those of the seconds that go into images, and into errors along their trajectories.
        note: why there is nothing, or what is left out.
    """

    name: str
    calibration: int = 0
    quantising: int = 0
    sampling: int = 0
    reference: int = 0
    optimizer_steps: int = 0
    images: int = 0
    disk: int | None = 0
    memory: int | None = 0
    seconds: float = 0.0
    drawing: float = 0.0
    note: str = ""

    @property
    def evaluations(self) -> int:
        """All evaluations of the network."""
        return self.calibration + self.quantising + self.sampling + self.reference


@dataclass(frozen=True)
class Planner:
    """Plans the steps of one task of a suite: of all its cells, or those of some methods alone.

    Attributes:
        drawn: how many images cells have in place of the task's, where errors are measured along the trajectories of
            all of them: what `python -m benchmarks rounds` draws.
    """

    suite: Suite
    task: Task
    network: KnownNetwork
    rate: Rate
    methods: Sequence[str] = ()
    held: dict[tuple[str, bool], Planned] = field(default_factory=dict)
    costs: dict[Cell, tuple[Planned, int]] = field(default_factory=dict)
    drawn: Mapping[Cell, float] = field(default_factory=dict)

    def items(self) -> list[Item]:
        """What each step takes, from the calibration pool to the last cell, in the order in which they run."""
        cells = [cell for cell in self.suite.cells() if cell.task == self.task.name and cell.method != FULL_PRECISION]
        chosen = [cell for cell in cells if not self.methods or cell.method in self.methods]
        return [self.calibrate(), self.reference(), self.full_precision(), *self.cells(chosen)]

    def cells(self, chosen: Sequence[Cell]) -> list[Item]:
        """What some cells take, one after the other: of those that begin alike, the first learns for all."""
        learned: dict[tuple[object, ...], str] = {}
        return [self.cell(cell, learned) for cell in chosen]

    @cached_property
    def pool(self) -> CalibrationSet:
        """A calibration pool of the task's shapes and time steps, on the meta device."""
        return self.network.random_pool(self.task.calibration_images, self.sampling, torch.device("meta"))

    @property
    def sampling(self) -> SamplingSettings:
        """How the task is sampled."""
        return SamplingSettings(self.task.steps, self.task.eta, self.task.guidance_scale)

    @property
    def halves(self) -> int:
        """Evaluations that an image takes at a step: two under guidance."""
        return 1 if self.task.guidance_scale <= 1 else 2

    @property
    def passes(self) -> int:
        """Evaluations that drawing an image takes."""
        return self.halves * len(self.network.timesteps)

    @property
    def pool_bytes(self) -> int:
        """What a calibration pool takes, on the disk and in memory."""
        return sum(tensor.nbytes for tensor in self.pool.tensors.values())

    @property
    def image_bytes(self) -> int:
        """What the images of a cell take on the disk."""
        return 3 * self.task.resolution**2 * self.task.images

    @property
    def sampling_memory(self) -> int:
        """What drawing a batch takes with the full-precision network."""
        return self.network.bytes + self.network.prediction_bytes(self.task.batch, self.sampling)

    def calibrate(self) -> Item:
        """The calibration pools of all seeds."""
        evaluations = self.suite.pools * self.passes * self.task.calibration_images
        return Item(
            "calibrate",
            calibration=evaluations,
            disk=self.suite.pools * self.pool_bytes,
            memory=self.sampling_memory + self.pool_bytes,
            seconds=self.rate.planned * evaluations,
        )

    def reference(self) -> Item:
        """Full-precision samples of other seeds."""
        evaluations = self.passes * self.task.reference_images
        return Item(
            "reference",
            reference=evaluations,
            disk=self._kept(self.task.reference_images),
            memory=self.sampling_memory if evaluations else 0,
            seconds=self.rate.planned * evaluations,
        )

    def full_precision(self) -> Item:
        """The cell that the others are compared with, its trajectory, and what evaluators see of it.

        In TF32 where its task lets a GPU draw it so: its first batches are then drawn in float32 too.
        """
        full = Cell(self.task.name, FULL_PRECISION, "w32a32")
        images = round(self.drawn.get(full, self.task.images))
        in_tf32 = self.task.tf32 and self.rate.of_gpu and full not in self.drawn
        checked = min(self.task.checked_batches * self.task.batch, images) if in_tf32 else 0
        evaluations = self.passes * (images + checked)
        seconds = self.rate.planned * self.passes * (images * (self.rate.tf32 if in_tf32 else 1) + checked)
        step = self.network.latents(min(self.task.batch, self.task.images))
        return Item(
            FULL_PRECISION,
            sampling=evaluations,
            images=images,
            disk=self.image_bytes + 2 * len(self.network.timesteps) * step + self._kept(self.task.images),
            memory=self.sampling_memory,
            seconds=seconds,
            drawing=seconds,
            note=f"in TF32, an evaluation as {self.rate.tf32:.2g}; {checked:,} in float32 too" if in_tf32 else "",
        )

    def cell(self, cell: Cell, learned: dict[tuple[object, ...], str] | None = None) -> Item:
        """A quantised cell: quantising, its images, and the errors of its predictions on one batch's trajectory.

        Its seconds are without what is in ``learned``, the beginnings of recipes that cells before it have learned;
        its own are added.
        """
        name = cell.name.removeprefix(f"{self.task.name}/")
        method, precision = discover.method(cell.method), Precision.parse(cell.precision)
        protocol = method.protocol(cell.protocol)
        if protocol is None or method.objection(precision):
            return Item(name, note=NOT_APPLICABLE)
        settings = read(method.config, self.suite.settings(cell.task, cell.method), f"methods.{cell.method}")
        recipe = recipe_under(cell.protocol, settings)
        if cell.backend != SIMULATED:
            structure = quantized_structure(self.network.unet, precision, recipe, protocol)
            if discover.backend(cell.backend).refusal(structure):
                return Item(name, note=NOT_APPLICABLE)
        if cell not in self.costs:
            self.costs[cell] = (
                plan_cost(self.network.unet, precision, recipe, self.pool, protocol, memory=False),
                checkpoint_bytes(self.network.unet, precision, recipe, protocol),
            )
        planned, stored = self.costs[cell]
        cost = planned.cost
        images = round(self.drawn.get(cell, self.task.images))
        followed = images if cell in self.drawn else min(self.task.batch, images)
        sampled = self.passes * (images + followed)
        own, teacher = self._learned(cell, recipe, planned, {} if learned is None else learned)
        drawing = self.rate.planned * self.rate.quantized * sampled
        quantising = self.rate.planned * (cost.unet_evaluations + self.rate.learned * own)
        held = self._held(cell, recipe, precision, protocol)
        return Item(
            name,
            quantising=cost.unet_evaluations,
            sampling=sampled,
            optimizer_steps=cost.optimizer_steps,
            images=images,
            disk=self.image_bytes + stored,
            memory=held.held and max(held.held + self.pool_bytes, self.network.bytes + self.sampling_memory),
            seconds=quantising + drawing,
            drawing=drawing,
            note=", ".join(
                ([f"while it learns, {held.on_disk / GIB:,.0f} GiB more wait on the disk"] if held.on_disk else [])
                + ([f"learns what {teacher} has learned"] if teacher else [])
            ),
        )

    def _learned(
        self, cell: Cell, recipe: Recipe, planned: Planned, learned: dict[tuple[object, ...], str]
    ) -> tuple[int, str]:
        """The rows that a cell learns on itself, and the cell that has learned the rest, if any.

        Passes before the first that sees activations give the same at all widths of these, so they are learned once
        (see `tfmq.session`).
        """
        rows, teacher = 0, ""
        seen = False
        for index, (step, (_, cost)) in enumerate(zip(recipe, planned.costs, strict=True)):
            seen = seen or step.sees_activations
            bits = cell.precision if seen else Precision.parse(cell.precision).weight_bits
            beginning = (cell.protocol, cell.seed, bits, repr(recipe[: index + 1]))
            if not cost.learned_rows:
                continue
            if beginning in learned:
                teacher = learned[beginning]
            else:
                learned[beginning] = cell.name.removeprefix(f"{self.task.name}/")
                rows += cost.learned_rows
        return rows, teacher

    def _held(self, cell: Cell, recipe: Recipe, precision: Precision, protocol: Protocol) -> Planned:
        """What quantising a cell holds, from one of the cells of its row with like activations: bits matter little."""
        key = cell.row, precision.quantizes_activations
        if key not in self.held:
            self.held[key] = plan_cost(self.network.unet, precision, recipe, self.pool, protocol)
        return self.held[key]

    def _kept(self, images: int) -> int:
        return KEPT.get(self.task.evaluator, 0) * FLOAT * images


def checkpoint_bytes(unet: Network, precision: Precision, recipe: Recipe, protocol: Protocol) -> int:
    """The size of a quantised checkpoint of ``unet``, which is on the meta device, without tables over time steps."""
    return packed_bytes(quantized_structure(unet, precision, recipe, protocol))


def quantized_structure(unet: Network, precision: Precision, recipe: Recipe, protocol: Protocol) -> Network:
    """A copy of ``unet`` with its quantisers, before anything is quantised."""
    twin = copy.deepcopy(unet)
    insert_quantizers(twin, amended_plan(twin, backbone_of(twin), precision, recipe, protocol))
    return twin


def total(name: str, found: Sequence[Item]) -> Item:
    """The sum of some items, with the memory of the largest."""
    summed = ("calibration", "quantising", "sampling", "reference", "optimizer_steps", "images", "seconds", "drawing")
    return Item(
        name,
        **{field: sum(getattr(item, field) for item in found) for field in summed},
        disk=sum(item.disk or 0 for item in found),
        memory=max((item.memory or 0 for item in found), default=0),
        note="at least" if any(item.disk is None or item.memory is None for item in found) else "",
    )
