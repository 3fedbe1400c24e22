"""Block formats as pure functions: integer codes, and one scale of 8 bits for each block of consecutive values.

Codes are symmetric around 0, or begin at 0 where no value is negative; there is no zero point. A block's scale is

- ``e8m0``, a power of two: X = 2^floor(log2 max|x|), and a code of b bits counts units of X / 2^(b - 2). With 8 bits
  and blocks of 32 that is MXINT8 of the Open Compute Project's Microscaling formats (version 1.0), whose
  code -128 is left unused, as the specification allows.
- ``e4m3``, a float of 4 exponent and 3 mantissa bits, the nearest to max|x| / (largest code). That type spans 2^-9 to
  448 only, so that a coarse scale in float32, shared by many blocks, goes with it: with it the largest of these blocks
  has the scale 448 (as in VS-Quant, arXiv 2102.04503, which has integers in the place of E4M3).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tfmq.numerics.affine import Grid

ScaleFormat = Literal["float32", "e8m0", "e4m3"]
BLOCK_SCALES = tuple(name for name in get_args(ScaleFormat) if name != "float32")

LARGEST_E4M3 = 448.0
# Powers of two from 2^-111 on: with the units of a code they stay normal numbers of float32.
SMALLEST_E8M0, LARGEST_E8M0 = 16, 254
SMALLEST_COARSE = 2.0**-100


def block_grid(bits: int, unsigned: bool) -> Grid[int]:
    """The codes of a block format."""
    return Grid.unsigned(bits) if unsigned else Grid(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def in_blocks(x: Tensor, dim: int, block: int) -> Tensor:
    """``x`` with dimension ``dim`` as two, (blocks, block); zeros fill the last block up.

    ``dim`` is not negative.
    """
    missing = -x.shape[dim] % block
    if missing:
        x = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])
    return x.unflatten(dim, (-1, block))


def out_of_blocks(x: Tensor, dim: int, size: int) -> Tensor:
    """Inverse of ``in_blocks`` for a dimension of ``size``."""
    return x.flatten(dim, dim + 1).narrow(dim, 0, size)


def e8m0_codes(largest: Tensor) -> Tensor:
    """floor(log2) of the largest magnitudes of blocks (float32), with the bias 127: uint8 of the same shape."""
    exponents = largest.contiguous().view(torch.int32) >> 23
    return exponents.clamp(SMALLEST_E8M0, LARGEST_E8M0).to(torch.uint8)


def e8m0_scales(codes: Tensor, bits: int) -> Tensor:
    """What a code of ``bits`` counts in blocks of these scales: 2^(code - 127 - (bits - 2)), float32."""
    return ((codes.to(torch.int32) - (bits - 2)) << 23).view(torch.float32)


def coarse_scale(largest: Tensor, levels: int) -> Tensor:
    """The float32 scale of blocks whose largest magnitude is ``largest`` and largest code ``levels``."""
    return (largest / (levels * LARGEST_E4M3)).clamp_min(SMALLEST_COARSE)


def e4m3_codes(largest: Tensor, levels: int, coarse: Tensor) -> Tensor:
    """The bits of the E4M3 scales of blocks, from their largest magnitudes: uint8 of the same shape.

    A block that is too small for E4M3 beside the others gets the smallest scale above 0.
    """
    wanted = (largest / (levels * coarse)).clamp_max(LARGEST_E4M3)
    return wanted.to(torch.float8_e4m3fn).view(torch.uint8).clamp_min(1)


def e4m3_scales(codes: Tensor, coarse: Tensor) -> Tensor:
    """What a code counts in blocks of these scales, float32."""
    return codes.view(torch.float8_e4m3fn).float() * coarse
