"""Random weights of the FID Inception network."""

import io
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class Untrained(FeatureExtractorInceptionV3):
    """torch-fidelity's network as it is before it reads its weights."""

    def load_state_dict(self, state_dict):
        pass


def write_weights(path: Path) -> None:
    """Write a file of the published one's tensors, but random."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Untrained("untrained", ["2048"], feature_extractor_weights_path=empty)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                # Keeps the signal's size through the ReLUs, as trained weights do.
                torch.nn.init.kaiming_normal_(module.weight)
        torch.nn.init.normal_(network.fc.weight)
    torch.save(network.state_dict(), path)
