"""Quantised checkpoints that describe themselves: packed integer weights, scales and the whole setting in one file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.cache import CachePlan, cached_projections, insert_cache
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Network, backbone_of
from tfmq.network.number_types import TYPES, cast, number_type
from tfmq.network.unet import set_attention_heads
from tfmq.numerics.steps import exact_steps
from tfmq.passes.correction import NoiseCorrection, attach_correction, correction_of
from tfmq.plan import (
    AttentionPlan,
    LayerPlan,
    QuantizationPlan,
    activation_quantizers,
    check_quantized,
    insert_quantizers,
    quantized_layers,
)

FORMAT = "tfmq-quantized-3"
FAMILY = FORMAT.rpartition("-")[0]
DAMAGED = "damaged or truncated: delete it and quantise again"
NETWORKS = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)}


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


def save_quantized(network: Network, path: str | Path, metadata: dict[str, object]) -> None:
    """Write a quantised network to one safetensors file, through a temporary name.

    Args:
        metadata: JSON-able facts to keep with it: method, settings, hashes of base checkpoint and calibration pool.

    Raises:
        ValueError: the network is not quantised, or only in part, or holds NaN or infinity, or has more than one number
            type, as under layerwise casting; or ``path`` is a folder, or in a folder that does not exist.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        problem = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"cannot write {path}: {problem}; give the path of a file in a folder that exists")
    tensors, correction = _checked_tensors(network), correction_of(network)
    described = {
        "format": FORMAT,
        "unet_class": type(network).__name__,
        "unet_config": network.to_json_string(),
        "plan": json.dumps(asdict(_plan(network))),
        "steps": json.dumps(network.step_tracker.steps.tolist()),
        "cache": json.dumps({name: asdict(table.plan) for name, table in cached_projections(network).items()}),
        "step_bits": json.dumps(
            [n for n, part in activation_quantizers(network).items() if part.step_bits is not None]
        ),
        "correction": json.dumps(None if correction is None else _described(correction)),
        "metadata": json.dumps(metadata),
    }
    kind = str(number_type(network)).removeprefix("torch.")
    if kind != "float32":
        described["number_type"] = kind
    _write(path, tensors, described)


def _described(correction: NoiseCorrection) -> list[int | bool]:
    """The arguments of ``NoiseCorrection``; that it predicts the noise goes without saying."""
    return [*correction.biases.shape, *(() if correction.predicts is None else (False,))]


def _write(path: Path, tensors: dict[str, Tensor], described: dict[str, str]) -> None:
    """Write the file with the hashes of its tensors and of its description, in one step."""
    described = described | {"tensors_sha256": _tensors_hash(tensors)}
    described["description_sha256"] = _description_hash(described)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(serialize(tensors, described))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _description_hash(described: Mapping[str, str]) -> str:
    """SHA-256 of the description without its own hash."""
    items = {key: value for key, value in described.items() if key != "description_sha256"}
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()


def read_metadata(path: str | Path) -> dict[str, object]:
    """What ``save_quantized`` was given as metadata.

    Raises FileNotFoundError and ValueError as ``load_quantized``; the tensors are not looked at.
    """
    return json.loads(_description(Path(path))["metadata"])


def load_quantized(path: str | Path) -> Network:
    """Rebuild the quantised network of a checkpoint, in the number type that it had; needs nothing but the file.

    Warns if the network carries a noise correction (PTQD): stock pipelines apply it only with a
    ``corrected_scheduler``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not a quantised checkpoint or one of another format, or its tensors do not match its
            description exactly.
    """
    path = Path(path)
    described = _description(path)
    stored = _stored(path, described)
    if described.get("unet_class") not in NETWORKS:
        raise ValueError(f"{path} holds a {described.get('unet_class')}; known are {', '.join(NETWORKS)}")
    config = {key: value for key, value in json.loads(described["unet_config"]).items() if not key.startswith("_")}
    heads = config.pop("attention_heads", None)
    kind = described.get("number_type", "float32")
    if kind not in TYPES:
        raise ValueError(f"{path} is of type {kind}; this version reads {', '.join(TYPES)}")
    network = cast(NETWORKS[described["unet_class"]](**config).eval().requires_grad_(False), TYPES[kind])
    if heads is not None:
        set_attention_heads(network, heads)
    plan = json.loads(described["plan"])
    layers = {name: LayerPlan(**{**layer, "splits": tuple(layer["splits"])}) for name, layer in plan["layers"].items()}
    attentions = {name: AttentionPlan(**attention) for name, attention in plan["attentions"].items()}
    backbone = backbone_of(network)
    insert_quantizers(network, QuantizationPlan(layers, attentions, plan["reasons"]))
    network.step_tracker.steps = exact_steps(json.loads(described["steps"]))
    cache = {name: CachePlan(**table) for name, table in json.loads(described["cache"]).items()}
    insert_cache(network, cache, backbone)
    for name in json.loads(described["step_bits"]):
        network.get_submodule(name).step_bits = torch.empty(len(network.step_tracker.steps), dtype=torch.uint8)
    correction = json.loads(described["correction"])
    if correction is not None:
        attach_correction(network, NoiseCorrection(*correction))
        # A schedule with fractional steps has them as float32.
        network.noise_correction.timesteps = torch.empty_like(stored["noise_correction.timesteps"])
    _restore(network, stored, path)
    return network


def _description(path: Path) -> dict[str, str]:
    if not path.exists():
        raise FileNotFoundError(f"there is no quantised checkpoint {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the file that save_quantized wrote")
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a quantised checkpoint ({error}), or {DAMAGED}") from None
    found = described.get("format", "")
    if found != FORMAT and found.startswith(FAMILY):
        raise ValueError(f"{path} is of format {found}, and this version reads {FORMAT}: quantise again")
    if found != FORMAT:
        raise ValueError(f"{path} is not a quantised checkpoint: {FORMAT} is not in its description")
    if described.get("description_sha256") != _description_hash(described):
        raise ValueError(f"{path} is {DAMAGED} (the description is not what its hash says)")
    return described


def _stored(path: Path, described: dict[str, str]) -> dict[str, Tensor]:
    """The file's tensors. Raises ValueError if they are not those of the description's hash."""
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is {DAMAGED} ({error})") from None
    if described.get("tensors_sha256") != _tensors_hash(stored):
        raise ValueError(f"{path} is {DAMAGED} (the tensors are not what their hash says)")
    return stored


def _plan(network: Network) -> QuantizationPlan:
    # A layer inside a table of temporal features was inserted at the table's path.
    original = {f"{path}.layer": path for path in cached_projections(network)}
    layers = {}
    for path, layer in quantized_layers(network).items():
        layers[original.get(path, path)] = LayerPlan(
            layer.weight_bits, layer.activation_bits, layer.splits, layer.symmetric, layer.dynamic, layer.rank
        )
    attentions = {
        path.removesuffix(".processor"): AttentionPlan(
            processor.query.bits, processor.probabilities.bits, processor.symmetric, processor.dynamic
        )
        for path, processor in network.named_modules()
        if isinstance(processor, QuantizedAttention)
    }
    return QuantizationPlan(layers, attentions, network.full_precision_reasons)


def _tensors(network: Network) -> dict[str, Tensor]:
    """All tensors of the network, a quantised weight as its packed codes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    for path, layer in quantized_layers(network).items():
        del tensors[f"{path}.weight"]
        tensors[f"{path}.codes"] = pack(tensors[f"{path}.codes"], layer.weight_bits)
    return tensors


def _checked_tensors(network: Network) -> dict[str, Tensor]:
    """The tensors of a network. Raises ValueError if any layer or activation is not quantised yet, or holds NaN."""
    check_quantized(network)
    unfinished = [path for path, layer in quantized_layers(network).items() if layer.codes is None]
    unfinished += [path for path, quantizer in activation_quantizers(network).items() if not quantizer.enabled]
    if unfinished:
        raise ValueError(
            f"the network is half quantised, {unfinished[0]} is not: start again from the full-precision one"
        )
    tensors = _tensors(network)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity: quantise again from a checkpoint that is not damaged")
    return tensors


def _restore(network: Network, stored: dict[str, Tensor], path: Path) -> None:
    layers = quantized_layers(network)
    quantizers = activation_quantizers(network)
    weights = {f"{name}.weight" for name in layers}
    expected = (set(network.state_dict()) - weights) | {f"{name}.codes" for name in layers}
    if set(stored) != expected:
        missing, unexpected = sorted(expected - set(stored)), sorted(set(stored) - expected)
        raise ValueError(f"{path} does not match its description: missing {missing[:3]}, unexpected {unexpected[:3]}")
    codes = {name: stored.pop(f"{name}.codes") for name in layers}
    for name, quantizer in quantizers.items():
        quantizer.scale = torch.empty_like(stored[f"{name}.scale"])
        quantizer.zero_point = torch.empty_like(stored[f"{name}.zero_point"])
        quantizer.enabled = True
    try:
        network.load_state_dict(stored, strict=False)
        for name, layer in layers.items():
            _load_codes(layer, codes[name])
    except RuntimeError as error:
        raise ValueError(f"{path} does not match its description: {error}") from None


def _load_codes(layer: QuantizedLayer, packed: Tensor) -> None:
    layer.load_codes(unpack(packed, layer.weight_bits, layer.weight.shape))
