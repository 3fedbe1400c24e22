"""The description of a network: its blocks, its layers by role, what depends on the time step, how it is called.

A backbone holds paths and no modules, so that one describes a network and its quantised twin. A further kind of network
is one file beside `unet` and `transformer`, named in ``KINDS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal, TypeAlias

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor

Network: TypeAlias = UNet2DModel | UNet2DConditionModel | DiTTransformer2DModel

# Class of diffusers -> the module and the backbone that know it.
KINDS = {
    "UNet2DModel": ("tfmq.network.unet", "UNetBackbone"),
    "UNet2DConditionModel": ("tfmq.network.unet", "UNetBackbone"),
    "DiTTransformer2DModel": ("tfmq.network.transformer", "TransformerBackbone"),
}
# What a network is conditioned on besides the time step: nothing, a context for cross-attention, or a class.
Condition = Literal["none", "context", "class"]


@dataclass(frozen=True)
class Block:
    """One step of the forward pass, from one hidden state to the next.

    Attributes:
        path: of the module that makes it.
        pop: first concatenates the top of the stack of skip connections to the input.
        push: puts the output on that stack.
        also: paths of further modules whose layers belong to the step.
    """

    path: str
    pop: bool = False
    push: bool = False
    also: tuple[str, ...] = ()

    def holds(self, path: str) -> bool:
        """Whether the module at ``path`` is a part of this step."""
        return any(path == own or path.startswith(f"{own}.") for own in (self.path, *self.also))


@dataclass(frozen=True)
class Backbone(ABC):
    """The parts of a network, all by module path.

    Attributes:
        blocks: in forward order, from the first layer to the last.
        time_embedding: linear layers that depend on the time step alone and come before ``time_projections``.
        time_projections: linear layers that depend on the time step alone, whose outputs are the temporal features.
        attentions: attention modules.
        roles: paths of layers, or attention modules, by the roles that a protocol may treat in its own way.
        shortcut_splits: shortcut convolutions over concatenated features -> channels (decoder, skip).
        condition: what the network is conditioned on besides the time step.
    """

    blocks: tuple[Block, ...]
    time_embedding: tuple[str, ...]
    time_projections: tuple[str, ...]
    attentions: tuple[str, ...]
    roles: dict[str, tuple[str, ...]] = field(hash=False)
    shortcut_splits: dict[str, tuple[int, int]] = field(hash=False)
    condition: Condition

    @classmethod
    @abstractmethod
    def of(cls, network: Network) -> Backbone:
        """Read the backbone of a network. Raises ValueError for parts that running it block by block would lose."""

    @property
    def temporal(self) -> tuple[str, ...]:
        """The temporal information block of TFMQ-DM: all layers that depend on the time step alone."""
        return self.time_embedding + self.time_projections

    @staticmethod
    @abstractmethod
    def evaluate(network: Network, latents: Tensor, timesteps: Tensor, context: Tensor | None) -> Tensor:
        """The predicted noise (B, C, H, W) for latents (B, C, H, W), time steps () or (B,), and the conditioning."""

    @abstractmethod
    def random_condition(
        self,
        network: Network,
        rows: int,
        tokens: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Tensor | None:
        """What ``evaluate`` takes as the conditioning of so many rows, at random, drawn on ``device``.

        A context has so many ``tokens`` a row; where the network takes none, they do not count.
        """

    @abstractmethod
    def encoding(self, network: Network, timesteps: Tensor) -> Tensor:
        """The sinusoidal encoding (N, D) of time steps (N,)."""

    @abstractmethod
    def time_input(self, network: Network, timesteps: Tensor) -> Tensor:
        """What blocks take of time steps (N,), one row for each: the time embedding, or the steps themselves."""

    @abstractmethod
    def temporal_features(self, network: Network, timesteps: Tensor) -> list[Tensor]:
        """What time steps (N,) contribute to each block: (N, C_i), the output of each of ``time_projections``.

        These are the emb_{t,i} of TFMQ-DM (arXiv 2311.16503, eq. 3), the outputs of the temporal information block.
        """

    @abstractmethod
    def run_block(self, network: Network, block: Block, hidden: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """Output of one block for a hidden state (B, ...), rows (B, ...) of ``time_input``, and context or classes."""

    @abstractmethod
    def drop_time_embedding(self, network: Network) -> None:
        """Take ``time_embedding`` out of a network, in place, whose temporal features are all looked up."""

    @abstractmethod
    def silu_inputs(self, network: Network) -> set[str]:
        """Paths of the layers whose input is the output of a SiLU."""


def kind_of(network: Network) -> type[Backbone]:
    """The kind of backbone that a network has. Raises ValueError for a class that none knows.

    What runs in the place of a network says so by ``stands_for``, the name of that network's class.
    """
    classes = [parent.__name__ for parent in type(network).__mro__]
    for known in (*classes, getattr(network, "stands_for", "")):
        if known in KINDS:
            module, name = KINDS[known]
            return getattr(import_module(module), name)
    raise ValueError(f"{type(network).__name__} is not supported: give one of {', '.join(KINDS)}")


def backbone_of(network: Network) -> Backbone:
    """The backbone of a network. Raises ValueError for one that is not supported, or has parts that are not."""
    return kind_of(network).of(network)


def evaluate(network: Network, latents: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
    """The predicted noise (B, C, H, W); see `Backbone.evaluate`."""
    return kind_of(network).evaluate(network, latents, timesteps, context)


def full_precision_bytes(network: Network) -> int:
    """Size of the network's parameters at 32 bits, in bytes."""
    return sum(parameter.numel() * 4 for parameter in network.parameters())
