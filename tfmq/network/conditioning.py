"""What an image is conditioned on, and the further inputs of a network, each under diffusers' own name.

A further input is a tensor (B, ...) with a row for each image. Lists count from 0, as in ``NAME.0``, ``NAME.1``:

| name | shape | who has it |
|---|---|---|
| ``text_embeds`` | (B, D) | SDXL: the pooled text |
| ``time_ids`` | (B, 6) | SDXL: original size, crop, target size |
| ``timestep_cond`` | (B, D) | LCM: the embedding of the guidance scale |
| ``channels`` | (B, c, H, W) | inpainting: mask and masked image, concatenated to the latents before each evaluation |
| ``down_block_additional_residuals.i`` | (B, C_i, H_i, W_i) | ControlNet |
| ``mid_block_additional_residual`` | (B, C, H, W) | ControlNet |
| ``down_intrablock_additional_residuals.i`` | (B, C_i, H_i, W_i) | T2I-Adapter |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from diffusers import ControlNetModel
from torch import Tensor

Inputs: TypeAlias = Mapping[str, Tensor]

TEXT_EMBEDS, TIME_IDS, TIMESTEP_COND, CHANNELS = "text_embeds", "time_ids", "timestep_cond", "channels"
DOWN, MID = "down_block_additional_residuals", "mid_block_additional_residual"
ADAPTER = "down_intrablock_additional_residuals"


@dataclass(frozen=True)
class Control:
    """A ControlNet, whose residuals follow the latents and are computed anew at each step.

    Attributes:
        controlnet: called with what the network is called with.
        images: (B, 3, height, width), what it is shown for each image.
        scale: the residuals are multiplied by it.
    """

    controlnet: ControlNetModel
    images: Tensor
    scale: float = 1.0

    def residuals(self, latents: Tensor, timestep: Tensor, context: Tensor | None, inputs: Inputs) -> Inputs:
        """The residuals for latents (B, C, H, W), or (2 B, C, H, W) where guidance doubles them, by name."""
        kind = latents.dtype
        images = self.images.to(kind).repeat(len(latents) // len(self.images), 1, 1, 1)
        inputs = {name: value.to(kind) for name, value in inputs.items()}
        down, mid = self.controlnet(
            latents,
            timestep,
            encoder_hidden_states=None if context is None else context.to(kind),
            controlnet_cond=images,
            conditioning_scale=self.scale,
            added_cond_kwargs=added_conditions(inputs),
            return_dict=False,
        )
        return {f"{DOWN}.{index}": part for index, part in enumerate(down)} | {MID: mid}


@dataclass(frozen=True)
class Conditioning:
    """What each image is conditioned on.

    Attributes:
        context: (B, tokens, D) for cross-attention, or int64 classes (B,).
        unconditional: its counterpart for guidance, of the same shape; None without guidance.
        inputs: further inputs by name, each (B, ...).
        unconditional_inputs: their counterparts for guidance, of those that differ.
        controls: ControlNets; the residuals of several are added.
    """

    context: Tensor
    unconditional: Tensor | None = None
    inputs: Inputs = field(default_factory=dict)
    unconditional_inputs: Inputs = field(default_factory=dict)
    controls: tuple[Control, ...] = ()

    def __getitem__(self, rows: slice) -> Conditioning:
        """What some of the images are conditioned on."""
        return Conditioning(
            self.context[rows],
            None if self.unconditional is None else self.unconditional[rows],
            {name: value[rows] for name, value in self.inputs.items()},
            {name: value[rows] for name, value in self.unconditional_inputs.items()},
            tuple(Control(each.controlnet, each.images[rows], each.scale) for each in self.controls),
        )

    def both_halves(self) -> tuple[Tensor, Inputs]:
        """Context and further inputs for guidance, ordered [unconditional, conditional]."""
        if self.unconditional is None:
            raise ValueError("the conditioning has no unconditional half: give one, or take the guidance scale 1")
        off = {**self.inputs, **self.unconditional_inputs}
        inputs = {name: torch.cat([off[name], value]) for name, value in self.inputs.items()}
        return torch.cat([self.unconditional, self.context]), inputs

    def residuals(self, latents: Tensor, timestep: Tensor, context: Tensor, inputs: Inputs) -> Inputs:
        """What all ControlNets together add at a step, by name; empty without any."""
        total: dict[str, Tensor] = {}
        for control in self.controls:
            for name, part in control.residuals(latents, timestep, context, inputs).items():
                total[name] = total[name] + part if name in total else part
        return total


def added_conditions(inputs: Inputs) -> dict[str, Tensor] | None:
    """The ``added_cond_kwargs`` of a forward call, or None where there are none."""
    return {name: inputs[name] for name in (TEXT_EMBEDS, TIME_IDS) if name in inputs} or None


def listed(inputs: Inputs, name: str) -> list[Tensor] | None:
    """The tensors ``name.0``, ``name.1`` and so on, or None where there are none."""
    found: list[Tensor] = []
    while f"{name}.{len(found)}" in inputs:
        found.append(inputs[f"{name}.{len(found)}"])
    return found or None


def with_channels(latents: Tensor, inputs: Inputs) -> Tensor:
    """Latents (B, C, H, W) with the channels that are concatenated to them, if any."""
    return torch.cat([latents, inputs[CHANNELS]], 1) if CHANNELS in inputs else latents
