"""What both examples share: their common options, and the pipeline that they work on."""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LDMPipeline, UNet2DModel, VQModel

from tfmq import Precision


def command_line(description: str) -> argparse.ArgumentParser:
    """A command line with the options that both examples have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pipeline", nargs="?", default="data/emoji-ldm4", help="folder of an unconditional pipeline")
    parser.add_argument("--tiny", action="store_true", help="take a tiny random network instead: seconds, and no data")
    parser.add_argument("--precision", type=precision, default="w4a8", help="bits of weights and activations, as w4a8")
    parser.add_argument("--steps", type=count, default=20, help="denoising steps of the sampler")
    parser.add_argument("--images", type=count, default=32, help="images whose denoising gives the calibration data")
    parser.add_argument("--iterations", type=count, default=100, help="of learning, at most; papers take thousands")
    return parser


def precision(text: str) -> Precision:
    """A precision to quantise to."""
    try:
        found = Precision.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if found.weight_bits == 32:
        raise argparse.ArgumentTypeError(f"{text} leaves the weights in full precision")
    return found


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def open_pipeline(parser: argparse.ArgumentParser, options: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline that the options name; ends with an error for one that is missing or needs prompts."""
    if options.tiny:
        return tiny_pipeline()
    if not Path(options.pipeline).is_dir():
        parser.error(f"there is no folder {options.pipeline}: run `dvc pull data.dvc`, name another, or give --tiny")
    pipeline = DiffusionPipeline.from_pretrained(options.pipeline, low_cpu_mem_usage=False)
    if not isinstance(getattr(pipeline, "unet", None), UNet2DModel):
        parser.error(f"{options.pipeline} is not unconditional: docs/quantise.md shows how prompts are recorded")
    return pipeline


def tiny_pipeline() -> LDMPipeline:
    """Random latent diffusion of images of 32 x 32 pixels: latents (3, 8, 8), a few thousand parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
            norm_num_groups=8,
        )
        first_stage = VQModel(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            num_vq_embeddings=16,
            norm_num_groups=4,
        )
    return LDMPipeline(first_stage, unet, DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1))
