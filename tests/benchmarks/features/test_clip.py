"""The CLIP score on tiny random CLIPs, against torchmetrics, transformers and open_clip."""

import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTokenizer

from benchmarks.features import _clip as clip
from benchmarks.runtime import manifest

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


def score(scorer):
    return clip.cosines(scorer, clip.prompt_vectors(scorer, PROMPTS), IMAGES)


@pytest.fixture(scope="module")
def scorer(folder):
    return clip.load_clip(folder, torch.device("cpu"))


def test_cosines_are_those_of_transformers(scorer):
    with torch.no_grad():
        tokens = clip.tokenize(scorer.tokenizer, PROMPTS)
        output = scorer.model(tokens, IMAGES.float() / 127.5 - 1)
        expected = output.logits_per_image.diag() / scorer.model.logit_scale.exp()
    found = score(scorer)
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
    found = 100 * score(scorer)
    assert (found > 1).any()
    for image, prompt, own in zip(IMAGES, PROMPTS, found, strict=True):
        expected = clip_score(image, prompt, lambda: (model, processor))
        assert expected.item() == pytest.approx(max(own.item(), 0), abs=1e-3)


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
        clip.cosines(scorer, clip.prompt_vectors(scorer, PROMPTS[:1]), IMAGES)


def test_a_prompt_is_embedded_once(scorer):
    asked = []
    counting = SimpleNamespace(embed_prompts=lambda prompts: asked.extend(prompts) or scorer.embed_prompts(prompts))
    vectors = clip.prompt_vectors(counting, PROMPTS)
    assert asked == sorted(set(PROMPTS))
    torch.testing.assert_close(vectors, scorer.embed_prompts(PROMPTS))


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


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
}
# Neither square nor of the network's size, as a preprocessing must take them.
PICTURES = torch.randint(0, 256, (5, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def open_clip_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**OPEN_CLIP["model_cfg"])
    return {name: 3 * tensor for name, tensor in model.state_dict().items()}


def save_open_clip(folder, weights, name="open_clip_model.safetensors", config=OPEN_CLIP):
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        save_file(weights, folder / name)
    else:
        torch.save(weights, folder / name)
    return folder


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_cosines_are_those_of_open_clip(open_clip_weights, tmp_path, name):
    folder = save_open_clip(tmp_path / "tiny", open_clip_weights, name)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    pixels = torch.stack([preprocess(Image.fromarray(np.moveaxis(image.numpy(), 0, -1))) for image in PICTURES])
    with torch.no_grad():
        images, texts, _ = model.eval()(pixels, open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS))
    scorer = clip.load_clip(folder, torch.device("cpu"))
    found = clip.cosines(scorer, clip.prompt_vectors(scorer, PROMPTS), PICTURES)
    assert found.shape == (5,) and found.std() > 0.001
    torch.testing.assert_close(found, (images * texts).sum(dim=1))
    assert scorer.identity == f"open_clip tiny {manifest.sha256(folder / name)[:8]}"


def test_a_known_architecture_is_named(open_clip_weights, tmp_path, monkeypatch):
    configs = {"Tiny-B-16": OPEN_CLIP["model_cfg"] | {"quick_gelu": True}}
    monkeypatch.setattr(open_clip, "list_models", lambda: ["ViT-B-32", "Tiny-B-16-quickgelu"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: configs.get(name.removesuffix("-quickgelu")))
    config = OPEN_CLIP | {"model_cfg": configs["Tiny-B-16"]}
    folder = save_open_clip(tmp_path / "openai", open_clip_weights, config=config)
    assert clip.load_clip(folder, torch.device("cpu")).identity.startswith("Tiny-B-16 openai ")


def test_half_precision_weights_are_computed_in_single(open_clip_weights, tmp_path):
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in open_clip_weights.items()}
    scorer = clip.load_clip(save_open_clip(tmp_path / "half", half), torch.device("cpu"))
    assert scorer.embed_images(PICTURES).dtype == scorer.embed_prompts(PROMPTS).dtype == torch.float32


def test_pickled_code_in_open_clip_weights_is_not_run(open_clip_weights, tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = save_open_clip(tmp_path / "hostile", open_clip_weights | {"logit_scale": Canary()}, "weights.bin")
    with pytest.raises(ValueError, match="holds no CLIP that open_clip can load"):
        clip.load_clip(folder, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_an_open_clip_folder_that_is_not_whole_is_named(open_clip_weights, tmp_path):
    def error(folder):
        with pytest.raises(ValueError) as found:
            clip.load_clip(folder, torch.device("cpu"))
        assert "\n" not in str(found.value)
        return str(found.value)

    folder = save_open_clip(tmp_path / "two", open_clip_weights)
    (folder / "other.bin").write_bytes(b"")
    assert "must hold one file of weights" in error(folder) and "found open_clip_model.safetensors, other.bin" in error(
        folder
    )
    (folder / "other.bin").unlink()
    path = folder / "open_clip_model.safetensors"
    manifest.write(folder)
    path.write_bytes(path.read_bytes()[:-5])
    assert "is damaged" in error(folder)
    (folder / manifest.NAME).unlink()
    assert "two holds no CLIP that open_clip can load: fetch it again" in error(folder)
    path.unlink()
    assert "found none" in error(folder)
    wider = OPEN_CLIP | {"model_cfg": OPEN_CLIP["model_cfg"] | {"embed_dim": 8}}
    folder = save_open_clip(tmp_path / "wider", open_clip_weights, config=wider)
    assert "size mismatch" in error(folder)
    assert "no CLIP" in error(save_open_clip(tmp_path / "none", open_clip_weights, config={}))
