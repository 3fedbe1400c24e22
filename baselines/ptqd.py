"""PTQD (He et al., NeurIPS 2023, arXiv 2305.10657).

Quantises block by block (AdaRound within BRECQ, learned activation step sizes), then corrects the prediction in the
sampler: at each time step the part of the error that is proportional to the full-precision prediction is divided out,
the mean error of each channel is subtracted, and the variance of what remains is taken from the noise that the step
adds. The statistics are measured on full-precision trajectories, after guidance, for one schedule; where sampling is
deterministic there is no noise to take from. Sampling needs no more evaluations of the network.

Where the released code and the paper differ, and what is done here:

- Bias: the paper takes the mean of the residual, the code that of the raw error; the code is followed, since its
  sampler subtracts it before dividing. Residual deviations are one number a step in the code, one a channel in the
  paper.
- The reduced variance also enters the direction term of the DDIM step in the code, and here.
- A step without statistics passes uncorrected in the code; here it is an error.
- The code's weight ranges are one a tensor; here one an output channel, the same for every method.
- Its activation zero points are not stored but drawn anew at each load; here they are part of the checkpoint.
- It leaves shortcuts, downsampling and attention products in full precision (protocol `published`).
- Its calibration rows are 1,024 drawn at random over steps and images; here they are spaced uniformly over steps.
- Step-aware mixed precision, which is in the paper and not in the code, is the row `ptqd_mixed`.
"""

from __future__ import annotations

from baselines import Method, _ptqd, needs_8_bit_activations

METHOD = Method("PTQD", "arXiv 2305.10657", _ptqd.Config, needs_8_bit_activations, _ptqd.PUBLISHED, _ptqd.AS_RUN)
