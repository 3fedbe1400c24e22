"""What a UNet of diffusers can have besides its blocks: what is known, and what is refused by name."""

from __future__ import annotations

from typing import TypeAlias

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel

from tfmq.network.conditioning import ADAPTER, CHANNELS, DOWN, MID, TEXT_EMBEDS, TIME_IDS, TIMESTEP_COND

UNet: TypeAlias = UNet2DModel | UNet2DConditionModel

BLOCKS = (
    *("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    *("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
)
# Entries of a config -> the values with which nothing is computed that the blocks do not tell.
PLAIN = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text_time"),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "attention_type": ("default",),
    "time_embedding_act_fn": (None,),
}
# Of SDXL's ``time_ids``: heights and widths of the original and of the target, top and left of the crop.
SIZES = 6
# What `enable_freeu` sets in up blocks.
FREEU = ("s1", "s2", "b1", "b2")


def check_features(unet: UNet) -> None:
    """Raise ValueError, with its name, for what running a UNet block by block would lose."""
    time_act = getattr(unet, "time_embed_act", None)
    if unet.config.center_input_sample or time_act is not None or unet.config.time_embedding_type != "positional":
        raise ValueError("only UNets with a positional time embedding and an uncentred input are supported")
    for name, values in PLAIN.items():
        value = unet.config.get(name, values[0])
        if value not in values:
            known = " or ".join(repr(each) for each in values)
            raise ValueError(f"the UNet has {name} {value!r}, which is not supported: only {known} is")
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if block is not None and type(block).__name__ not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise ValueError(f"the UNet has a {type(block).__name__}, which is not supported: blocks are {known}")
    for path, module in unet.named_modules():
        if isinstance(module, DualTransformer2DModel):
            raise ValueError(f"the UNet has dual cross-attention at {path}, which is not supported")
    if any(getattr(block, name, None) is not None for block in unet.up_blocks for name in FREEU):
        raise ValueError("the UNet has FreeU, which is not supported: call disable_freeu before it is quantised")


def known_arguments(unet: UNet) -> frozenset[str]:
    """See `tfmq.network.backbone.Backbone.known_arguments`."""
    if not isinstance(unet, UNet2DConditionModel):
        return frozenset({"sample", "timestep", "return_dict"})
    known = {"sample", "timestep", "encoder_hidden_states", "return_dict", DOWN, MID, ADAPTER}
    if unet.config.addition_embed_type == "text_time":
        known |= {f"added_cond_kwargs.{name}" for name in (TEXT_EMBEDS, TIME_IDS)}
    if unet.config.time_cond_proj_dim is not None:
        known.add(TIMESTEP_COND)
    return frozenset(known)


def input_widths(unet: UNet) -> dict[str, int]:
    """The further inputs without which a UNet can not be evaluated, and how many numbers each has a row."""
    config = unet.config
    widths: dict[str, int] = {}
    if config.get("addition_embed_type") == "text_time":
        sizes = SIZES * config.addition_time_embed_dim
        widths |= {TEXT_EMBEDS: config.projection_class_embeddings_input_dim - sizes, TIME_IDS: SIZES}
    if config.get("time_cond_proj_dim") is not None:
        widths[TIMESTEP_COND] = config.time_cond_proj_dim
    return widths


def known_inputs(unet: UNet) -> tuple[str, ...]:
    """See `tfmq.network.backbone.Backbone.known_inputs`."""
    if not isinstance(unet, UNet2DConditionModel):
        return ()
    return (*input_widths(unet), CHANNELS, DOWN, MID, ADAPTER)
