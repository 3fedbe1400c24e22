"""Post-training quantisation of diffusers UNets.

Collect a calibration pool with ``collect_calibration``, quantise a UNet in place with ``quantize_``, keep it with
``save_quantized`` and bring it back with ``load_quantized``. A quantised UNet runs in the stock diffusers pipelines.
"""

from tfmq.calibration import CalibrationRows, CalibrationSet, collect_calibration
from tfmq.checkpoint import load_quantized, read_metadata, save_quantized
from tfmq.low_rank import LowRankConfig
from tfmq.plan import coverage
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, QuantizationReport, quantize_
from tfmq.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.sampling import Conditioning, SamplingSettings, sample

__all__ = [
    "CalibrationRows",
    "CalibrationSet",
    "Conditioning",
    "LowRankConfig",
    "Precision",
    "QuantizationConfig",
    "QuantizationReport",
    "RoundingConfig",
    "SamplingSettings",
    "StepSizeConfig",
    "collect_calibration",
    "coverage",
    "load_quantized",
    "quantize_",
    "read_metadata",
    "sample",
    "save_quantized",
]
