"""PTQ4DM (Shang et al., CVPR 2023, arXiv 2211.15736).

Calibrates on rows of the denoising trajectory whose time steps are normally distributed, skewed towards the clean
end. Ranges are symmetric around 0 and searched for the smallest error among 100 thresholds: of weights for each
output channel, of activations as a running average over batches, with weights and earlier activations already
quantised. Nothing is learned. The paper and its code are about 8 bits.

Where the released code and the paper differ, and what is done here:

- Time steps: the paper draws t ~ N(mu, T/2), mu <= T/2, and its text calls the deviation sqrt(T/2), which is the
  reading here, in steps of the sampler; it gives no mu, and the code's 0.4 T is taken. The code draws with a
  deviation of 0.4 T, which puts 16 % of all rows on the cleanest and 7 % on the noisiest step.
- The code pairs latents with the wrong time steps; that is the row `ptq4dm_mispaired`.
- The code calibrates class-conditional models on one class; here each row has its image's own condition, and under
  guidance is there with the unconditional one too.
- The code quantises the outputs of layers, so that inputs of convolutions, after norm and activation function, stay
  in full precision; here inputs are quantised, the same for every method.
- The code leaves attention in full precision, since its layers are of a kind that it does not replace (protocol
  `published`); the range search decides the zero point of a symmetric range by a rounding error, here by the error of
  the result.
- AdaRound is in the code, but its script does not switch it on.
"""

from __future__ import annotations

from dataclasses import replace

from baselines import Method, _ptq4dm, needs_8_bit_activations
from tfmq.plan import Protocol

PUBLISHED = Protocol("published", {"boundary": 8, "attention_layers": 32, "attention_products": 32})
METHOD = Method(
    "PTQ4DM", "arXiv 2211.15736", _ptq4dm.Config, needs_8_bit_activations, PUBLISHED, replace(PUBLISHED, name="as_run")
)
