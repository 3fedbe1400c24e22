"""TDQ, quantisation-aware training (So et al., NeurIPS 2023, arXiv 2306.02316), without training data.

All weights, their step sizes (LSQ: one for each output channel, signed codes) and the networks that predict the step
sizes of activations are trained jointly on the diffusion loss, the squared error of the predicted noise, with AdamW.
The data are the full-precision samples of the calibration pool, noised anew at steps drawn uniformly from those of the
schedule: the model's own images, drawn with guidance where it is used; the paper takes its training set. At the end
weights are folded into codes and the networks' outputs tabulated, as in `tdq`. Biases and norms are trained too and
stay in full precision. One training row counts as one evaluation of the network, though its backward pass costs two
more.
The loss is about samples, not about full precision: the network may leave the full-precision one's predictions while
its loss falls below it.

Where the released code and the paper differ, what they leave open, and what is done here:

- The released code trains at all 1,000 steps for 200,000 iterations; here at the steps that are sampled. Learning
  rates, groups and weight decay are as released; its squared error for CIFAR-10 is taken (absolute for churches).
- It starts from the averaged (EMA) weights of the checkpoint; a checkpoint here has one set, and none is averaged.
- Networks start at the static step size, as released, if ``fit_iterations`` is 0; a short training has to start
  where `tdq` ends, with networks fitted to the local quantisation error.
- The learning rate falls to 0 along a cosine after the warm-up, where the released one stays; dropout is left out.
- The weights' step sizes start where the error of the weight is smallest, the released ones at a statistic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from baselines import Method, _tdq
from tfmq.passes import Recipe
from tfmq.passes.training import QuantizationAwareTraining, TrainingConfig


@dataclass(frozen=True)
class Config(_tdq.Config):
    """Settings; those of the training are the released ones for LSUN Churches.

    Attributes:
        iterations, batch: of the training.
        learning_rate: of weights, biases and norms; a tenth of it for the weights' step sizes.
        network_learning_rate: of the networks.
        warmup: share of the iterations over which the learning rates rise.
    """

    fit_iterations: int = 0
    iterations: int = 200_000
    batch: int = 32
    learning_rate: float = 5e-5
    network_learning_rate: float = 5e-5
    warmup: float = 0.025

    def recipe(self) -> Recipe:
        """See `Settings`."""
        training = TrainingConfig(
            iterations=self.iterations,
            batch=self.batch,
            learning_rate=self.learning_rate,
            network_learning_rate=self.network_learning_rate,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
        )
        return (QuantizationAwareTraining(training, self.step_sizes()),)


AS_RUN = replace(_tdq.PUBLISHED, name="as_run")
METHOD = Method("TDQ (training)", "arXiv 2306.02316", Config, _tdq.objection, _tdq.PUBLISHED, AS_RUN)
