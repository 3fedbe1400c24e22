"""The tensors of a quantised network as files hold them: weights as packed integer codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from tfmq.network.backbone import Network
from tfmq.numerics.finite import all_finite
from tfmq.plan import activation_quantizers, quantized_layers
from tfmq.state import check_quantized, check_storable


def pack(codes: Tensor, bits: int) -> Tensor:
    """Flatten uint8 codes; two codes of at most 4 bits share a byte (the first in the low half)."""
    flat = codes.flatten()
    if bits > 4:
        return flat.clone()
    flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Inverse of ``pack`` for codes of ``shape``."""
    flat = packed if bits > 4 else torch.stack([packed & 15, packed >> 4], 1).flatten()
    return flat[: shape.numel()].reshape(shape)


def packed_bytes(network: Network) -> int:
    """Size of the network's tensors in a quantised checkpoint, in bytes.

    Only shapes are looked at, so that the quantisers may have been inserted on the meta device.
    """
    layers = quantized_layers(network)
    total = 0
    for name, tensor in network.state_dict().items():
        path, _, kind = name.rpartition(".")
        if path in layers and kind == "weight":
            total += -(-tensor.numel() // 2) if layers[path].weight_bits <= 4 else tensor.numel()
        elif path not in layers or kind != "codes":
            total += tensor.nbytes
    return total


def packed_tensors(network: Network) -> dict[str, Tensor]:
    """All tensors of the network, a quantised weight as its packed codes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    for path, layer in quantized_layers(network).items():
        del tensors[f"{path}.weight"]
        tensors[f"{path}.codes"] = pack(tensors[f"{path}.codes"], layer.weight_bits)
    return tensors


def checked_tensors(network: Network) -> dict[str, Tensor]:
    """The tensors of a network. Raises ValueError if any layer or activation is not quantised yet, or holds NaN."""
    check_quantized(network)
    check_storable(network)
    unfinished = [path for path, layer in quantized_layers(network).items() if layer.codes is None]
    unfinished += [path for path, quantizer in activation_quantizers(network).items() if not quantizer.enabled]
    if unfinished:
        raise ValueError(
            f"the network is half quantised, {unfinished[0]} is not: start again from the full-precision one"
        )
    tensors = packed_tensors(network)
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ValueError(f"{name} holds NaN or infinity: quantise again from a checkpoint that is not damaged")
    return tensors


def restore(network: Network, stored: dict[str, Tensor], where: str, assign: bool = False) -> None:
    """Fill a network of the right structure with the tensors of a file.

    ``assign`` puts the tensors themselves in the place of those of the network, which may be on the meta device.
    Raises ValueError, which names ``where`` they are from, if they are not those of the structure.
    """
    layers = quantized_layers(network)
    quantizers = activation_quantizers(network)
    weights = {f"{name}.weight" for name in layers}
    expected = (set(network.state_dict()) - weights) | {f"{name}.codes" for name in layers}
    if set(stored) != expected:
        missing, unexpected = sorted(expected - set(stored)), sorted(set(stored) - expected)
        raise ValueError(f"{where} does not match its description: missing {missing[:3]}, unexpected {unexpected[:3]}")
    codes = {name: stored.pop(f"{name}.codes") for name in layers}
    for name, quantizer in quantizers.items():
        quantizer.scale = torch.empty_like(stored[f"{name}.scale"])
        quantizer.zero_point = torch.empty_like(stored[f"{name}.zero_point"])
        quantizer.enabled = True
    correction = getattr(network, "noise_correction", None)
    if correction is not None:  # its time steps are float32 where the schedule has fractional ones
        correction.timesteps = torch.empty_like(stored["noise_correction.timesteps"])
    try:
        network.load_state_dict(stored, strict=False, assign=assign)
        for name, layer in layers.items():
            layer.load_codes(unpack(codes[name], layer.weight_bits, layer.weight.shape))
    except RuntimeError as error:
        raise ValueError(f"{where} does not match its description: {error}") from None


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
