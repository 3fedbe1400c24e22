"""Tiny random pipelines of diffusers, and what each conditions its UNet on, for calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tfmq import networks
from tfmq.network.calibration import CalibrationSet, collect_calibration
from tfmq.network.conditioning import Conditioning, Control
from tfmq.network.sampling import SamplingSettings

PROMPT, NEGATIVE, SIDE, STEPS = "a red house", "rain", 32, 3
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# Stable Diffusion XL: pooled text of 6 numbers, and each of the 6 sizes as 4.
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 + 6 * 4,
    "cross_attention_dim": 16,
}


def unet(**settings: object) -> UNet2DConditionModel:
    """A tiny UNet for latents of 4 channels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**UNET, **settings}).eval()


def controlnet(**settings: object) -> ControlNetModel:
    """A ControlNet for that UNet, whose residuals are not 0, as they are before training."""
    torch.manual_seed(4)
    shared = {
        name: value for name, value in {**UNET, **settings}.items() if name not in ("sample_size", "up_block_types")
    }
    network = ControlNetModel(**{"conditioning_embedding_out_channels": (8, 8, 8), **shared}).eval()
    for convolution in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(convolution.weight, std=0.2)
    torch.nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.2)
    return network


def texts(projected: bool = False) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """A tokenizer of single bytes, and an encoder to 8 numbers a token, with a pooled text of 6 if asked for."""
    tokenizer = CLIPTokenizer(model_max_length=12).train_new_from_iterator([""], 514, show_progress=False)
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).eval()


def _plain(kind: type[DiffusionPipeline], network: UNet2DConditionModel, scheduler: SchedulerMixin, **more: object):
    tokenizer, encoder = texts()
    parts = {"vae": vae(), "text_encoder": encoder, "tokenizer": tokenizer, "unet": network, "scheduler": scheduler}
    return kind(**parts, **more, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


# Predicting v, latents of random networks stay as large as the noise that they start from.
SCHEDULE = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**SCHEDULE, use_karras_sigmas=True)


def picture(seed: int = 5) -> torch.Tensor:
    """An image (1, 3, 32, 32) in [0, 1]."""
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def mask() -> torch.Tensor:
    """Its left half is painted anew."""
    return (torch.arange(SIDE) < SIDE // 2).float().expand(1, 1, SIDE, SIDE)


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    (tokenizer, encoder), (second_tokenizer, second) = texts(), texts(projected=True)
    return StableDiffusionXLPipeline(
        vae(), encoder, second, tokenizer, second_tokenizer, unet(**XL), euler(), add_watermarker=False
    )


def latent_consistency() -> LatentConsistencyModelPipeline:
    scheduler = LCMScheduler(**SCHEDULE)
    return _plain(LatentConsistencyModelPipeline, unet(time_cond_proj_dim=8), scheduler, image_encoder=None)


def inpainting() -> StableDiffusionInpaintPipeline:
    return _plain(StableDiffusionInpaintPipeline, unet(in_channels=9), ddim())


def controlled() -> StableDiffusionControlNetPipeline:
    return _plain(StableDiffusionControlNetPipeline, unet(), ddim(), controlnet=controlnet())


def _halves(pipeline: DiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    found = pipeline.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt=NEGATIVE)
    return found[0], found[1]


def condition_xl(pipeline: StableDiffusionXLPipeline) -> Conditioning:
    context, off, pooled, pooled_off = pipeline.encode_prompt(PROMPT, negative_prompt=NEGATIVE, device="cpu")
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32)
    inputs = {"text_embeds": pooled, "time_ids": sizes}
    return Conditioning(context, off, inputs, {"text_embeds": pooled_off})


def condition_lcm(pipeline: LatentConsistencyModelPipeline) -> Conditioning:
    guidance = pipeline.get_guidance_scale_embedding(torch.tensor([8.5 - 1]), embedding_dim=8)
    return Conditioning(pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0], None, {"timestep_cond": guidance})


def condition_inpainting(pipeline: StableDiffusionInpaintPipeline) -> Conditioning:
    # The encoder draws its latents: the pipeline does so after the noise that it starts from.
    generator = networks.generator()
    torch.randn(1, 4, 8, 8, generator=generator)
    kept = (picture() * 2 - 1) * (mask() < 0.5)
    masked = pipeline.vae.encode(kept).latent_dist.sample(generator) * pipeline.vae.config.scaling_factor
    small = torch.nn.functional.interpolate(mask(), size=(8, 8))
    return Conditioning(*_halves(pipeline), {"channels": torch.cat([small, masked], 1)})


def condition_controlled(pipeline: StableDiffusionControlNetPipeline) -> Conditioning:
    return Conditioning(*_halves(pipeline), controls=(Control(pipeline.controlnet, picture(), 0.8),))


@dataclass(frozen=True)
class Case:
    """A pipeline, what it is called with, how its UNet is conditioned, and how calibration samples it."""

    build: Callable[[], DiffusionPipeline]
    condition: Callable[[DiffusionPipeline], Conditioning]
    settings: SamplingSettings
    call: dict[str, object] = field(default_factory=dict)

    def run(self, pipeline: DiffusionPipeline, output_type: str = "pt") -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            height=SIDE,
            width=SIDE,
            generator=networks.generator(),
            output_type=output_type,
            **self.call,
        ).images

    def noise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pipeline starts from, and what it draws at its steps."""
        generator = networks.generator()
        start = torch.randn(1, 4, 8, 8, generator=generator)
        return start, torch.randn(STEPS, 1, 4, 8, 8, generator=generator)

    @torch.no_grad()
    def pool(self, pipeline: DiffusionPipeline) -> CalibrationSet:
        start, steps = self.noise()
        return collect_calibration(
            pipeline.unet,
            pipeline.scheduler,
            start,
            self.settings,
            batch=1,
            conditioning=self.condition(pipeline),
            step_noise=steps,
        )


GUIDED = SamplingSettings(STEPS, 0.0, 5.0)
NEGATED = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}
CASES = {
    "sdxl": Case(stable_diffusion_xl, condition_xl, GUIDED, NEGATED),
    "lcm": Case(latent_consistency, condition_lcm, SamplingSettings(STEPS, 0.0, 8.5), {"guidance_scale": 8.5}),
    "inpainting": Case(inpainting, condition_inpainting, GUIDED, NEGATED | {"image": picture(), "mask_image": mask()}),
    "controlnet": Case(
        controlled,
        condition_controlled,
        GUIDED,
        NEGATED | {"image": picture(), "controlnet_conditioning_scale": 0.8},
    ),
}
