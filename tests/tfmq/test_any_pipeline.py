"""Pipelines drawn at random: quantised without a loss, each makes its own images, or is refused with a known reason.

Weights are integers from -128 to 127 times a power of two in each output channel, so that rounding them to 8 bits
changes none. What is left is all that surrounds rounding: the network taken apart and put together, calibrated, and
called by its stock pipeline. The stock pipeline in full precision is the right value.

``TFMQ_DRAWS=3000`` draws more.
"""

from __future__ import annotations

import copy
import inspect
import os
from dataclasses import dataclass

import diffusers
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    LatentConsistencyModelPipeline,
    LDMPipeline,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tfmq import networks, pipelines
from tests.tfmq.network.test_transformer import transformer
from tfmq.network.backbone import Network
from tfmq.network.calibration import collect_calibration
from tfmq.network.conditioning import Conditioning, Control
from tfmq.network.sampling import SamplingSettings, sample
from tfmq.network.schedulers import EXACT, adds_noise
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.precision import Precision
from tfmq.quantization import quantize_

FAMILIES = ("ldm", "ddpm", "dit", "text", "inpainting", "controlnet", "sdxl", "lcm")
# Those of DiTPipeline, whose class for no class is the one after the last.
CLASSES = 1000
DRAWS = int(os.environ.get("TFMQ_DRAWS", "160"))
# Largest relative difference from the stock pipeline, in the Euclidean norm. Samplers of few steps amplify rounding;
# tables of temporal features are float32, which in half precision is another rounding than the network's own.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
CACHED_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 0.05, torch.bfloat16: 0.25}
SCHEDULERS = sorted(EXACT)
# The pipelines that take some schedulers alone: DDPMPipeline hands each step a generator.
OWN_SCHEDULER = {
    "lcm": ["LCMScheduler"],
    "ddpm": [name for name in SCHEDULERS if "generator" in inspect.signature(getattr(diffusers, name).step).parameters],
}
# Sizes of latents; only networks with a context fit what they upsample to any.
SIZES = {"dit": (4, 8), "ldm": (4, 6, 8), "ddpm": (4, 6, 8)}
# LDMPipeline draws noise in float32 whatever the network is in, and DDPMPipeline gives its images to numpy as they are.
TYPES = {"ldm": [torch.float32], "ddpm": [torch.float64, torch.float32, torch.float16]}


@dataclass(frozen=True)
class Drawn:
    """One pipeline and one call of it."""

    family: str
    dtype: torch.dtype
    channels_last: bool
    height: int
    width: int
    scheduler: str
    prediction: str
    guidance: float
    steps: int
    images: int
    cached: bool
    seed: int


@st.composite
def drawn(draw: st.DrawFn, family: str) -> Drawn:
    scheduler = draw(st.sampled_from(OWN_SCHEDULER.get(family, SCHEDULERS)))
    square = family in ("ldm", "ddpm", "dit")
    height = draw(st.sampled_from(SIZES.get(family, (4, 6, 8, 9, 11))))
    return Drawn(
        family=family,
        dtype=draw(st.sampled_from(TYPES.get(family, list(TOLERANCE)))),
        channels_last=draw(st.booleans()),
        height=height,
        width=height if square else draw(st.sampled_from((4, 5, 8, 10))),
        scheduler=scheduler,
        prediction=draw(st.sampled_from(EXACT[scheduler].predictions)),
        guidance=draw(st.sampled_from((0.0, 0.5, 1.0, 1.5, 4.0))),
        steps=draw(st.integers(2, 5)),
        images=draw(st.integers(1, 3)),
        cached=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def on_grid(network: Network, generator: torch.Generator) -> Network:
    """The network with weights that are integers from -128 to 127, both taken, times a power of two by channel."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.data.flatten(1)
            step = 2.0 ** torch.log2(weight.abs().amax(1, keepdim=True).clamp_min(1e-4) / 127).ceil()
            codes = (weight / step).round().clamp(-128, 127)
            codes[:, 0], codes[:, 1] = -128, 127
            codes = codes[:, torch.randperm(codes.shape[1], generator=generator)]
            module.weight.data = (codes * step).view_as(module.weight)
    return network


def network_of(case: Drawn) -> Network:
    torch.manual_seed(case.seed)
    if case.family == "dit":
        network = transformer(CLASSES)
        network.register_to_config(sample_size=case.height)
        network = type(network).from_config(network.config).eval()
    elif case.family in ("ldm", "ddpm"):
        network = UNet2DModel(
            sample_size=case.height,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
        ).eval()
    else:
        more = {"inpainting": {"in_channels": 9}, "sdxl": pipelines.XL, "lcm": {"time_cond_proj_dim": 8}}
        network = pipelines.unet(**{"block_out_channels": (8, 16), "norm_num_groups": 4, **more.get(case.family, {})})
    return on_grid(network, torch.Generator().manual_seed(case.seed))


def scheduler_of(case: Drawn) -> SchedulerMixin:
    kind = getattr(diffusers, case.scheduler)
    options = {
        "prediction_type": case.prediction,
        "lower_order_final": True,
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    takes = inspect.signature(kind.__init__).parameters
    return kind(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        **{name: value for name, value in options.items() if name in takes},
    )


def vae() -> diffusers.AutoencoderKL:
    """One that makes 8 pixels of a latent, as most do."""
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def tensors(case: Drawn) -> dict[str, Tensor]:
    """Prompts and pictures of a call, one row an image."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    width = 16 if case.family == "sdxl" else 8

    def randn(*shape: int) -> Tensor:
        return torch.randn(case.images, *shape, generator=generator).to(case.dtype)

    return {
        "context": randn(5, width),
        "unconditional": randn(5, width),
        "pooled": randn(6),
        "pooled_off": randn(6),
        "picture": randn(3, 8 * case.height, 8 * case.width).sigmoid(),
        "masked": randn(4, case.height, case.width),
    }


def pipeline_of(case: Drawn, network: Network) -> DiffusionPipeline:
    scheduler = scheduler_of(case)
    plain = {"text_encoder": None, "tokenizer": None, "vae": vae(), "unet": network, "scheduler": scheduler}
    safe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if case.family == "ldm":
        pipeline = LDMPipeline(networks.first_stage(), network, scheduler)
    elif case.family == "ddpm":
        pipeline = (DDIMPipeline if case.scheduler == "DDIMScheduler" else DDPMPipeline)(network, scheduler)
    elif case.family == "dit":
        first_stage = vae()
        first_stage.register_to_config(latent_channels=3)
        pipeline = DiTPipeline(network, type(first_stage).from_config(first_stage.config).eval(), scheduler)
    elif case.family == "sdxl":
        pipeline = StableDiffusionXLPipeline(
            text_encoder_2=None, tokenizer_2=None, add_watermarker=False, force_zeros_for_empty_prompt=False, **plain
        )
    elif case.family == "lcm":
        pipeline = LatentConsistencyModelPipeline(**plain, **safe)
    elif case.family == "inpainting":
        pipeline = StableDiffusionInpaintPipeline(**plain, **safe)
    elif case.family == "controlnet":
        torch.manual_seed(case.seed)
        side = pipelines.controlnet(
            block_out_channels=(8, 16), norm_num_groups=4, conditioning_embedding_out_channels=(4,) * 4
        )
        pipeline = StableDiffusionControlNetPipeline(controlnet=side, **plain, **safe)
    else:
        pipeline = StableDiffusionPipeline(**plain, **safe)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(case.dtype)
    return pipeline


def run(case: Drawn, pipeline: DiffusionPipeline) -> Tensor:
    """What the stock pipeline makes: latents, or images of those that have no latents to give."""
    given, generator = tensors(case), torch.Generator().manual_seed(case.seed + 2)
    torch.manual_seed(case.seed)  # some pipelines let their scheduler draw from the global generator
    steps = {"num_inference_steps": case.steps, "generator": generator}
    if case.family in ("ldm", "ddpm"):
        return torch.as_tensor(pipeline(batch_size=case.images, output_type="np", **steps).images)
    if case.family == "dit":
        labels = list(range(case.images))
        return torch.as_tensor(pipeline(labels, case.guidance, output_type="np", **steps).images)
    call = {
        "prompt_embeds": given["context"],
        "height": 8 * case.height,
        "width": 8 * case.width,
        "guidance_scale": case.guidance,
        "output_type": "latent",
        **steps,
    }
    if case.family != "lcm":
        call["negative_prompt_embeds"] = given["unconditional"]
    if case.family == "sdxl":
        call |= {"pooled_prompt_embeds": given["pooled"], "negative_pooled_prompt_embeds": given["pooled_off"]}
    if case.family == "controlnet":
        call["image"] = given["picture"]
    if case.family == "inpainting":
        mask = (given["picture"][:, :1] > 0.5).to(case.dtype)
        call |= {"image": given["picture"], "mask_image": mask, "masked_image_latents": given["masked"]}
    return pipeline(**call).images


def conditioning_of(case: Drawn, pipeline: DiffusionPipeline) -> Conditioning | None:
    """What the pipeline gives its network besides latents and time steps."""
    given = tensors(case)
    if case.family in ("ldm", "ddpm"):
        return None
    if case.family == "dit":
        return Conditioning(torch.arange(case.images), torch.full((case.images,), CLASSES))
    both = given["context"], given["unconditional"]
    if case.family == "sdxl":
        side = (8 * case.height, 8 * case.width)
        sizes = torch.tensor([*side, 0, 0, *side], dtype=case.dtype).repeat(case.images, 1)
        return Conditioning(
            *both, {"text_embeds": given["pooled"], "time_ids": sizes}, {"text_embeds": given["pooled_off"]}
        )
    if case.family == "lcm":
        scale = torch.tensor([case.guidance - 1]).repeat(case.images)
        embedded = pipeline.get_guidance_scale_embedding(scale, embedding_dim=8).to(case.dtype)
        return Conditioning(given["context"], None, {"timestep_cond": embedded})
    if case.family == "inpainting":
        mask = (given["picture"][:, :1] > 0.5).to(case.dtype)
        small = nn.functional.interpolate(mask, size=(case.height, case.width))
        return Conditioning(*both, {"channels": torch.cat([small, given["masked"]], 1)})
    if case.family == "controlnet":
        return Conditioning(*both, controls=(Control(pipeline.controlnet, given["picture"]),))
    return Conditioning(*both)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_quantised_without_loss_makes_its_own_images(family):
    count = {"made": 0, "refused": 0}
    # Two in five of what is drawn for LCM are refused.
    draws = DRAWS // len(FAMILIES) * (2 if family == "lcm" else 1)

    @settings(
        max_examples=draws,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn(family))
    @torch.no_grad()
    def holds(case: Drawn) -> None:
        count[check(case)] += 1

    holds()
    print(family, count)
    assert count["made"] > sum(count.values()) / 3


def check(case: Drawn) -> str:
    """Whether the pipeline was ``made`` as it should be, or ``refused`` for a known reason."""
    network = network_of(case)
    pipeline = pipeline_of(case, network)
    network = pipeline.components["transformer" if case.family == "dit" else "unet"]
    if case.channels_last:
        network.to(memory_format=torch.channels_last)
    expected = run(case, pipeline)
    assert torch.isfinite(expected).all(), "there is nothing to compare with"
    pipeline_gives_latents = case.family not in ("ldm", "ddpm", "dit")
    generator = torch.Generator().manual_seed(case.seed + 2)
    channels = 4 if pipeline_gives_latents else 3
    conditioning = conditioning_of(case, pipeline)
    sampling = SamplingSettings(case.steps, guidance_scale=1.0 if conditioning is None else case.guidance)
    noise = torch.randn(case.images, channels, case.height, case.width, generator=generator, dtype=case.dtype)
    schedule = copy.deepcopy(pipeline.scheduler)
    schedule.set_timesteps(case.steps)
    step_noise = torch.randn(len(schedule.timesteps), *noise.shape, generator=generator).to(case.dtype)
    recipe = (*((TemporalCache("all"),) if case.cached else ()), WeightRanges("minmax"), RoundToNearest())
    try:
        pool = collect_calibration(
            network,
            pipeline.scheduler,
            noise,
            sampling,
            batch=case.images,
            conditioning=conditioning,
            step_noise=step_noise,
        )
        quantize_(network, Precision.parse("w8a32"), recipe, pool, networks.generator())
    except ValueError as error:
        assert known(case, str(error)), (case, str(error))
        return "refused"
    found = run(case, pipeline)
    assert found.dtype == expected.dtype
    assert close(case, found, expected), case
    if pipeline_gives_latents and not adds_noise(pipeline.scheduler, 0.0):
        latents = sample(network, pipeline.scheduler, noise, sampling, conditioning=conditioning)
        assert close(case, latents, expected), case
    return "made"


def close(case: Drawn, found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal but for rounding in the case's number type."""
    tolerance = (CACHED_TOLERANCE if case.cached else TOLERANCE)[case.dtype]
    return bool((found.double() - expected.double()).norm() <= tolerance * expected.double().norm())


def known(case: Drawn, message: str) -> bool:
    """Whether a refusal is one that the documentation names."""
    return case.cached and case.family in ("sdxl", "lcm") and "time step alone" in message
