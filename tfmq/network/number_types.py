"""Number types of networks: which are taken, and the float32 in which everything is learned."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from tfmq.network.backbone import Network
from tfmq.network.calibration import CalibrationSet

TYPES = {
    str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
# What of a pool is of the schedule, and not of the network.
PRECISE = ("alphas", "predicts")


def number_type(network: Network) -> torch.dtype:
    """The type of all parameters of a network.

    Raises ValueError for one that is not computed in, such as float8, in which layerwise casting keeps them, and for
    more than one.
    """
    found = {parameter.dtype: name for name, parameter in network.named_parameters()}
    for kind, name in found.items():
        if kind not in TYPES.values():
            raise ValueError(
                f"{name} is of type {kind}; taken are {', '.join(TYPES)}: load the network in one of these, without "
                "layerwise casting"
            )
    if len(found) > 1:
        several = " and ".join(f"{name} of type {kind}" for kind, name in found.items())
        raise ValueError(f"the network has {several}: cast it to one type, such as network.to(torch.float16)")
    return next(iter(found))


def pool_in_float32(pool: CalibrationSet) -> CalibrationSet:
    """The pool with all that a network takes and puts out in float32, and the same pool where it is already."""
    others = {
        name: tensor.float()
        for name, tensor in pool.tensors.items()
        if name not in PRECISE and tensor.is_floating_point() and tensor.dtype != torch.float32
    }
    if not others:
        return pool
    return replace(CalibrationSet.of({**pool.tensors, **others}, pool.settings), scheduler=pool.scheduler)


def cast(network: Network, kind: torch.dtype) -> Network:
    """Cast a network, in place."""
    # The method of diffusers warns of modules to keep in float32 even where there are none.
    nn.Module.to(network, kind)
    return network


def in_float32(network: Network) -> Network:
    """A copy of a network in float32, or the network itself where it is."""
    return network if number_type(network) == torch.float32 else copy.deepcopy(network).float()


@torch.no_grad()
def cast_back(network: Network, given: Network, changed: Collection[str]) -> None:
    """Cast a network from float32 to the type of ``given``, the network that it was, in place.

    Parameters that were not changed since get their values of then, which float64 would have lost; ``changed`` are
    names of some that were, whatever their values.
    """
    cast(network, number_type(given))
    before: dict[str, Tensor] = dict(given.named_parameters())
    for name, parameter in network.named_parameters():
        if name in before and name not in changed and torch.equal(before[name].float(), parameter.float()):
            parameter.copy_(before[name])
