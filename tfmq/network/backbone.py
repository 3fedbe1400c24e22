"""The description of a network: its blocks, its layers by role, what depends on the time step, how it is called.

A backbone holds paths and no modules, so that one describes a network and its quantised twin. A further kind of network
is one file beside `unet` and `transformer`, named in ``KINDS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Literal, TypeAlias

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor

from tfmq.network.conditioning import ADAPTER, CHANNELS, DOWN, MID, Inputs

Network: TypeAlias = UNet2DModel | UNet2DConditionModel | DiTTransformer2DModel

# Class of diffusers -> the module and the backbone that know it.
KINDS = {
    "UNet2DModel": ("tfmq.network.unet", "UNetBackbone"),
    "UNet2DConditionModel": ("tfmq.network.unet", "UNetBackbone"),
    "DiTTransformer2DModel": ("tfmq.network.transformer", "TransformerBackbone"),
}
# What a network is conditioned on besides the time step: nothing, a context for cross-attention, or a class.
Condition = Literal["none", "context", "class"]
NO_INPUTS: Inputs = {}


@dataclass(frozen=True)
class Block:
    """One step of the forward pass, from one hidden state to the next.

    Attributes:
        path: of the module that makes it.
        pop: first concatenates the top of the stack of skip connections to the input.
        push: puts the output on that stack.
        also: paths of further modules whose layers belong to the step.
        adds: further inputs (see `tfmq.network.conditioning`) that are added to its output, where there are any.
        pop_adds: likewise to what it pops.
    """

    path: str
    pop: bool = False
    push: bool = False
    also: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    pop_adds: str = ""

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
        condition_embedding: linear layers before the blocks that depend on further inputs (SDXL, LCM) and whose outputs
            go into what blocks take of the time step; in forward order.
    """

    blocks: tuple[Block, ...]
    time_embedding: tuple[str, ...]
    time_projections: tuple[str, ...]
    attentions: tuple[str, ...]
    roles: dict[str, tuple[str, ...]] = field(hash=False)
    shortcut_splits: dict[str, tuple[int, int]] = field(hash=False)
    condition: Condition
    condition_embedding: tuple[str, ...] = ()

    @classmethod
    @abstractmethod
    def of(cls, network: Network) -> Backbone:
        """Read the backbone of a network. Raises ValueError for parts that running it block by block would lose."""

    @property
    def temporal(self) -> tuple[str, ...]:
        """The temporal information block of TFMQ-DM: all layers that depend on the time step alone."""
        return self.time_embedding + self.time_projections

    @property
    def embedding(self) -> tuple[str, ...]:
        """Layers that are learned one by one before the blocks: those that embed the time step and conditions."""
        before = tuple(path for path in self.time_projections if not any(block.holds(path) for block in self.blocks))
        return self.time_embedding + before + self.condition_embedding

    @staticmethod
    @abstractmethod
    def known_arguments(network: Network) -> frozenset[str]:
        """The arguments of the network's forward that may be given; others are refused, if they are not None."""

    @staticmethod
    def required_inputs(network: Network) -> tuple[str, ...]:
        """The further inputs (see `tfmq.network.conditioning`) without which the network can not be evaluated."""
        return ()

    @staticmethod
    def known_inputs(network: Network) -> tuple[str, ...]:
        """The further inputs that the network may take, of lists the name without the number."""
        return ()

    @staticmethod
    @abstractmethod
    def evaluate(
        network: Network, latents: Tensor, timesteps: Tensor, context: Tensor | None, inputs: Inputs = NO_INPUTS
    ) -> Tensor:
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

    def random_inputs(
        self, network: Network, rows: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Inputs:
        """The ``required_inputs`` of so many rows, at random, drawn on ``device``."""
        return {}

    @abstractmethod
    def encoding(self, network: Network, timesteps: Tensor) -> Tensor:
        """The sinusoidal encoding (N, D) of time steps (N,)."""

    @abstractmethod
    def time_input(self, network: Network, timesteps: Tensor, inputs: Inputs = NO_INPUTS) -> Tensor:
        """What blocks take of time steps (N,), one row for each: the time embedding, or the steps themselves.

        Further inputs, (N, ...) each, go in where the network has a ``condition_embedding``.
        """

    @abstractmethod
    def temporal_features(self, network: Network, timesteps: Tensor) -> list[Tensor]:
        """What time steps (N,) contribute to each block: (N, C_i), the output of each of ``time_projections``.

        These are the emb_{t,i} of TFMQ-DM (arXiv 2311.16503, eq. 3), the outputs of the temporal information block.
        """

    @abstractmethod
    def run_block(
        self,
        network: Network,
        block: Block,
        hidden: Tensor,
        time: Tensor,
        context: Tensor | None,
        size: torch.Size | None = None,
    ) -> Tensor:
        """Output of one block for a hidden state (B, ...), rows (B, ...) of ``time_input``, and context or classes.

        ``size`` is (height, width) of the skip connection that comes next, to which a block that upsamples fits its
        output; without it, it doubles both.
        """

    @staticmethod
    @abstractmethod
    def check_size(network: Network, height: int, width: int) -> None:
        """Raise ValueError for latents of a size that the forward pass of ``network`` does not take."""

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


def evaluate(
    network: Network,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor | None = None,
    inputs: Inputs = NO_INPUTS,
) -> Tensor:
    """The predicted noise (B, C, H, W); see `Backbone.evaluate`. What floats is cast to the network's type."""
    first = next(network.parameters(), latents)
    if first.dtype != latents.dtype:
        latents = latents.to(network.dtype)
    if context is not None and context.is_floating_point() and context.dtype != latents.dtype:
        context = context.to(latents.dtype)
    if inputs:
        inputs = {name: value.to(latents.dtype) for name, value in inputs.items()}
    return kind_of(network).evaluate(network, latents, timesteps, context, inputs)


def refuse_unknown(network: Network, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Raise ValueError, with its name, for an argument of a forward call that the backbone does not know.

    A forward pre-hook of quantised networks. Arguments that are None, or empty, change nothing and pass.
    """
    names = _arguments(type(network))  # type: ignore[arg-type]
    known = kind_of(network).known_arguments(network)
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        given = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
        for each, part in given.items():
            if part is not None and name not in known and each not in known:
                raise ValueError(
                    f"the quantised {type(network).__name__} was called with {each}, which it was not calibrated for: "
                    f"it takes {', '.join(sorted(known))}; leave it out, or use the full-precision network"
                )


@cache
def _arguments(network: type[torch.nn.Module]) -> tuple[str, ...]:
    return tuple(signature(network.forward).parameters)[1:]


def check_further_inputs(network: Network, inputs: Inputs) -> None:
    """Raise ValueError for further inputs that a network does not take, or lacks."""
    kind, name = kind_of(network), type(network).__name__
    known = kind.known_inputs(network)
    for given in inputs:
        if given.partition(".")[0] not in known:
            takes = ", ".join(known) or "none"
            raise ValueError(f"the input {given} is none that a {name} takes: it takes {takes}")
    for needed in kind.required_inputs(network):
        if needed not in inputs:
            raise ValueError(
                f"the pool has no {needed}, which this {name} takes: record it with a Conditioning of them"
            )
    if any(given.startswith(DOWN) for given in inputs) and MID not in inputs:
        raise ValueError(f"the pool has {DOWN} without {MID}: give both, or those of an adapter as {ADAPTER}")


def check_inputs(network: Network, latents: Tensor, context: Tensor | None, inputs: Inputs = NO_INPUTS) -> None:
    """Raise ValueError for latents, or what goes with them, that ``network`` cannot take; see `Backbone.evaluate`."""
    shape = tuple(latents.shape)
    added = inputs[CHANNELS].shape[1] if CHANNELS in inputs else 0
    channels = network.config.in_channels - added
    if len(shape) != 4 or shape[1] != channels or not all(shape):
        besides = f", and {added} of its channels come from the input {CHANNELS}" if added else ""
        raise ValueError(
            f"latents of shape {shape}: the network takes (images, {channels}, height, width), at least one image of "
            f"at least one pixel{besides}"
        )
    if not hasattr(network, "stands_for"):  # which knows its own size
        kind_of(network).check_size(network, *shape[2:])
    if context is None:
        return
    if context.shape[:1] != latents.shape[:1]:
        raise ValueError(
            f"{len(latents)} images and a conditioning of shape {tuple(context.shape)}: give a row of it for each image"
        )
    taken = getattr(network.config, "cross_attention_dim", None)
    if isinstance(taken, int) and context.is_floating_point() and (context.dim() != 3 or context.shape[2] != taken):
        raise ValueError(
            f"a context of shape {tuple(context.shape)}: the network takes (images, tokens, {taken}), so give what the "
            "text encoder puts out that it was trained with"
        )


def full_precision_bytes(network: Network) -> int:
    """Size of the network's parameters at 32 bits, in bytes."""
    return sum(parameter.numel() * 4 for parameter in network.parameters())
