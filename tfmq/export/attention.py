"""Attention whose two matrix products integer kernels can take."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tfmq.export.activations import Codes, Position, Range, is_constant, quantizer_twin
from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.fake_quantize import FakeQuantize


class QueryKeyProduct(nn.Module):
    """Attention scores (B, heads, T, K) of queries (B, heads, T, D) and keys (B, heads, K, D), times ``factor``."""

    def __init__(self, query: FakeQuantize, key: FakeQuantize, position: Position, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.symmetric = _plain(query) and _plain(key)
        self.query, self.key = (_operand(each, position, self.symmetric) for each in (query, key))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        if self.symmetric:
            return torch.matmul(self.query(query), self.key(key).transpose(-1, -2)) * self.factor
        query_codes, query_scale, query_point = self.query(query)
        key_codes, key_scale, _ = self.key(key)
        scores = torch.matmul(query_codes, key_codes.transpose(-1, -2))
        if query_point is not None:
            scores = scores - query_point * key_codes.sum(-1)[:, :, None]
        # The zero point of keys adds the same to all scores of a query, which the softmax does not see.
        return scores * (query_scale * key_scale * self.factor)


class ProbabilityValueProduct(nn.Module):
    """Outputs (B, heads, T, D) of probabilities (B, heads, T, K) and values (B, heads, K, D)."""

    def __init__(self, probabilities: FakeQuantize, value: FakeQuantize, position: Position) -> None:
        super().__init__()
        self.symmetric = _plain(value) and is_constant(probabilities)
        self.probabilities = (
            quantizer_twin(probabilities, position) if self.symmetric else Codes(probabilities, position)
        )
        self.value = _operand(value, position, self.symmetric)

    def forward(self, probabilities: Tensor, value: Tensor) -> Tensor:
        if self.symmetric:
            return torch.matmul(self.probabilities(probabilities), self.value(value))
        codes, scale, _ = self.probabilities(probabilities)
        value_codes, value_scale, value_point = self.value(value)
        output = torch.matmul(codes, value_codes)
        if value_point is not None:
            output = output - value_point * codes.sum(-1, keepdim=True)
        return output * (scale * value_scale)


def _plain(quantizer: FakeQuantize) -> bool:
    """Whether an operand is symmetric with one range for all time steps, as matrix products take it as it is."""
    return quantizer.symmetric and is_constant(quantizer)


def _operand(quantizer: FakeQuantize, position: Position, plain: bool) -> Range | Codes:
    return Range(quantizer) if plain else Codes(quantizer, position, signed=True)


class ExecutableAttention(nn.Module):
    """Attention processor that computes what `tfmq.modules.attention.QuantizedAttention` does, in four dimensions."""

    def __init__(self, attention: Attention, processor: QuantizedAttention, position: Position) -> None:
        super().__init__()
        operands = (processor.query, processor.key, processor.value, processor.probabilities)
        query, key, value, probabilities = (each for each in operands if isinstance(each, FakeQuantize))
        self.scores = QueryKeyProduct(query, key, position, float(attention.scale))
        self.outputs = ProbabilityValueProduct(probabilities, value, position)

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
        """Self- or cross-attention over (B, C, H, W) or (B, tokens, C); raises ValueError for a mask."""
        if attention_mask is not None:
            raise ValueError("attention masks are not exported: call the network without one")
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
        layers = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        query, key, value = (layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer, x in layers)
        output = self.outputs(self.scores(query, key).softmax(-1), value)
        output = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        if residual.dim() == 4:
            output = output.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor
