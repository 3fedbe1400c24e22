"""Quantised attention products: a processor for the attention modules of diffusers."""

from __future__ import annotations

from types import NoneType

import torch
from diffusers.models.attention_processor import Attention, AttentionProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tfmq.modules.dynamic import DynamicQuantize
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.numerics.observer import RangeObserver

Quantizer = FakeQuantize | DynamicQuantize


class QuantizedAttention(nn.Module):
    """Attention processor with quantised operands of both matrix products: query, key, value and probabilities.

    Dynamic ranges are those of one token of one head, and of one row of probabilities. The products themselves, the
    softmax and the norms run in floating point. Set with ``Attention.set_processor``.

    While no operand is quantised or observed, as when roundings are learned, the processor that it replaces computes:
    so a network learns the same whether its activations will be quantised or not.

    Args:
        unquantized: the processor that this one replaces.

    Attributes:
        most_bytes: where the probabilities of a batch take more, its images are evaluated some at a time, and once more
            for gradients. (64x64 latents in 8 heads take 0.5 GiB an image.) Ranges by search need them all at once.
        most_images: evaluated at a time, whatever they take; None for no such bound. Attention slicing sets it.
    """

    most_bytes = 2**30
    most_images: int | None = None

    def __init__(
        self,
        activation_bits: int = 0,
        softmax_bits: int = 0,
        tracker: StepTracker | None = None,
        symmetric: bool = False,
        dynamic: bool = False,
        unquantized: AttentionProcessor | None = None,
    ) -> None:
        super().__init__()
        if tracker is None:  # an IP-Adapter makes processors of the class that it finds
            raise ValueError(
                "a processor of quantised attention belongs to one attention, and none is made anew: an IP-Adapter "
                "would undo quantisation, and cannot be loaded into a quantised network"
            )
        self.tracker = tracker
        self.symmetric = symmetric
        self.dynamic = dynamic
        if dynamic:
            operands: list[Quantizer] = [DynamicQuantize(activation_bits, -1, symmetric) for _ in range(3)]
            self.probabilities: Quantizer = DynamicQuantize(softmax_bits, -1, positive=True)
        else:
            operands = [FakeQuantize(activation_bits, tracker, symmetric) for _ in range(3)]
            self.probabilities = FakeQuantize(softmax_bits, tracker, positive=True)
        self.query, self.key, self.value = operands
        self.unquantized = AttnProcessor2_0() if unquantized is None else unquantized

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        # diffusers reads this signature to decide which arguments a processor takes.
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        """Self- or cross-attention over (B, C, H, W) or (B, tokens, C), as diffusers' own processors compute it."""
        if not any(operand.active for operand in (self.query, self.key, self.value, self.probabilities)):
            return self.unquantized(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.dim() == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        by_head = (attn.heads, -1)
        query = attn.head_to_batch_dim(self.query(attn.to_q(hidden_states).unflatten(-1, by_head)).flatten(2))
        key = attn.head_to_batch_dim(self.key(attn.to_k(context).unflatten(-1, by_head)).flatten(2))
        value = attn.head_to_batch_dim(self.value(attn.to_v(context).unflatten(-1, by_head)).flatten(2))
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
        output = self._products(attn, query, key, value, mask)
        output = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(output)))

        if residual.dim() == 4:
            output = output.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor

    def _products(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Both products, all (images * heads, tokens, channels): of all images at once, or some after the other."""
        images, index = len(query) // attn.heads, self.tracker.index
        at_once = max(1, self.most_bytes // (attn.heads * query.shape[1] * key.shape[1] * query.element_size()))
        at_once = min(at_once, self.most_images or at_once)
        observer = getattr(self.probabilities, "observer", None)
        if images <= at_once or type(observer) not in (NoneType, RangeObserver):
            return self._of_images(attn, query, key, value, mask, index)
        parts, extremes = [], []
        for start in range(0, images, at_once):
            chosen = slice(start, min(start + at_once, images))
            inside = slice(chosen.start * attn.heads, chosen.stop * attn.heads)
            step = index if isinstance(index, int) else index[chosen]
            part = (query[inside], key[inside], value[inside], None if mask is None else mask[inside])
            if observer is not None:
                probabilities = attn.get_attention_scores(part[0], part[1], part[3])
                by_image = probabilities.unflatten(0, (-1, attn.heads)).flatten(1)
                extremes += [by_image.amin(1), by_image.amax(1)]
                parts.append(torch.bmm(probabilities, part[2]))
            elif torch.is_grad_enabled():
                parts.append(
                    checkpoint(self._of_images, attn, *part, step, use_reentrant=False, preserve_rng_state=False)
                )
            else:
                parts.append(self._of_images(attn, *part, step))
        if observer is not None:
            self.probabilities(torch.stack([torch.cat(extremes[0::2]), torch.cat(extremes[1::2])], 1))
        return torch.cat(parts)

    def _of_images(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, step: int | Tensor
    ) -> Tensor:
        """Both products of some images of a batch; the tensors and ``step``, an index of the tracker, are theirs."""
        by_image = attn.get_attention_scores(query, key, mask).unflatten(0, (-1, attn.heads))
        with self.tracker.at(step):
            probabilities = self.probabilities(by_image)
        return torch.bmm(probabilities.flatten(0, 1), value)
