"""The executable twin of a quantised network: the same arithmetic, written as integer kernels take it."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn

from tfmq.export.activations import Position
from tfmq.export.attention import ExecutableAttention
from tfmq.export.layers import ExecutableLayer, Table, WeightOnlyLayer
from tfmq.modules.attention import QuantizedAttention
from tfmq.network.backbone import Backbone, Network, backbone_of
from tfmq.plan import announce_step, quantized_layers
from tfmq.precision import FULL


class ExecutableNetwork(nn.Module):
    """Predicts noise (B, C, H, W) from latents (B, C, H, W), the index of a time step (1,), and a condition.

    Attributes:
        network: a copy of the quantised network with executable parts; tensors that stay as they are, are shared.
        timesteps: int64 (S,), what the index counts.
    """

    def __init__(self, network: Network, timesteps: Tensor) -> None:
        super().__init__()
        own = network.step_tracker.steps
        self.position = Position(torch.searchsorted(own, timesteps) if len(own) else None)
        self.timesteps = timesteps
        backbone = backbone_of(network)
        features = temporal_features(network, backbone, timesteps)
        self.condition = backbone.condition
        self.network = shared_copy(network)
        for path, rows in zip(backbone.time_projections, features, strict=True):
            self.network.set_submodule(path, Table(rows, self.position))
        backbone.drop_time_embedding(self.network)
        for path, layer in quantized_layers(self.network).items():
            weight_only = layer.activation_bits == FULL
            twin = WeightOnlyLayer(layer) if weight_only else ExecutableLayer(layer, self.position)
            self.network.set_submodule(path, twin)
        for path in backbone.attentions:
            attention = self.network.get_submodule(path)
            if isinstance(attention.processor, QuantizedAttention):
                # Not by its method, which keeps quantised products in place.
                attention.processor = ExecutableAttention(attention, attention.processor, self.position)

    def forward(self, latents: Tensor, step: Tensor, condition: Tensor | None = None) -> Tensor:
        self.position.index = step
        unused = torch.zeros_like(latents[:, 0, 0, 0])
        given = (unused,) if condition is None else (unused, condition)
        if self.condition == "class":
            return self.network(latents, timestep=unused, class_labels=condition, return_dict=False)[0]
        return self.network(latents, *given, return_dict=False)[0]

    def example(self, latents: tuple[int, ...], condition: tuple[int, ...] | None) -> tuple[Tensor, ...]:
        """Inputs to trace with, small ones where the network takes any size: latents, step, condition."""
        batch, channels, *sides = latents
        blocks = len(getattr(self.network.config, "block_out_channels", ()))
        if blocks:
            # Two pixels are left on the lowest level.
            sides = [min(side, 2**blocks) if side % 2**blocks == 0 else side for side in sides]
        inputs = [torch.zeros(2, channels, *sides), torch.zeros(1, dtype=torch.int64)]
        if condition is not None:
            _, *rest = condition
            inputs.append(torch.zeros(2, *rest) if rest else torch.zeros(2, dtype=torch.int64))
        return tuple(inputs)

    @property
    def ports(self) -> tuple[str, ...]:
        """The names of its inputs."""
        return ("latents", "step") if self.condition == "none" else ("latents", "step", "condition")


@torch.no_grad()
def temporal_features(network: Network, backbone: Backbone, timesteps: Tensor) -> list[Tensor]:
    """What the quantised network adds to its blocks at time steps (S,): (S, C_i) for each time projection."""
    announce_step(network, timesteps)
    return backbone.temporal_features(network, timesteps.to(network.device))


def shared_copy(network: Network) -> Network:
    """A copy of a network whose tensors are the network's own, without the hook that follows its time steps."""
    own = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    hooks = network._forward_pre_hooks
    copied = copy.deepcopy(network, own | {id(hooks): type(hooks)()})
    copied._forward_pre_hooks_with_kwargs.clear()
    return copied
