"""Quantised checkpoints that describe themselves: packed integer weights, scales and the whole setting in one file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from tfmq.network.attention_heads import set_attention_heads
from tfmq.network.backbone import Network
from tfmq.network.number_types import TYPES, cast, number_type
from tfmq.packing import restore, tensors_hash
from tfmq.passes.correction import attach_correction, correction_of
from tfmq.pretrained import FORMAT, PARTS, attach, plain_config, rebuild, stored_form

FAMILY = FORMAT.rpartition("-")[0]
DAMAGED = "damaged or truncated: delete it and quantise again"
NETWORKS = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)}


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
    form, tensors = stored_form(network)
    described = {
        "format": FORMAT,
        "unet_class": type(network).__name__,
        "unet_config": plain_config(network),
        **{part: json.dumps(value) for part, value in form.items()},
        "metadata": json.dumps(metadata),
    }
    kind = str(number_type(network)).removeprefix("torch.")
    if kind != "float32":
        described["number_type"] = kind
    _write(path, tensors, described)


def _write(path: Path, tensors: dict[str, Tensor], described: dict[str, str]) -> None:
    """Write the file with the hashes of its tensors and of its description, in one step."""
    described = described | {"tensors_sha256": tensors_hash(tensors)}
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
    rebuild(network, {part: json.loads(described[part]) for part in PARTS})
    restore(network, stored, str(path))
    correction = correction_of(network)
    if correction is not None:
        attach_correction(network, correction)
    attach(network)
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
    if described.get("tensors_sha256") != tensors_hash(stored):
        raise ValueError(f"{path} is {DAMAGED} (the tensors are not what their hash says)")
    return stored
