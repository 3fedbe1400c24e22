"""Attention whose two products compute in integers: the executed twin of `tfmq.modules.attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tfmq.modules.adaptive import LOGARITHMIC, AdaptiveQuantize
from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.modules.integer import CODE_BITS, IntegerLayer, IntegerWeight, by_step, too_wide
from tfmq.modules.integer_products import InputGrid, Unpacked, exact_bmm, input_grids
from tfmq.modules.layers import QuantizedLayer

# Scores that are worked on at a time: in bytes as many as stay in the cache that cores share, so that calls are few; in
# floats as many as stay in that of a core. On other devices: 1 GiB.
SHARED_SCORES = 2**20
CACHED_SCORES = 2**18
MOST_SCORES = 2**28
# So many times as many probabilities' codes are multiplied by the values together.
TOGETHER = 2
# Where a head has fewer scores, 8-bit kernels cost more in calls than they gain.
LEAST_SCORES = 2**18
# Floats of projections that are made at a time: they become bytes while they are in the cache.
CACHED_PROJECTIONS = 2**18
PER_NATURAL = math.log2(math.e)
# Powers of two of these, their sums and their inverses stay far inside what float32 holds.
SMALL = 60.0
LEAST_EXPONENT = -115.0

Grids = tuple[InputGrid, InputGrid, InputGrid, InputGrid]  # of query, key, value and probabilities


class IntegerAttention(nn.Module):
    """Attention processor: query, key, value and probabilities are codes, both products are sums of integers.

    Softmax and norms run in floating point. Set with ``Attention.set_processor``.

    Attributes:
        joined: the three projections of self-attention as one weight, where these share the grid of their input.
    """

    def __init__(self, processor: QuantizedAttention, tracker: StepTracker, projections: list[QuantizedLayer]) -> None:
        super().__init__()
        self.tracker = tracker
        self.joined = joined(projections)
        operands = (processor.query, processor.key, processor.value, processor.probabilities)
        self.grids = [input_grids(operand) for operand in operands if isinstance(operand, FakeQuantize)]
        self.per_step = any(len(grids) > 1 for grids in self.grids)

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

    @torch.no_grad()
    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        """Self- or cross-attention over (B, C, H, W) or (B, tokens, C), as `QuantizedAttention` computes it."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.dim() == 4:
            # A norm of pixels in channels-last order: tokens are then rows of the same memory.
            if attn.group_norm is not None:
                hidden_states = attn.group_norm(hidden_states)
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        elif attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
        masks = [] if mask is None else [mask.unflatten(0, (-1, attn.heads))]
        output = self._in_bytes(attn, hidden_states, context, *masks)
        if output is None:
            operands = (x.unflatten(-1, (attn.heads, -1)) for x in self._projections(attn, hidden_states, context))
            output = by_step(
                lambda index, *parts: self._of_step(attn.scale, index, *parts),
                self.tracker.index if self.per_step else 0,
                *operands,
                *masks,
            )
        output = attn.to_out[1](attn.to_out[0](output.flatten(2)))
        if residual.dim() == 4:
            output = output.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            output = output + residual
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor

    def _projections(self, attn: Attention, hidden_states: Tensor, context: Tensor) -> list[Tensor]:
        """Query, key and value, (B, tokens, C)."""
        if context is not hidden_states:
            return [attn.to_q(hidden_states), *_of_one_input((attn.to_k, attn.to_v), context)]
        grid = self._input_grid(attn)
        if self.joined is None or grid is None:
            return _of_one_input((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        rows = grid.codes(hidden_states).flatten(0, 1)
        return list(self.joined(rows, grid).view(*hidden_states.shape[:2], -1).chunk(3, -1))

    @staticmethod
    def _input_grid(attn: Attention) -> InputGrid | None:
        return attn.to_q.grid if isinstance(attn.to_q, IntegerLayer) else None

    def _grids_at(self, index: int) -> Grids:
        of_query, of_key, of_value, of_probabilities = (grids[index if len(grids) > 1 else 0] for grids in self.grids)
        return of_query, of_key, of_value, of_probabilities

    def _in_bytes(
        self, attn: Attention, hidden_states: Tensor, context: Tensor, mask: Tensor | None = None
    ) -> Tensor | None:
        """Attention of many scores at one time step, or None where it is another.

        Some tokens at a time are projected and rounded, so that projections of all of them are there as bytes alone.
        """
        index, grid = self.tracker.index if self.per_step else 0, self._input_grid(attn)
        images, tokens, _ = hidden_states.shape
        count, itself = context.shape[1], context is hidden_states
        project, parts = (self.joined, 3) if itself else (getattr(attn.to_q, "of_codes", None), 1)
        if project is None or grid is None or isinstance(index, Tensor):
            return None
        if hidden_states.device.type != "cpu" or tokens * count < LEAST_SCORES:
            return None
        grids, codes = self._grids_at(index), grid.codes(hidden_states)
        at_once = max(1, CACHED_PROJECTIONS // (parts * attn.inner_dim))
        operands = Operands(images, tokens, count, attn.heads, attn.inner_dim // attn.heads)
        for image in range(images):
            for start in range(0, tokens, at_once):
                rows = slice(start, min(start + at_once, tokens))
                query, *others = project(codes[image, rows], grid).unflatten(-1, (parts, 1, attn.heads, -1)).unbind(1)
                operands.put_queries(grids, query.transpose(0, 1), image, rows)
                if itself:
                    key, value = (other.transpose(0, 1) for other in others)
                    operands.put_keys(grids, key, value, image, rows)
        if not itself:
            keys_values = _of_one_input((attn.to_k, attn.to_v), context)
            operands.put_keys(grids, *(x.unflatten(-1, (attn.heads, -1)) for x in keys_values))
        return products_in_bytes(operands, mask, attn.scale, grids)

    def _of_step(
        self, scale: float, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """(B, tokens, heads, channels) of all, of one time step."""
        grids = self._grids_at(index)
        if query.device.type == "cpu" and query.shape[1] * key.shape[1] >= LEAST_SCORES:
            return in_bytes(query, key, value, mask, scale, grids)
        return in_floats(query, key, value, mask, scale, grids)


def _of_one_input(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The outputs of layers; an input that they share in one grid is quantised once."""
    found: dict[InputGrid, Tensor] = {}
    outputs = []
    for layer in layers:
        if not isinstance(layer, IntegerLayer) or (grid := layer.grid) is None:
            outputs.append(layer(x))
            continue
        if grid not in found:
            found[grid] = grid.codes(x)
        outputs.append(layer.of_codes(found[grid], grid))
    return outputs


def joined(projections: list[QuantizedLayer]) -> IntegerWeight | None:
    """Query, key and value of self-attention as one weight, or None where their inputs or sizes differ."""
    parts = [layer.input_quantizer for layer in projections]
    grids = {input_grids(part) for part in parts if isinstance(part, FakeQuantize)}
    biases = [layer.bias for layer in projections if isinstance(layer.bias, Tensor)]
    inputs = {layer.weight.shape[1] for layer in projections}
    if len(projections) < 3 or len(grids) + len(inputs) > 2 or len(biases) not in (0, 3):
        return None
    codes = torch.cat([layer.codes for layer in projections if layer.codes is not None])
    scale, point = (
        torch.cat([getattr(layer, name)[:, 0] for layer in projections])
        for name in ("weight_scale", "weight_zero_point")
    )
    return IntegerWeight(codes, scale, point, torch.cat(biases) if biases else None, None)


class Operands:
    """Codes that `products_in_bytes` multiplies, in the order of its products.

    Keys and values are signed, code - shift. The rest of a key, (shift - z_k) sum (q_q - z_q), is the same for all keys
    of a query and so does nothing to the softmax. The rest of a value is (shift - z_v) times the sum of the
    probabilities' codes, which one more column of ones gives.

    Attributes:
        queries: uint8 (B, heads, tokens, channels).
        keys: int8 (B, heads, channels, keys).
        values: int8 (B, heads, keys, channels + 1).
    """

    def __init__(self, images: int, tokens: int, keys: int, heads: int, channels: int) -> None:
        self.queries = torch.empty(images, heads, tokens, channels, dtype=torch.uint8)
        self.keys = torch.empty(images, heads, channels, keys, dtype=torch.int8)
        self.values = torch.ones(images, heads, keys, channels + 1, dtype=torch.int8)

    def put_queries(self, grids: Grids, query: Tensor, first: int = 0, tokens: slice = slice(None)) -> None:
        """Those of ``tokens``, float32 (images, tokens, heads, channels), from the ``first`` image on."""
        self.queries[first : first + len(query), :, tokens] = grids[0].codes(query).transpose(1, 2)

    def put_keys(self, grids: Grids, key: Tensor, value: Tensor, first: int = 0, tokens: slice = slice(None)) -> None:
        """The same of keys and values."""
        images = slice(first, first + len(key))
        self.keys[images, ..., tokens] = _signed(grids[1], key).permute(0, 2, 3, 1)
        self.values[images, :, tokens, :-1] = _signed(grids[2], value).transpose(1, 2)


def in_bytes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, grids: Grids) -> Tensor:
    """Attention by `products_in_bytes` of float32 (B, tokens, heads, channels)."""
    images, tokens, heads, channels = query.shape
    operands = Operands(images, tokens, key.shape[1], heads, channels)
    operands.put_queries(grids, query)
    operands.put_keys(grids, key, value)
    return products_in_bytes(operands, mask, scale, grids)


def products_in_bytes(operands: Operands, mask: Tensor | None, scale: float, grids: Grids) -> Tensor:
    """Attention by oneDNN's 8-bit products, one head of an image after the other, some queries at a time."""
    of_query, of_key, of_value, of_probabilities = grids
    images, heads, tokens, channels = operands.queries.shape
    count = operands.keys.shape[3]
    factor = of_query.scale * of_key.scale * scale * PER_NATURAL
    key_scale = torch.full((count,), factor)
    value_scale = torch.full((channels + 1,), of_probabilities.scale * of_value.scale)
    value_scale[-1] *= _shift(of_value) - of_value.zero_point
    norms = _largest_norm(operands.queries, of_query.zero_point, 3) * _largest_norm(operands.keys, 0, 2)
    largest = (norms * factor).tolist()
    at_once = max(16, SHARED_SCORES // count)
    codes = torch.empty(min(tokens, TOGETHER * at_once), count, dtype=torch.uint8)
    output = torch.empty(images, tokens, heads, channels)
    for image in range(images):
        for head in range(heads):
            queries = operands.queries[image, head]
            keys, values = Unpacked(operands.keys[image, head]), Unpacked(operands.values[image, head])
            small = mask is None and largest[image][head] < SMALL
            for first in range(0, tokens, len(codes)):
                last = min(first + len(codes), tokens)
                for start in range(first, last, at_once):
                    rows = slice(start, min(start + at_once, last))
                    scores = keys.scaled(queries[rows], of_query.zero_point, key_scale, None)
                    if mask is not None:
                        of_rows = mask[image, head] if mask.shape[2] == 1 else mask[image, head, rows]
                        scores.add_(of_rows, alpha=PER_NATURAL)
                    factors = _exponentials_(scores, of_probabilities.scale, small)
                    of_probabilities.codes_(scores, factors, codes[rows.start - first : rows.stop - first])
                    del scores  # the next ones take the same memory, which is in the cache
                y = values.scaled(codes[: last - first], of_probabilities.zero_point, value_scale, None)
                torch.add(y[:, :-1], y[:, -1:], out=output[image, first:last, head])
    return output


def _largest_norm(codes: Tensor, zero_point: int, channels: int) -> Tensor:
    """The largest norm of a token's code - zero point, (B, heads); ``channels`` is their dimension."""
    squares = [part.float().sub_(zero_point).square_().sum(channels - 1) for part in codes]
    return torch.stack(squares).amax(-1).sqrt_()


def in_floats(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, grids: Grids) -> Tensor:
    """Attention by products of centred codes in floating point, whose sums are exact, some heads at a time."""
    of_query, of_key, of_value, of_probabilities = grids
    images, tokens, heads, channels = query.shape
    by_head = [
        grid.centred(x).transpose(1, 2).reshape(images * heads, -1, channels)
        for grid, x in ((of_query, query), (of_key, key), (of_value, value))
    ]
    masks = None if mask is None else mask.flatten(0, 1)
    most_scores = channels * of_query.largest * of_key.largest
    # Probabilities of a query add up to one, and rounding adds at most half a code to each.
    most_codes = min(1 / of_probabilities.scale + key.shape[1] / 2, key.shape[1] * of_probabilities.largest)
    if of_probabilities.zero_point:
        most_codes = key.shape[1] * of_probabilities.largest
    factor = of_query.scale * of_key.scale * scale * PER_NATURAL
    together = CACHED_SCORES if query.device.type == "cpu" else MOST_SCORES
    at_once = max(1, together // (tokens * key.shape[1]))
    output = query.new_empty(len(by_head[0]), tokens, channels)
    for start in range(0, len(output), at_once):
        some = slice(start, start + at_once)
        q, k, v = (x[some] for x in by_head)
        scores = exact_bmm(q, k.transpose(1, 2), max(of_query.largest, of_key.largest), most_scores).mul_(factor)
        if masks is not None:
            scores.add_(masks[some], alpha=PER_NATURAL)
        factors = _exponentials_(scores, of_probabilities.scale)
        codes = of_probabilities.centred_(scores.mul_(factors))
        largest = max(of_probabilities.largest, of_value.largest)
        output[some] = exact_bmm(codes, v, largest, most_codes * of_value.largest)
    output *= of_probabilities.scale * of_value.scale
    return output.unflatten(0, (images, heads)).transpose(1, 2)


def _exponentials_(scores: Tensor, scale: float, small: bool = False) -> Tensor:
    """Turns scores, in place, into powers of two, and gives factors: softmax(scores) / scale = powers * factors.

    Scores are binary logarithms: on a CPU powers of two take a quarter of the time of exponentials, and all of it half
    the time of ``torch.softmax``. ``small`` scores, of at most ``SMALL``, need no maximum. A power that would be a
    subnormal number takes a hundred times as long as others, and rounds to code 0.
    """
    if not small:
        scores.sub_(scores.amax(-1, keepdim=True)).clamp_min_(LEAST_EXPONENT)
    return scores.exp2_().sum(-1, keepdim=True).mul_(scale).reciprocal_()


def _shift(grid: InputGrid) -> int:
    """What makes codes signed: the zero point where code - zero point fits, else half of a byte."""
    return grid.zero_point if grid.largest <= 127 else 128


def _signed(grid: InputGrid, x: Tensor) -> Tensor:
    """int8 code - shift."""
    return grid.codes(x).sub_(_shift(grid) % 256).view(torch.int8)  # the same bits, modulo 256


def not_executable(processor: QuantizedAttention) -> str:
    """Why an attention cannot compute in integers, or an empty text."""
    if processor.dynamic:
        return "the ranges of its operands are dynamic"
    if isinstance(processor.probabilities, AdaptiveQuantize):
        return LOGARITHMIC
    if any(too_wide(part) for part in processor.modules() if isinstance(part, FakeQuantize)):
        return f"an operand of its products has more than {CODE_BITS} bits"
    return ""
