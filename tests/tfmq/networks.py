"""Tiny random networks, calibration rows, recipes and sessions for the tests of the library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, PNDMScheduler, SchedulerMixin, UNet2DConditionModel, UNet2DModel, VQModel

from tfmq.network.backbone import backbone_of
from tfmq.network.calibration import CalibrationRows, CalibrationSet, Draw, Spaced, collect_calibration
from tfmq.network.sampling import Conditioning, SamplingSettings, sample
from tfmq.network.unet import UNet
from tfmq.passes import Pass, Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.block_reconstruction import BlockReconstruction
from tfmq.passes.correction import correction_of
from tfmq.passes.finite_set import FiniteSetCalibration
from tfmq.passes.grids import Grids
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.step_sizes import StepSizes
from tfmq.passes.temporal_reconstruction import TemporalReconstruction
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import SHARED, Protocol, QuantizationPlan, amended_plan
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.session import QuantizationReport, Session

SETTINGS = SamplingSettings(steps=5)
ALL_ROWS = Spaced(5, 4)  # of the pool below


def unconditional(seed: int = 0) -> UNet2DModel:
    """An LDM-like UNet: 3x8x8 latents, attention on the lower level and in the middle."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    ).eval()


def conditional(seed: int = 0) -> UNet2DConditionModel:
    """A Stable-Diffusion-like UNet with cross-attention to 12-dimensional context."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def first_stage() -> VQModel:
    """An LDM's decoder, with a scaling factor of 0.7."""
    torch.manual_seed(3)
    return VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        scaling_factor=0.7,
    ).eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pndm() -> PNDMScheduler:
    """As Stable Diffusion's: of N steps the second noisiest is evaluated twice."""
    return PNDMScheduler.from_config(scheduler().config, skip_prk_steps=True)


def noise(images: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def pool(unet: UNet, images: int = 4) -> CalibrationSet:
    return collect_calibration(unet, scheduler(), noise(images), SETTINGS, batch=images)


@dataclass(frozen=True)
class Kind:
    """A kind of model: its network, how it is sampled, and the tokens of its context (0: it has none)."""

    build: Callable[[], UNet]
    scheduler: Callable[[], SchedulerMixin]
    settings: SamplingSettings
    tokens: int

    def conditioning(self, images: int) -> Conditioning | None:
        """A context for each image, and one unconditional context for all."""
        if not self.tokens:
            return None
        context = torch.randn(images + 1, self.tokens, 12, generator=torch.Generator().manual_seed(2))
        return Conditioning(context[1:], context[:1].expand(images, -1, -1))

    def pool(self, unet: UNet, images: int = 4) -> CalibrationSet:
        return collect_calibration(
            unet, self.scheduler(), noise(images), self.settings, batch=images, conditioning=self.conditioning(images)
        )

    def draw(self, unet: UNet, images: int = 2) -> torch.Tensor:
        """Samples with the network's correction, as the suite draws them."""
        conditioning, correction = self.conditioning(images), correction_of(unet)
        return sample(
            unet, self.scheduler(), noise(images), self.settings, conditioning=conditioning, correction=correction
        )


KINDS = {
    "unconditional": Kind(unconditional, scheduler, SETTINGS, tokens=0),
    "class": Kind(conditional, scheduler, SamplingSettings(steps=5, guidance_scale=3.0), tokens=1),
    "text": Kind(conditional, pndm, SamplingSettings(steps=5, guidance_scale=7.5), tokens=5),
}


def recipe(
    *,
    rounding: RoundingConfig | None = None,
    temporal: RoundingConfig | None = None,
    scales: str = "shared",
    step_sizes: StepSizeConfig | None = None,
    split_shortcuts: bool = False,
    weight_range: str = "search",
    data: Draw = ALL_ROWS,
    batch: int = 64,
    memory_bytes: int = 2**30,
) -> Recipe:
    """The usual passes: nearest rounding in the place of what is not learned, and rows that are drawn by ``data``."""
    passes = [Grids(split_shortcuts=split_shortcuts), WeightRanges(weight_range)]
    if temporal is not None:
        passes.append(TemporalReconstruction(temporal))
    if rounding is not None:
        passes.append(BlockReconstruction(rounding, data, batch, memory_bytes))
    passes.append(RoundToNearest())
    if scales == "temporal":
        passes.append(FiniteSetCalibration())
    passes.append(ActivationRanges(data, batch=batch, per_step=scales == "per_step"))
    if step_sizes is not None:
        passes.append(StepSizes(step_sizes, data, batch, memory_bytes))
    return tuple(passes)


def drawing(rows: CalibrationRows) -> Draw:
    """A draw of these rows, whatever the pool."""
    return lambda pool, generator: rows


def pool_of(rows: CalibrationRows) -> CalibrationSet:
    """A pool with the time steps and the shapes of ``rows``, for recipes that draw by ``drawing(rows)``."""
    timesteps = rows.timesteps.unique().flip(0)
    latents = rows.latents[None, :1].expand(len(timesteps), -1, -1, -1, -1)
    context = None if rows.context is None else rows.context[:1]
    alphas = torch.linspace(0.1, 1, len(timesteps) + 1, dtype=torch.float64)
    settings = SamplingSettings(len(timesteps))
    return CalibrationSet(latents, timesteps, latents, latents[0], alphas, settings, context)


def plan(unet: UNet, precision: str, *passes: Pass, protocol: Protocol = SHARED) -> QuantizationPlan:
    """The protocol's plan for a network, as ``passes`` amend it."""
    return amended_plan(unet, backbone_of(unet), Precision.parse(precision), passes, protocol)


def session(unet: UNet, full: UNet, pool: CalibrationSet, precision: str = "w4a8", **parts: object) -> Session:
    """A session on a network whose quantised layers are in place already; ``parts`` replace its usual parts."""
    given = {"backbone": backbone_of(full), "plan": QuantizationPlan({}, {}), "protocol": SHARED}
    given |= {"precision": Precision.parse(precision), "generator": generator()} | parts
    return Session(network=unet, full=full, pool=pool, **given)


def run(session: Session, step: Pass, rows: CalibrationRows | None = None) -> None:
    """Run one pass in a session."""
    with session.running(step):
        step.run(session, rows)


def quantized(
    passes: Recipe,
    precision: str | Precision = "w4a8",
    build: Callable[[], UNet] = unconditional,
    recorded: CalibrationSet | None = None,
    protocol: Protocol = SHARED,
) -> tuple[UNet, UNet, CalibrationSet, QuantizationReport]:
    """A quantised network, the full-precision one, the pool (``recorded``, or else its own) and the report."""
    unet = build()
    full = copy.deepcopy(unet)
    if recorded is None:
        recorded = pool(full)
    parsed = Precision.parse(precision) if isinstance(precision, str) else precision
    report = quantize_(unet, parsed, passes, recorded, generator(), protocol)
    return unet, full, recorded, report


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
