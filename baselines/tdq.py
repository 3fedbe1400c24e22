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

from baselines import Method, _tdq

METHOD = Method("TDQ", "arXiv 2306.02316", _tdq.Config, _tdq.objection, _tdq.PUBLISHED)
