"""Post-training quantisation of the networks of diffusers: UNets and diffusion transformers.

Collect a calibration pool with ``collect_calibration``, quantise a network in place with ``quantize_``, keep it with
``save_quantized`` and bring it back with ``load_quantized``. A quantised network runs in the stock diffusers pipelines;
one that carries a noise correction (PTQD) needs a ``corrected_scheduler`` there.
"""

from importlib import import_module

# Where each name is defined. A module is imported when a name of it is first used: most need diffusers, which takes
# seconds, and who asks for a Precision alone need not wait.
_HOMES = {
    "ActivationRanges": "passes.activation_ranges",
    "AdaptiveProbabilities": "passes.adaptive_probabilities",
    "Backbone": "network.backbone",
    "BlockFormats": "passes.block_formats",
    "BlockReconstruction": "passes.block_reconstruction",
    "CalibrationRows": "network.rows",
    "CalibrationSet": "network.calibration",
    "Conditioning": "network.conditioning",
    "Control": "network.conditioning",
    "Cost": "passes",
    "Deployable": "passes.deployable",
    "ExportedNetwork": "export.runner",
    "FiniteSetCalibration": "passes.finite_set",
    "FitConfig": "passes.step_network",
    "FolderWorkspace": "workspace",
    "FreezeTemporal": "passes.temporal_reconstruction",
    "FreshNoise": "network.fresh_noise",
    "Grids": "passes.grids",
    "InputShape": "export.description",
    "Kernel": "export.kernels",
    "LeaveOut": "passes.leave_out",
    "LowRankBranches": "passes.low_rank",
    "MeasureCorrection": "passes.correction",
    "MeasureSparsity": "passes.sparsity",
    "Memory": "passes",
    "NoiseDistillation": "passes.noise_distillation",
    "NormallyDistributed": "network.calibration",
    "Pass": "passes",
    "Precision": "precision",
    "PredictedStepSizes": "passes.predicted_step_sizes",
    "Protocol": "plan",
    "QuantizationAwareTraining": "passes.training",
    "QuantizationReport": "session",
    "RangeMargin": "passes.range_margin",
    "Recalibration": "passes.recalibration",
    "Rectification": "passes.rectification",
    "RoundToNearest": "passes.weight_ranges",
    "RoundingConfig": "passes.reconstruction",
    "SamplingSettings": "network.sampling",
    "ScaleChannels": "passes.channel_scales",
    "SecondOrderRounding": "passes.second_order_rounding",
    "SignedRounding": "passes.signed_rounding",
    "SignedRoundingConfig": "passes.signed_rounding",
    "Spaced": "network.calibration",
    "SpeedBits": "passes.speed_bits",
    "StepSizeConfig": "passes.reconstruction",
    "StepSizes": "passes.step_sizes",
    "TemporalCache": "passes.temporal_cache",
    "TemporalReconstruction": "passes.temporal_reconstruction",
    "TrainingConfig": "passes.training",
    "WeightRanges": "passes.weight_ranges",
    "Workspace": "workspace",
    "backbone_of": "network.backbone",
    "collect_calibration": "network.calibration",
    "corrected_scheduler": "passes.correction",
    "correction_of": "passes.correction",
    "coverage": "state",
    "deployable": "passes.deployable",
    "executed_coverage": "execution",
    "executing": "execution",
    "export_onnx": "export.onnx",
    "export_openvino": "export.openvino",
    "load_quantized": "checkpoint",
    "plan_cost": "cost",
    "quantize_": "quantization",
    "quantize_roughly_": "export.roughly",
    "read_metadata": "checkpoint",
    "recommended_recipe": "recommended",
    "restore_attention_heads": "network.attention_heads",
    "restore_weights": "state",
    "sample": "network.sampling",
    "save_quantized": "checkpoint",
    "set_attention_heads": "network.attention_heads",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
