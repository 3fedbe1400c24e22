"""The CLIP score on a tiny random CLIP, against torchmetrics and transformers."""

from types import SimpleNamespace

import pytest
import torch
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTokenizer

from benchmarks import clip, manifest

PROMPTS = ["red heart", "blue book", "red heart", "a prompt of very many letters", "green book"]
IMAGES = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "toy-clip"
    empty = CLIPTokenizer(model_max_length=8)
    tokenizer = empty.train_new_from_iterator(PROMPTS, 530, show_progress=False)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **tower,
        vocab_size=len(tokenizer),
        max_position_embeddings=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = tower | {"image_size": 32, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(20)  # so that images differ
    model.half().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")
    manifest.write(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return clip.load_clip(folder, torch.device("cpu"))


def test_cosines_are_those_of_transformers(scorer):
    with torch.no_grad():
        tokens = clip.tokenize(scorer.tokenizer, PROMPTS)
        output = scorer.model(tokens, IMAGES.float() / 127.5 - 1)
        expected = output.logits_per_image.diag() / scorer.model.logit_scale.exp()
    found = scorer.cosines(IMAGES, PROMPTS)
    assert found.shape == (5,) and found.std() > 0.01
    torch.testing.assert_close(found, expected)


def test_scores_are_those_of_torchmetrics(scorer):
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = CLIPProcessor(CLIPImageProcessor(**settings, do_center_crop=False), scorer.tokenizer)
    # torchmetrics expects the features alone.
    model = SimpleNamespace(
        to=lambda device: model,
        config=scorer.model.config,
        get_image_features=lambda *given: scorer.model.get_image_features(*given).pooler_output,
        get_text_features=lambda *given: scorer.model.get_text_features(*given).pooler_output,
    )
    found = 100 * scorer.cosines(IMAGES, PROMPTS)
    assert (found > 1).any()
    for image, prompt, score in zip(IMAGES, PROMPTS, found, strict=True):
        expected = clip_score(image, prompt, lambda: (model, processor))
        assert expected.item() == pytest.approx(max(score.item(), 0), abs=1e-3)


def test_images_are_resized_and_normalised():
    same = clip.pixels(IMAGES, 32)
    torch.testing.assert_close(same, IMAGES.float() / 127.5 - 1, rtol=0, atol=0)
    halved = clip.pixels(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), 32)
    torch.testing.assert_close(halved, torch.ones(1, 3, 32, 32))


def test_the_scorer_says_which_weights_it_has(scorer, folder):
    digest = manifest.sha256(folder / "model" / "model.safetensors")
    assert scorer.identity == f"toy-clip {digest[:8]}"
    assert scorer.model.dtype == torch.float32


def test_every_image_needs_a_prompt(scorer):
    with pytest.raises(ValueError, match="5 images are scored against 1 prompts"):
        scorer.cosines(IMAGES, PROMPTS[:1])


def test_a_missing_or_damaged_folder_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in .*absent"):
        clip.load_clip(tmp_path / "absent", torch.device("cpu"))
    broken = tmp_path / "toy-clip"
    (broken / "model").mkdir(parents=True)
    (broken / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match="is missing: run `dvc pull"):
        clip.load_clip(broken, torch.device("cpu"))
    for path in folder.rglob("*"):
        if path.is_file():
            target = broken / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    (broken / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="is damaged"):
        clip.load_clip(broken, torch.device("cpu"))
