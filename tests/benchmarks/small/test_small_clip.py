from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from torch.nn import functional as F
from transformers import CLIPTextModel

from benchmarks.small import clip, diffusion, export, kl_first_stage, measure

CONFIG = clip.ContrastiveConfig(
    iterations=4,
    batch=3,
    peak_rate=3e-3,
    warm_up=2,
    average_decay=0.5,
    log_every=1,
    save_every=2,
    seed=0,
    vocabulary=530,
    length=8,
    width=8,
    layers=1,
    heads=2,
    patch=32,
    shift=2,
)
NAMES = ["RED HEART", "BLUE HEART", "RED HEART", "GREEN BOOK", "RED HEART"]
LEVELS = torch.tensor([0, 128, 10, 255, 20], dtype=torch.uint8)
IMAGES = LEVELS[:, None, None, None].expand(-1, 3, 64, 64).contiguous()


def test_names_become_tokens_and_padding():
    tokenizer = clip.build_tokenizer(NAMES, CONFIG)
    tokens = clip.tokenize(tokenizer, ["red heart", "RED HEART", "an unseen name of many letters"])
    assert tokens.shape == (3, 8)
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[0, 0] == tokenizer.bos_token_id
    assert tokens[0, -1] == tokens[2, -1] == tokenizer.eos_token_id


def test_a_batch_has_no_name_twice_and_training_tells_names_apart(tmp_path: Path):
    config = replace(CONFIG, iterations=120, log_every=60, save_every=60, shift=0)
    tokenizer = clip.build_tokenizer(NAMES, config)
    held_out = IMAGES[[0, 1, 3]], [NAMES[index] for index in (0, 1, 3)]
    model = clip.train(config, tokenizer, IMAGES, NAMES, held_out, tmp_path, tmp_path / "log.jsonl")
    found = clip.scores(model, tokenizer, *held_out)
    assert found["retrieved"] == 1.0
    assert found["matching"] > found["others"]


def test_moved_images_keep_their_size_and_get_a_white_border():
    image = torch.zeros(2, 3, 6, 6)
    moved = clip.move(image, torch.tensor([[2, 2], [0, 4]]), 2)
    assert torch.equal(moved[0], image[0])
    assert torch.equal(moved[1], F.pad(image, (2, 2, 2, 2), value=1.0)[1, :, 0:6, 4:10])


def test_scores_are_cosines_times_100():
    tokenizer = clip.build_tokenizer(NAMES, CONFIG)
    torch.manual_seed(0)
    model = clip.build(CONFIG, tokenizer)
    found = clip.scores(model, tokenizer, IMAGES[:2], NAMES[:2])
    with torch.no_grad():
        tokens = clip.tokenize(tokenizer, NAMES[:2])
        cosines = model(tokens, IMAGES[:2].float() / 127.5 - 1).logits_per_image / model.logit_scale.exp()
    assert found["matching"] == pytest.approx(100 * cosines.diag().mean().item(), abs=1e-4)
    assert found["others"] == pytest.approx(100 * cosines.flip(1).diag().mean().item(), abs=1e-4)


def test_the_exported_pipeline_generates_from_a_prompt(tmp_path: Path):
    training = dict.fromkeys(("iterations", "batch", "warm_up", "log_every", "save_every", "seed"), 1)
    training |= {"peak_rate": 1e-3, "average_decay": 0.9, "layers_per_block": 1}
    terms = {"squared_weight": 1.0, "perceptual_weight": 0.1, "perceptual_images": 1, "divergence_weight": 1e-6}
    vae = kl_first_stage.build(kl_first_stage.KLConfig(**training, **terms, channels=(4, 4, 4, 8), norm_groups=2))
    unet = diffusion.build_conditional(
        diffusion.ConditionalConfig(
            **training, channels=(8, 8), head_channels=4, norm_groups=4, context_channels=CONFIG.width, dropout=0.1
        ),
        4,
    )
    tokenizer = clip.build_tokenizer(NAMES, CONFIG)
    clip.build(CONFIG, tokenizer).save_pretrained(tmp_path / "clip")
    encoder = CLIPTextModel.from_pretrained(tmp_path / "clip")
    expected = clip.contexts(encoder, tokenizer, ["RED HEART", ""])
    assert expected.shape == (2, CONFIG.length, CONFIG.width)
    export.export_text_to_image(vae, encoder, tokenizer, unet, diffusion.build_scheduler(), tmp_path / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, PNDMScheduler)
    given, none = pipeline.encode_prompt("red heart", "cpu", 1, True)
    torch.testing.assert_close(torch.cat([given, none]), expected, rtol=0, atol=5e-3)
    images = pipeline("red heart", num_inference_steps=3, guidance_scale=7.5, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "model").rglob("*.json"))
    parts = {"model": clip.build(CONFIG, tokenizer), "tokenizer": tokenizer}
    export.export_parts(parts, tmp_path / "score")
    # Two vendors, who list the same names in the same order.
    rows = [SimpleNamespace(name=name, split=split) for split in ("train", "held-out") for name in NAMES[1:4] * 2]
    pictured = IMAGES[[0, 1, 2, 3, 4, 0] * 2]
    figures = measure.measure_text_to_image(pipeline, tmp_path / "score", pictured, rows, NAMES[1:4], tmp_path)
    assert (tmp_path / "text-samples.png").is_file()
    expected = clip.scores(*parts.values(), pictured[:6], NAMES[1:4] * 2)
    assert figures["clip_matching_train"] == pytest.approx(expected["matching"], abs=1e-4)
    assert figures["clip_others_train"] == pytest.approx(expected["others"], abs=1e-4)
    assert figures["clip_others_train"] != pytest.approx(figures["clip_matching_train"], abs=1e-4)
