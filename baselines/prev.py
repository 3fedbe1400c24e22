"""The base without temporal treatment: AdaRound within BRECQ, one activation range for all steps.

What TFMQ-DM's ablation calls "Prev". Time-embedding layers are reconstructed one by one, each projection with its
residual block, activations get running ranges; no splits, no learned step sizes. What TFMQ-DM adds to it are the rows
`tiar` (its reconstruction) and `fsc` (its calibration).
"""

from __future__ import annotations

from baselines import Method, _brecq, applies_always

METHOD = Method('Block-wise base ("Prev")', "arXiv 2102.05426", _brecq.Config, applies_always)
