"""What every model family keeps to, whichever it is."""

from __future__ import annotations

import pytest
import torch

from benchmarks import discover
from tfmq.sampling import SamplingSettings, sample
from tfmq.unet import UNetLayout

FAMILIES = discover.names(discover.FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_checkpoint_loads_samples_and_decodes(name, tmp_path):
    family = discover.family(name)
    family.save_tiny(tmp_path, 0)
    model = family.load(tmp_path, torch.device("cpu"))
    assert UNetLayout.of(model.unet).time_projections
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    conditioning = None if model.conditioning is None else model.conditioning(range(2))
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    images = model.decode(sample(model.unet, model.scheduler, noise, SamplingSettings(2), conditioning=conditioning))
    assert images.dtype == torch.uint8 and images.shape[:2] == (2, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_without_a_checkpoint_says_what_to_run(name, tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in .* run `dvc pull data.dvc`"):
        discover.family(name).load(tmp_path, torch.device("cpu"))
