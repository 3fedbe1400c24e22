"""The FID Inception network (torch-fidelity's port of the TensorFlow graph of 2015-12-05): the only one that gives FID.

Images are resized as that graph does (bilinear, without antialiasing). The weights file is torch-fidelity's release
`weights-inception-2015-12-05-6726825d.pth`, or the same tensors as safetensors.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.features import Extractor, Features

# sFID (Nash et al., 2021; as computed by guided-diffusion's evaluator) takes the first 7 channels of `mixed_6/conv:0`,
# flattened with channels last: 17 x 17 x 7 = 2,023 numbers. Here that layer is Mixed_6d.branch1x1 after its ReLU.
SPATIAL_CHANNELS = 7


class Inception(nn.Module):
    """Maps uint8 images [B, 3, H, W] to `Features` (2,048, 2,023 and 1,008 wide) and four feature maps.

    The logits are those without bias, which the inception score uses. ``prepare`` takes the place of the network's own
    resize: it maps uint8 images to float32 images [B, 3, 299, 299] of values from 0 to 255.
    """

    def __init__(self, network: FeatureExtractorInceptionV3, prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        self.prepare = prepare

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
        if self.prepare is not None:
            pixels = (self.prepare(images) - 128) / 128
            handles.append(self.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, resized: (pixels,)))
        try:
            pooled, logits = self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        *maps, spatial = (outputs[layer] for layer in layers)
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled=pooled, spatial=spatial, logits=logits), tuple(maps)


def load_network(path: Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network with the weights of a `.pth` or `.safetensors` file.

    Raises ValueError if the file is damaged or its tensors do not match by name and shape.
    """
    # torch-fidelity unpickles whatever file it is given, so it is given one made here of the tensors alone.
    file = io.BytesIO()
    try:
        torch.save(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True), file)
        file.seek(0)
        return FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
        )
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold the weights of the FID Inception network: {reason}") from error


def load(path: Path) -> Inception:
    """The evaluator with the weights of a `.pth` or `.safetensors` file; errors as `load_network` raises."""
    return Inception(load_network(path))


# At 1.9 MB an image, the maps of 50,000 images would take 90 GB.
EXTRACTOR = Extractor(
    name="inception",
    version=1,
    resolution=299,
    batch=64,
    distance_label="FID",
    weights="inception",
    keeps_maps=False,
    load=load,
)
