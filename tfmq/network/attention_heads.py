"""The number of attention heads of a UNet2DModel, which its config does not say.

A UNet2DModel has one head dimension for all its levels; the published LDM-8 has 8 heads at every width.
"""

from __future__ import annotations

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention

from tfmq.network.unet_features import UNet


def set_attention_heads(unet: UNet2DModel, heads: int) -> None:
    """Set the number of heads of every attention of ``unet``, in place, and record it in its config.

    No parameter's shape depends on it, so that from_pretrained and from_config lose it without an error, but keep the
    config's entry: call ``restore_attention_heads`` after them. Raises ValueError for another class of UNet and for
    channels that so many heads do not divide.
    """
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"a {type(unet).__name__} says in its config how many heads each level has: set them there")
    attentions = {path: module for path, module in unet.named_modules() if isinstance(module, Attention)}
    for path, attention in attentions.items():
        if heads < 1 or attention.inner_dim % heads:
            raise ValueError(f"{path} has {attention.inner_dim} channels, which {heads} heads do not divide")
    for attention in attentions.values():
        attention.heads = attention.sliceable_head_dim = heads
        attention.scale = (attention.inner_dim // heads) ** -0.5
    unet.register_to_config(attention_heads=heads)


def restore_attention_heads(unet: UNet) -> None:
    """Give ``unet``, just made from its config, the heads that ``set_attention_heads`` noted there, if it did."""
    heads = unet.config.get("attention_heads")
    if heads is not None:
        set_attention_heads(unet, heads)
