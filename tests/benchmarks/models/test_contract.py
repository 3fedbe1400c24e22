"""What every model family keeps to, whichever it is."""

from __future__ import annotations

import pytest
import torch

from benchmarks.suite import discover
from tfmq.network.backbone import backbone_of
from tfmq.network.sampling import SamplingSettings, sample

FAMILIES = discover.names(discover.FAMILIES)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_checkpoint_loads_samples_and_decodes(name, tmp_path):
    family = discover.family(name)
    family.save_tiny(tmp_path, 0)
    model = family.load(tmp_path, CPU)
    assert backbone_of(model.unet).time_projections
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    assert {parameter.dtype for parameter in model.unet.parameters()} == {torch.float32}
    conditioning = None if model.conditioning is None else model.conditioning(["circle", "square"])
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings(2, guidance_scale=1.0 if conditioning is None else 3.0)
    images = model.decode(sample(model.unet, model.scheduler, noise, settings, conditioning=conditioning))
    assert images.dtype == torch.uint8 and images.shape[:2] == (2, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_checkpoint_is_that_of_its_seed(name, tmp_path):
    weights = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        discover.family(name).save_tiny(tmp_path / folder, seed)
        network = discover.family(name).network
        weights.append((tmp_path / folder / network / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_image_of_a_conditional_model_has_the_context_of_its_prompt(name, tmp_path):
    family = discover.family(name)
    family.save_tiny(tmp_path, 0)
    model = family.load(tmp_path, CPU)
    if model.conditioning is None:
        return
    found = model.conditioning(["circle", "square", "circle"])
    assert found.context.shape == found.unconditional.shape and found.context.shape[0] == 3
    if backbone_of(model.unet).condition == "context":
        assert found.context.shape[2] == model.unet.config.cross_attention_dim
    assert torch.equal(found.context[0], found.context[2]) and not torch.allclose(found.context[0], found.context[1])
    assert torch.equal(found.unconditional[0], found.unconditional[1])
    torch.testing.assert_close(model.conditioning(["square"]).context[0], found.context[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_without_a_checkpoint_says_what_to_run(name, tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in .* run `dvc pull data.dvc`"):
        discover.family(name).load(tmp_path, CPU)
