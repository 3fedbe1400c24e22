"""TDQ, post-training: temporal dynamic quantisation of activations (So et al., NeurIPS 2023, arXiv 2306.02316).

A small network for each activation quantiser predicts its step size from the encoding of the time step. All networks
learn at once, each to minimise the squared quantisation error of its own tensor on calibration rows whose time steps
are drawn as PTQ4DM draws them. At the end each network is evaluated at the steps of the schedule and dropped: sampling
looks the step sizes up. Outputs of SiLU have a fixed lower end of -0.2785 and unsigned codes.

What the sources leave open, and what is done here:

- The released code holds quantisation-aware training only. Of post-training the paper says that the networks minimise
  the local quantisation error on PTQ4DM's calibration set; the number of iterations and the learning rate are ours.
- Time steps are drawn with the deviation of PTQ4DM's released code, since its paper's leaves the noisiest steps out,
  which the networks have to learn too.
- Weights are not said to be reconstructed: each is rounded to nearest, in ranges searched per output channel.
- Networks are as released but without dropout, which would blur what is tabulated, and start exactly at the static step
  size: the last layer's weight is 0, hidden layers start as the paper says (He et al.).
- Whether temporal features are quantised is left to the protocol: the authors leave the time embedding and its
  projections out, with the first and the last layer.
"""

from __future__ import annotations

import torch

from baselines import Method, _tdq
from tfmq.network.calibration import CalibrationSet
from tfmq.network.unet import UNet
from tfmq.passes.step_network import tabulate
from tfmq.plan import Protocol, activation_quantizers, coverage, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import QuantizationReport


def quantize(
    unet: UNet,
    pool: CalibrationSet,
    precision: Precision,
    config: _tdq.Config,
    generator: torch.Generator,
    protocol: Protocol,
) -> QuantizationReport:
    """Quantise ``unet`` in place."""
    report = QuantizationReport()
    _tdq.prepare(unet, pool, precision, protocol)
    with report.timed("weights"):
        for layer in quantized_layers(unet).values():
            layer.find_weight_range("search")
            layer.fold()
    with report.timed("activations"):
        networks = _tdq.fitted_networks(unet, pool, config, generator, report)
        tabulate(networks, activation_quantizers(unet), unet.time_proj(unet.step_tracker.steps.to(unet.device)))
    report.coverage = coverage(unet)
    return report


METHOD = Method("TDQ", "arXiv 2306.02316", _tdq.Config, quantize, _tdq.objection, _tdq.PUBLISHED)
