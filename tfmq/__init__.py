"""Post-training quantisation of diffusers UNets.

Collect a calibration pool with ``collect_calibration``, quantise a UNet in place with ``quantize_``, keep it with
``save_quantized`` and bring it back with ``load_quantized``. A quantised UNet runs in the stock diffusers pipelines;
one that carries a noise correction (PTQD) needs a ``corrected_scheduler`` there.
"""

from importlib import import_module

# Where each name is defined. A module is imported when a name of it is first used: most need diffusers, which takes
# seconds, and who asks for a Precision alone need not wait.
_HOMES = {
    "CalibrationRows": "network.calibration",
    "CalibrationSet": "network.calibration",
    "Conditioning": "network.sampling",
    "LowRankConfig": "passes.low_rank",
    "Precision": "precision",
    "QuantizationConfig": "quantization",
    "QuantizationReport": "quantization",
    "RoundingConfig": "passes.reconstruction",
    "SamplingSettings": "network.sampling",
    "StepSizeConfig": "passes.reconstruction",
    "collect_calibration": "network.calibration",
    "corrected_scheduler": "passes.correction",
    "correction_of": "passes.correction",
    "coverage": "plan",
    "journaled": "journal",
    "load_quantized": "checkpoint",
    "planned_memory": "memory",
    "quantize_": "quantization",
    "read_metadata": "checkpoint",
    "restore_attention_heads": "network.unet",
    "sample": "network.sampling",
    "save_quantized": "checkpoint",
    "set_attention_heads": "network.unet",
    "waiting_in": "network.offload",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
