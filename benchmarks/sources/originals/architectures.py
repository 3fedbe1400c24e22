"""The published models' architectures, as settings of diffusers' classes, each with the size of the tests' checkpoints.

The values are those of the published configuration files. The two sizes differ in widths and counts alone, and which of
them a file has is read from its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Settings = Mapping[str, object]


@dataclass(frozen=True)
class Size:
    """Settings of an architecture's networks, with their class under ``_class_name``; None where it has none.

    Attributes:
        second_text_encoder: with a projection, in SDXL.
        classes: that have a learned embedding; one embedding more stands for none.
        heads: of every attention, where the UNet's settings cannot say it (see `tfmq.set_attention_heads`).
    """

    unet: Settings
    first_stage: Settings | None = None
    text_encoder: Settings | None = None
    second_text_encoder: Settings | None = None
    classes: int = 0
    heads: int | None = None


@dataclass(frozen=True)
class Architecture:
    """A published model.

    Attributes:
        title: what it is, for people.
        family: the file of `benchmarks/models` that loads it.
        scheduler: settings of the sampler, with the class under ``_class_name``.
        full, tiny: its size, and that of the tests' checkpoints.
        pipeline: the one of diffusers that loads the folder too; None where there is none, or it gives other images.
        averaged: samples are those of the weights averaged over training (EMA), which stand beside the others.
        scale_in_file: the first stage's scale is a tensor of the file.
        flat: the file is the UNet's own dictionary.
        dtype: of the file's numbers, and of those that it is converted to.
    """

    title: str
    family: str
    scheduler: Settings
    full: Size
    tiny: Size
    pipeline: str | None = None
    averaged: bool = False
    scale_in_file: bool = False
    flat: bool = False
    dtype: torch.dtype = torch.float32


def _unet(
    blocks: tuple[str, str], widths: Sequence[int], attended: Sequence[int], layers: int, channels: int, side: int
) -> dict[str, object]:
    """What all UNets share; ``blocks`` are the stages without and with attention, ``attended`` the levels with it.

    The time step enters as cosines, then sines, of frequencies from 1 to 1 / 10000, that one left out.
    """
    down = tuple(blocks[level in attended] for level in range(len(widths)))
    return {
        "act_fn": "silu",
        "block_out_channels": tuple(widths),
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": channels,
        "layers_per_block": layers,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": channels,
        "resnet_time_scale_shift": "default",
        "sample_size": side,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
    }


def _plain(
    widths: Sequence[int], attended: Sequence[int], layers: int, channels: int, side: int, head: int | None
) -> dict[str, object]:
    """A UNet without cross-attention, whose attentions have heads of ``head`` channels."""
    blocks = ("DownBlock2D", "AttnDownBlock2D")
    settings = _unet(blocks, widths, attended, layers, channels, side)
    return settings | {"_class_name": "UNet2DModel", "attention_head_dim": head}


def _resampling(widths: Sequence[int], attended: Sequence[int], layers: int, side: int, head: int) -> dict[str, object]:
    """LDM-8's UNet: residual blocks resample, and scale and shift by the time step. ``head`` fits one level only."""
    blocks = ("ResnetDownsampleBlock2D", "AttnDownBlock2D")
    return _unet(blocks, widths, attended, layers, 4, side) | {
        "_class_name": "UNet2DModel",
        "attention_head_dim": head,
        "attn_norm_num_groups": 32,
        "downsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "upsample_type": "resnet",
    }


def _conditioned(
    widths: Sequence[int],
    attended: Sequence[int],
    layers: int,
    channels: int,
    side: int,
    heads: int | tuple[int, ...],
    context: int,
) -> dict[str, object]:
    """A UNet with cross-attention; what diffusers calls ``attention_head_dim`` here is the number of heads."""
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D")
    return _unet(blocks, widths, attended, layers, channels, side) | {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": heads,
        "cross_attention_dim": context,
        "use_linear_projection": False,
    }


def _xl(
    widths: Sequence[int],
    attended: Sequence[int],
    side: int,
    heads: Sequence[int],
    depths: Sequence[int],
    context: int,
    pooled: int,
    sizes: int,
) -> dict[str, object]:
    """SDXL's UNet, whose attentions have ``depths`` transformer blocks, by level.

    It takes ``pooled`` numbers of the text, and each of six sizes as ``sizes`` numbers, besides the context.
    """
    return _conditioned(widths, attended, layers=2, channels=4, side=side, heads=tuple(heads), context=context) | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": sizes,
        "projection_class_embeddings_input_dim": pooled + 6 * sizes,
        "transformer_layers_per_block": tuple(depths),
        "use_linear_projection": True,
    }


def _pixels(widths: Sequence[int], attended: Sequence[int], side: int) -> dict[str, object]:
    """The DDIM UNet for CIFAR-10: one head, sines before cosines, frequencies down to 1 / 10000 itself."""
    return _plain(widths, attended, 2, 3, side, None) | {
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }


def _first_stage(widths: Sequence[int], layers: int, side: int, channels: int) -> dict[str, object]:
    return {
        "act_fn": "silu",
        "block_out_channels": tuple(widths),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "in_channels": 3,
        "latent_channels": channels,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": side,
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }


def _vq(widths: Sequence[int], layers: int, side: int, codes: int) -> dict[str, object]:
    """A VQ first stage. Its latents are not scaled, which has to be said: VQModel's own scale is Stable Diffusion's."""
    return _first_stage(widths, layers, side, 3) | {
        "_class_name": "VQModel",
        "num_vq_embeddings": codes,
        "scaling_factor": 1.0,
        "vq_embed_dim": 3,
    }


def _kl(widths: Sequence[int], layers: int, side: int, scale: float = 1.0) -> dict[str, object]:
    return _first_stage(widths, layers, side, 4) | {"_class_name": "AutoencoderKL", "scaling_factor": scale}


def _text(tokens: int, width: int, inner: int, layers: int, heads: int, projection: int) -> dict[str, object]:
    """CLIP's text tower; the last two tokens mark a text's beginning and end."""
    return {
        "_class_name": "CLIPTextModel",
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": projection,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "pad_token_id": 1,
    }


def _projected(text: Mapping[str, object]) -> dict[str, object]:
    """A text tower that OpenCLIP has trained, with the projection of its pooled text."""
    return {**text, "_class_name": "CLIPTextModelWithProjection", "hidden_act": "gelu"}


def _latent_schedule(sampler: str, first: float, last: float) -> dict[str, object]:
    """Latent diffusion's, which calls itself linear: the square root of beta is linear in the time step.

    PNDM and Euler have no use for ``clip_sample``; DDIM, made from their settings, would clip if it did not find it.
    """
    return {
        "_class_name": sampler,
        "beta_end": last,
        "beta_schedule": "scaled_linear",
        "beta_start": first,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


ARCHITECTURES = {
    "ldm4": Architecture(
        title="unconditional LDM-4 (LSUN-Bedrooms, CelebA-HQ, FFHQ)",
        family="ldm",
        scheduler=_latent_schedule("DDIMScheduler", 0.0015, 0.0195),
        full=Size(
            unet=_plain((224, 448, 672, 896), (1, 2, 3), layers=2, channels=3, side=64, head=32),
            first_stage=_vq((128, 256, 512), layers=2, side=256, codes=8192),
        ),
        tiny=Size(
            unet=_plain((32, 64, 32), (1, 2), layers=1, channels=3, side=16, head=16),
            first_stage=_vq((32, 32), layers=1, side=32, codes=64),
        ),
        pipeline="LDMPipeline",
        averaged=True,
    ),
    "ldm8-churches": Architecture(
        title="LDM-8 LSUN-Churches",
        family="ldm",
        scheduler=_latent_schedule("DDIMScheduler", 0.0015, 0.0155),
        full=Size(
            unet=_resampling((192, 384, 384, 768, 768), (0, 1, 2, 3), layers=2, side=32, head=24),
            first_stage=_kl((128, 256, 512, 512), layers=2, side=256),
            heads=8,
        ),
        tiny=Size(
            unet=_resampling((32, 64, 32), (0, 1), layers=1, side=16, head=8),
            first_stage=_kl((32, 32), layers=1, side=32),
            heads=4,
        ),
        averaged=True,
        scale_in_file=True,
    ),
    "ldm4-imagenet": Architecture(
        title="class-conditional LDM-4 (ImageNet, cin256-v2)",
        family="class_ldm",
        scheduler=_latent_schedule("DDIMScheduler", 0.0015, 0.0195),
        full=Size(
            unet=_conditioned((192, 384, 576, 960), (1, 2, 3), layers=2, channels=3, side=64, heads=1, context=512),
            first_stage=_vq((128, 256, 512), layers=2, side=256, codes=8192),
            classes=1000,
        ),
        tiny=Size(
            unet=_conditioned((32, 32, 64), (1, 2), layers=1, channels=3, side=16, heads=1, context=24),
            first_stage=_vq((32, 64), layers=1, side=32, codes=64),
            classes=10,
        ),
    ),
    "sd-v1": Architecture(
        title="Stable Diffusion v1",
        family="stable_diffusion",
        scheduler=_latent_schedule("PNDMScheduler", 0.00085, 0.012) | {"skip_prk_steps": True},
        full=Size(
            unet=_conditioned((320, 640, 1280, 1280), (0, 1, 2), layers=2, channels=4, side=64, heads=8, context=768),
            first_stage=_kl((128, 256, 512, 512), layers=2, side=512, scale=0.18215),
            text_encoder=_text(tokens=49408, width=768, inner=3072, layers=12, heads=12, projection=768),
        ),
        tiny=Size(
            unet=_conditioned((32, 32, 64), (0, 1), layers=2, channels=4, side=16, heads=4, context=32),
            first_stage=_kl((32, 32), layers=1, side=32, scale=0.18215),
            text_encoder=_text(tokens=100, width=32, inner=64, layers=2, heads=4, projection=32),
        ),
        pipeline="StableDiffusionPipeline",
    ),
    "sdxl": Architecture(
        title="Stable Diffusion XL (base)",
        family="stable_diffusion_xl",
        scheduler=_latent_schedule("EulerDiscreteScheduler", 0.00085, 0.012),
        full=Size(
            unet=_xl((320, 640, 1280), (1, 2), 128, (5, 10, 20), (1, 2, 10), context=2048, pooled=1280, sizes=256),
            first_stage=_kl((128, 256, 512, 512), layers=2, side=1024, scale=0.13025),
            text_encoder=_text(tokens=49408, width=768, inner=3072, layers=12, heads=12, projection=768),
            second_text_encoder=_projected(
                _text(tokens=49408, width=1280, inner=5120, layers=32, heads=20, projection=1280)
            ),
        ),
        tiny=Size(
            unet=_xl((32, 32, 64), (1, 2), 16, (1, 2, 4), (1, 1, 2), context=48, pooled=24, sizes=8),
            first_stage=_kl((32, 32), layers=1, side=32, scale=0.13025),
            text_encoder=_text(tokens=100, width=32, inner=64, layers=2, heads=4, projection=32),
            second_text_encoder=_projected(_text(tokens=100, width=16, inner=32, layers=2, heads=2, projection=24)),
        ),
        pipeline="StableDiffusionXLPipeline",
        dtype=torch.float16,
    ),
    "ddim-cifar10": Architecture(
        title="DDIM CIFAR-10",
        family="ddpm",
        scheduler={
            "_class_name": "DDIMScheduler",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "timestep_spacing": "leading",
        },
        full=Size(unet=_pixels((128, 256, 256, 256), (1,), side=32)),
        tiny=Size(unet=_pixels((32, 64, 32, 32), (1,), side=16)),
        pipeline="DDIMPipeline",
        flat=True,
    ),
}

# The tasks whose models are converted.
TASKS = {
    "lsun-bedrooms-ldm4": "ldm4",
    "lsun-churches-ldm8": "ldm8-churches",
    "celebahq-ldm4": "ldm4",
    "ffhq-ldm4": "ldm4",
    "imagenet-ldm4": "ldm4-imagenet",
    "coco-sd-v1-4": "sd-v1",
    "coco-sdxl": "sdxl",
    "cifar10-ddim": "ddim-cifar10",
}
