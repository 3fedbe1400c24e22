"""Attention modules of a quantised network, which refuse what would drop quantised products or layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NoReturn

from diffusers.models.attention_processor import Attention
from torch import nn

from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.layers import QuantizedLayer


class GuardedAttention(Attention):
    """An attention module that stays quantised whatever is asked of it later.

    Where its products are quantised, no other processor takes their place, and slices of attention are images (see
    ``QuantizedAttention.most_images``). Where its layers are quantised, they are not fused.
    """

    @classmethod
    def of(cls, attention: Attention) -> GuardedAttention:
        """The guarded twin of ``attention``, sharing its layers."""
        # As a shallow copy is made, but of this class, and with dictionaries of its own.
        parts = {name: copy.copy(part) if isinstance(part, dict) else part for name, part in vars(attention).items()}
        twin = cls.__new__(cls)
        twin.__setstate__(parts)
        return twin

    @property
    def has_quantized_products(self) -> bool:
        return isinstance(self._modules.get("processor"), QuantizedAttention)

    def set_processor(self, processor: nn.Module | Callable) -> None:
        """See `Attention`. Raises ValueError where quantised products would be lost."""
        if self.has_quantized_products and not isinstance(processor, QuantizedAttention):
            self._refuse(f"the processor {type(processor).__name__}")
        super().set_processor(processor)

    def set_attention_slice(self, slice_size: int | None) -> None:
        """See `Attention`. Quantised products of so many heads are evaluated at a time, of one image at least."""
        if not self.has_quantized_products:
            super().set_attention_slice(slice_size)
        elif slice_size is not None and not 1 <= slice_size <= self.sliceable_head_dim:
            raise ValueError(f"slice_size is {slice_size}: it must be 1 to {self.sliceable_head_dim}, or None")
        else:
            self.processor.most_images = None if slice_size is None else max(1, slice_size // self.heads)

    def set_use_memory_efficient_attention_xformers(
        self, use_memory_efficient_attention_xformers: bool, attention_op: Callable | None = None
    ) -> None:
        """See `Attention`. Raises ValueError where quantised products would be lost; off changes nothing."""
        if not self.has_quantized_products:
            super().set_use_memory_efficient_attention_xformers(use_memory_efficient_attention_xformers, attention_op)
        elif use_memory_efficient_attention_xformers:
            self._refuse("memory-efficient attention of xformers")

    def set_use_npu_flash_attention(self, use_npu_flash_attention: bool) -> None:
        """See `Attention`. Raises ValueError where quantised products would be lost; off changes nothing."""
        if not self.has_quantized_products:
            super().set_use_npu_flash_attention(use_npu_flash_attention)
        elif use_npu_flash_attention:
            self._refuse("flash attention")

    def set_use_xla_flash_attention(
        self,
        use_xla_flash_attention: bool,
        partition_spec: tuple[str | None, ...] | None = None,
        is_flux: bool = False,
    ) -> None:
        """See `Attention`. Raises ValueError where quantised products would be lost; off changes nothing."""
        if not self.has_quantized_products:
            super().set_use_xla_flash_attention(use_xla_flash_attention, partition_spec, is_flux)
        elif use_xla_flash_attention:
            self._refuse("flash attention")

    def fuse_projections(self, fuse: bool = True) -> None:
        """See `Attention`. Raises ValueError where the projections are quantised."""
        if fuse and any(isinstance(layer, QuantizedLayer) for layer in (self.to_q, self.to_k, self.to_v)):
            raise ValueError(
                "the projections of this attention are quantised, and fused ones would not be: use the network without "
                "fuse_qkv_projections"
            )
        super().fuse_projections(fuse)

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{what} would undo quantisation: the products of this attention are quantised, and only a "
            "QuantizedAttention computes them. To save memory, call enable_attention_slicing; to use another "
            "processor, start from the full-precision network and leave attention products out by the protocol"
        )
