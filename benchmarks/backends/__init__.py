"""What computes a cell's quantised network: one file each, with a ``BACKEND``.

Cells of one backend do not depend on the code of another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from tfmq.network.backbone import Network


@dataclass(frozen=True)
class Backend:
    """One way to compute a quantised network.

    Attributes:
        check: raises ValueError where the machine, with this device, does not have the backend.
        refusal: why it does not compute a network, whose quantisers are there and need no ranges yet, or an empty text.
        network: what computes a quantised network, which it takes the place of.
    """

    check: Callable[[torch.device], None]
    refusal: Callable[[Network], str]
    network: Callable[[Network], Network]
