"""Quantised networks in diffusers' own folders: ``save_pretrained`` and ``from_pretrained`` of networks and pipelines.

``save_pretrained`` of a quantised network writes its packed codes, scales and tables as safetensors, and into
``config.json`` a ``quantization_config`` of the method ``tfmq``. To load such a folder, import this module, which makes
the method known to diffusers, and call ``from_pretrained`` of the network or of the pipeline; it needs accelerate.
Without this import diffusers refuses the folder: *Unknown quantization type, got tfmq*.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from importlib.util import find_spec
from typing import Any, NoReturn

import diffusers
import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor

from tfmq.modules.cache import CachePlan, cached_projections, insert_cache
from tfmq.network.attention_heads import restore_attention_heads
from tfmq.network.backbone import Network, backbone_of
from tfmq.network.number_types import number_type
from tfmq.numerics.steps import exact_steps
from tfmq.packing import checked_tensors, restore, tensors_hash
from tfmq.passes.correction import NoiseCorrection, attach_correction, correction_of
from tfmq.plan import AttentionPlan, LayerPlan, QuantizationPlan, activation_quantizers, insert_quantizers
from tfmq.state import plan_of

FORMAT = "tfmq-quantized-3"
# Of the plan of a layer or an attention, what few have.
OPTIONAL = ("channel_scales", "adaptive")
# What `describe` finds.
PARTS = ("plan", "steps", "cache", "step_bits", "correction")


class Method(StrEnum):
    """What diffusers calls this library's quantisation."""

    TFMQ = "tfmq"


def stored_form(network: Network) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `describe` finds of a quantised network, and its tensors as files hold them.

    Raises ValueError for a network that could not be loaded as it is: half quantised, changed since, with NaN, or in
    more than one number type.
    """
    number_type(network)
    tensors, described = checked_tensors(network), describe(network)
    with torch.device("meta"):
        twin = type(network).from_config(json.loads(plain_config(network)))
        restore_attention_heads(twin)
        rebuild(twin, described)
    expected, found = [{name: part.shape for name, part in each.named_parameters()} for each in (twin, network)]
    for name in sorted(expected.keys() ^ found.keys()):
        problem = "is missing" if name in expected else "is no part of it"
        raise ValueError(f"the network is not of the structure of its config, {name} {problem}: undo the later change")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{name} is of shape {tuple(found[name])}, and the network's config makes it {tuple(shape)}: undo the "
                "later change"
            )
    return described, tensors


def plain_config(network: Network) -> str:
    """The config of ``network`` as diffusers writes it, without how it is quantised."""
    left_out = ("quantization_config", "_ignore_files", "_use_default_values", "_pre_quantization_dtype")
    config = {name: value for name, value in network.config.items() if name not in left_out}
    config |= {"_class_name": type(network).__name__, "_diffusers_version": diffusers.__version__}
    return json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"


def describe(network: Network) -> dict[str, Any]:
    """How a quantised network differs from one of its config, as JSON can hold it; `rebuild` reads it."""
    correction = correction_of(network)
    return {
        "plan": _stored_plan(plan_of(network)),
        "steps": network.step_tracker.steps.tolist(),
        "cache": {name: asdict(table.plan) for name, table in cached_projections(network).items()},
        "step_bits": [n for n, part in activation_quantizers(network).items() if part.step_bits is not None],
        "correction": None if correction is None else correction.arguments,
    }


def _stored_plan(plan: QuantizationPlan) -> dict[str, Any]:
    """A plan as JSON can hold it, without `OPTIONAL` parts that are off: files from before these are the same."""
    found = asdict(plan)
    for each in (*found["layers"].values(), *found["attentions"].values()):
        for name in OPTIONAL:
            if not each.get(name, True):
                del each[name]
    return found


def rebuild(network: Network, described: Mapping[str, Any]) -> None:
    """Give ``network``, just made from its config, the structure that `describe` found, in place, without tensors."""
    plan = described["plan"]
    layers = {name: LayerPlan(**{**layer, "splits": tuple(layer["splits"])}) for name, layer in plan["layers"].items()}
    attentions = {name: AttentionPlan(**attention) for name, attention in plan["attentions"].items()}
    backbone = backbone_of(network)
    insert_quantizers(network, QuantizationPlan(layers, attentions, plan["reasons"]))
    network.step_tracker.steps = exact_steps(described["steps"])
    insert_cache(network, {name: CachePlan(**table) for name, table in described["cache"].items()}, backbone)
    for name in described["step_bits"]:
        network.get_submodule(name).step_bits = torch.empty(len(network.step_tracker.steps), dtype=torch.uint8)
    if described["correction"] is not None:
        network.noise_correction = NoiseCorrection(*described["correction"])


class Config(QuantizationConfigMixin):
    """The ``quantization_config`` of a network: read off the network as it is, or out of a folder.

    Attributes:
        network: that it describes; None while one is loaded.
        stored: what the folder says.
    """

    quant_method = Method.TFMQ

    def __init__(self, network: Network | None = None, stored: Mapping[str, Any] | None = None) -> None:
        self.network = network
        self.stored = dict(stored or {})

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, object], return_unused_kwargs: bool = False, **kwargs: object
    ) -> Config | tuple[Config, dict]:
        """See diffusers. Raises ValueError for a description of another format."""
        if config_dict.get("format") != FORMAT:
            raise ValueError(f"the folder is of format {config_dict.get('format')}, and this version reads {FORMAT}")
        config = cls(stored=config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, object]:
        """See diffusers. Raises ValueError for a network that can not be stored as it is."""
        if self.network is None:
            return dict(self.stored)
        described, tensors = stored_form(self.network)
        return {
            "quant_method": Method.TFMQ.value,
            "format": FORMAT,
            **described,
            "tensors_sha256": tensors_hash(tensors),
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({Method.TFMQ.value})"


class Quantizer(DiffusersQuantizer):
    """What diffusers calls while it saves or loads a quantised network.

    Loading takes all of the folder's tensors and then fills the network at once, with the hash checked.
    """

    quantization_config: Config
    requires_calibration = True

    def __init__(self, quantization_config: Config, **kwargs: object) -> None:
        super().__init__(quantization_config, **kwargs)
        self._expected: set[str] = set()
        self._stored: dict[str, Tensor] = {}
        self._loading: Network | None = None
        self._dtype = torch.float32

    @property
    def is_serializable(self) -> bool:
        """Whether it can be saved. Raises ValueError, before a folder is made, for a network that can not."""
        if self.quantization_config.network is not None:
            stored_form(self.quantization_config.network)
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        if find_spec("accelerate") is None:
            raise ImportError("from_pretrained loads quantised networks with accelerate: pip install accelerate")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self._dtype = torch_dtype or torch.float32
        return torch_dtype

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        assert self.quantization_config.network is not None
        return checked_tensors(self.quantization_config.network), {}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._expected = set(loaded_keys)
        return []

    def update_missing_keys(self, model: Network, missing_keys: list[str], prefix: str) -> list[str]:
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the tensors of a file, and fill the network with those of the last one; none is left for diffusers."""
        self._stored |= state_dict
        if self._expected <= set(self._stored):
            self._fill()
        return {}

    def _process_model_before_weight_loading(self, model: Network, **kwargs: object) -> None:
        model.is_quantized = False  # diffusers would refuse to cast it
        restore_attention_heads(model)
        rebuild(model, self.quantization_config.stored)
        self._loading = model

    def _process_model_after_weight_loading(self, model: Network, **kwargs: object) -> None:
        model.eval().requires_grad_(False)

    def _fill(self) -> None:
        network, stored, config = self._loading, self._stored, self.quantization_config
        assert network is not None
        self._loading, self._stored, self._expected = None, {}, set()
        if config.stored["tensors_sha256"] != tensors_hash(stored):
            raise ValueError(
                "the folder is damaged, its tensors are not what the hash in config.json says: fetch or save it again"
            )
        restore(network, stored, "the folder", assign=True)
        if any(parameter.dtype != self._dtype for parameter in network.parameters()):
            network.to(self._dtype)
        correction = correction_of(network)
        if correction is not None:
            attach_correction(network, correction)
        config.network, config.stored = network, {}
        network.register_to_config(quantization_config=config)

    def _dequantize(self, model: Network) -> NoReturn:
        raise ValueError("the weights before quantising are not kept: load the full-precision checkpoint")


def attach(network: Network) -> None:
    """Let ``network``, which is quantised, be saved by ``save_pretrained``, and its pipeline too."""
    config = Config(network)
    network.hf_quantizer = Quantizer(config)
    network.register_to_config(quantization_config=config)


auto.AUTO_QUANTIZER_MAPPING[Method.TFMQ.value] = Quantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.TFMQ.value] = Config
