"""The FID Inception network (torch-fidelity's port of the TensorFlow graph of 2015-12-05): the only one that gives FID.

The weights file is torch-fidelity's release `weights-inception-2015-12-05-6726825d.pth`, or the same tensors as
safetensors.
"""

import io
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.features import Extractor, Features

# sFID (Nash et al., 2021; as computed by guided-diffusion's evaluator) takes the first 7 channels of `mixed_6/conv:0`,
# flattened with channels last: 17 x 17 x 7 = 2,023 numbers. Here that layer is Mixed_6d.branch1x1 after its ReLU.
SPATIAL_CHANNELS = 7


class Inception(nn.Module):
    """Maps uint8 images [B, 3, H, W] to `Features` (2,048, 2,023 and 1,008 wide) and four feature maps.

    The logits are those without bias, which the inception score uses.
    """

    def __init__(self, network: FeatureExtractorInceptionV3) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Features, tuple[Tensor, ...]]:
        layers = (
            self.network.MaxPool_1,
            self.network.MaxPool_2,
            self.network.Mixed_6e,
            self.network.Mixed_7c,
            self.network.Mixed_6d.branch1x1,
        )
        outputs: dict[nn.Module, Tensor] = {}
        handles = [
            layer.register_forward_hook(lambda layer, _, output: outputs.__setitem__(layer, output)) for layer in layers
        ]
        try:
            pooled, logits = self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        *maps, spatial = (outputs[layer] for layer in layers)
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled=pooled, spatial=spatial, logits=logits), tuple(maps)


def load(path: Path) -> Inception:
    """The network with the weights of a `.pth` or `.safetensors` file, whose tensors must match by name and shape."""
    weights = load_file(path) if Path(path).suffix == ".safetensors" else torch.load(path, weights_only=True)
    # torch-fidelity unpickles whatever file it is given, so it is given one made here of the tensors alone.
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
        )
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of the FID Inception network: {error}") from error
    return Inception(network)


EXTRACTOR = Extractor(name="inception", version=1, resolution=299, batch=64, distance_label="FID", load=load)
