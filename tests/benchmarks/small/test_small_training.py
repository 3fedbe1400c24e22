import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, LDMPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from benchmarks.runtime import manifest
from benchmarks.small import (
    card,
    class_conditional,
    diffusion,
    export,
    first_stage,
    kl_first_stage,
    measure,
    training,
    transformer,
)
from benchmarks.small.class_conditional import ClassConditional, ClassEmbedding
from benchmarks.small.data import Emoji
from benchmarks.small.transformer import ClassTransformer

TRAINING = {
    "iterations": 4,
    "batch": 4,
    "peak_rate": 1e-3,
    "warm_up": 2,
    "average_decay": 0.999,
    "log_every": 1,
    "save_every": 2,
    "seed": 0,
}
FIRST_STAGE = first_stage.FirstStageConfig(
    **TRAINING,
    channels=(4, 4, 8),
    layers_per_block=1,
    norm_groups=2,
    codes=8,
    squared_weight=1.0,
    perceptual_weight=0.5,
    perceptual_images=1,
    commitment_weight=0.25,
    quantize_from=1,
    restart_until=4,
    restart_every=1,
    codebook_decay=0.99,
)
KL_FIRST_STAGE = kl_first_stage.KLConfig(
    **TRAINING,
    channels=(4, 4, 4, 8),
    layers_per_block=1,
    norm_groups=2,
    squared_weight=1.0,
    perceptual_weight=0.5,
    perceptual_images=1,
    divergence_weight=1e-6,
)
UNET = {"channels": (8, 8), "layers_per_block": 1, "head_channels": 4, "norm_groups": 4}
DIFFUSION = diffusion.DiffusionConfig(**TRAINING, **UNET)
CONDITIONAL = diffusion.ConditionalConfig(**TRAINING, **UNET, context_channels=4, dropout=0.5)
TRANSFORMER = transformer.TransformerConfig(**TRAINING, width=8, layers=2, head_channels=4, patch=2, dropout=0.5)
IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def train_first_stage(config: first_stage.FirstStageConfig, folder: Path) -> dict[str, torch.Tensor]:
    model = first_stage.train(config, nn.MSELoss(), IMAGES, IMAGES[:2], folder, folder / "log.jsonl")
    return model.state_dict()


def train_kl_first_stage(config: kl_first_stage.KLConfig, folder: Path) -> dict[str, torch.Tensor]:
    images = IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3)
    model = kl_first_stage.train(config, nn.MSELoss(), images, images[:2], folder, folder / "log.jsonl")
    return model.state_dict()


def train_diffusion(config: diffusion.DiffusionConfig, folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(config.seed)
    unet = diffusion.build(config, 3)
    return diffusion.train(config, unet, LATENTS, folder, folder / "log.jsonl", lambda unet: {}).state_dict()


def build_class_conditional(config: diffusion.ConditionalConfig) -> ClassConditional:
    torch.manual_seed(config.seed)
    unet = diffusion.build_conditional(config, 3)
    return ClassConditional(unet, ClassEmbedding(["a", "b"], config.context_channels))


def train_class_conditional(config: diffusion.ConditionalConfig, folder: Path) -> dict[str, torch.Tensor]:
    model = build_class_conditional(config)
    conditions = diffusion.Conditions(torch.tensor([0, 1] * 4), torch.tensor(2))
    log_path = folder / "log.jsonl"
    return diffusion.train(config, model, LATENTS, folder, log_path, lambda model: {}, conditions).state_dict()


def train_transformer(config: transformer.TransformerConfig, folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(config.seed)
    model = ClassTransformer(transformer.build(config, 3))
    conditions = diffusion.Conditions(torch.tensor([0, 1] * 4), torch.tensor(transformer.NO_CLASS))
    log_path = folder / "log.jsonl"
    return diffusion.train(config, model, LATENTS, folder, log_path, lambda model: {}, conditions).state_dict()


def stop_after_two(monkeypatch: pytest.MonkeyPatch, module) -> None:
    learning_rate = training.learning_rate

    def stopping(iteration: int, iterations: int, warm_up: int, peak: float) -> float:
        if iteration == 2:
            raise KeyboardInterrupt
        return learning_rate(iteration, iterations, warm_up, peak)

    monkeypatch.setattr(module, "learning_rate", stopping)


@pytest.mark.parametrize(
    ("module", "train", "config"),
    [
        (first_stage, train_first_stage, FIRST_STAGE),
        (training, train_kl_first_stage, KL_FIRST_STAGE),
        (training, train_diffusion, DIFFUSION),
        (training, train_class_conditional, CONDITIONAL),
        (training, train_transformer, TRANSFORMER),
    ],
    ids=["first_stage", "kl_first_stage", "diffusion", "class_conditional", "transformer"],
)
def test_a_resumed_run_ends_with_the_same_weights(module, train, config, tmp_path, monkeypatch):
    whole = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after_two(patch, module)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "resumed")
    resumed = train(config, tmp_path / "resumed")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="other settings"):
        train(replace(config, seed=1), tmp_path / "resumed")


def test_a_share_of_the_images_is_trained_without_its_class(tmp_path, monkeypatch):
    seen = []
    forward = ClassEmbedding.forward

    def spying(embedding: ClassEmbedding, indices: torch.Tensor) -> torch.Tensor:
        seen.append(indices)
        return forward(embedding, indices)

    monkeypatch.setattr(ClassEmbedding, "forward", spying)
    train_class_conditional(replace(CONDITIONAL, iterations=20), tmp_path)
    counts = torch.bincount(torch.cat(seen), minlength=3).tolist()
    assert sum(counts) == 80
    assert all(10 <= count <= 30 for count in counts[:2])
    assert 25 <= counts[2] <= 55


def test_rare_classes_are_seen_more_often():
    classes = torch.tensor([0] * 9 + [1] + [3] * 4)
    chosen = class_conditional.balance(classes)
    assert torch.bincount(classes[chosen]).tolist() == [9, 3, 0, 8]
    assert set(chosen.tolist()) == set(range(14))


def test_components_are_in_no_class():
    rows = [Emoji(i, "", category, "google", "train") for i, category in enumerate(("Symbols", "Component", "Flags"))]
    assert class_conditional.class_names(rows) == ["Flags", "Symbols"]
    assert class_conditional.class_indices(rows, ["Flags", "Symbols"]).tolist() == [1, -1, 0]


def test_the_accuracy_is_a_mean_over_classes():
    features = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 9.0], [5.0, 9.0]])
    found = measure.nearest(features, torch.tensor([[0.0, 0.0], [7.0, 7.0], [0.0, 8.0]]))
    assert found.tolist() == [0, 0, 2, 1]
    assert measure.mean_accuracy(found, torch.tensor([0, 0, 0, 1])) == pytest.approx((2 / 3 + 1) / 2)


def test_checkpoints_fall_on_lines_of_the_log():
    with pytest.raises(ValueError, match="must be a multiple of log_every"):
        replace(DIFFUSION, log_every=3)


def test_a_class_conditional_model_comes_back_as_it_was_exported(tmp_path):
    model = build_class_conditional(CONDITIONAL)
    shared = tmp_path / "shared"
    first_stage.build(FIRST_STAGE).save_pretrained(shared)
    parts = {"vqvae": shared, "unet": model.unet, "class_embedding": model.embedding}
    export.export_parts(parts | {"scheduler": diffusion.build_scheduler()}, tmp_path / "model")
    manifest.verify(tmp_path / "model")
    for path in shared.iterdir():
        assert (tmp_path / "model" / "vqvae" / path.name).read_bytes() == path.read_bytes()
    embedding = ClassEmbedding.from_pretrained(tmp_path / "model" / "class_embedding")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    assert embedding.config.classes == ["a", "b"]
    indices = torch.tensor([0, 2])
    assert torch.equal(embedding(indices), model.embedding(indices).half().float())
    inputs = LATENTS[:2], torch.tensor([1, 999]), embedding(indices)
    torch.testing.assert_close(unet(*inputs).sample, model.unet(*inputs).sample, rtol=0, atol=5e-3)


def test_the_stock_pipeline_guides_the_transformer_as_it_was_exported(tmp_path):
    torch.manual_seed(0)
    model = transformer.build(TRANSFORMER, 3)
    with torch.no_grad():
        for parameter in model.parameters():  # as it begins it predicts nothing, whatever the class
            parameter.normal_(std=0.3)
    vae = first_stage.build(FIRST_STAGE)
    export.export_transformer(vae, model, diffusion.build_scheduler(), ["a", "b, c"], tmp_path / "model")
    manifest.verify(tmp_path / "model")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.labels == {"a": 0, "b  c": 1}
    inputs = {"timestep": torch.tensor([1, 999]), "class_labels": torch.tensor([0, transformer.NO_CLASS])}
    found, expected = (network(LATENTS[:2], **inputs).sample for network in (pipeline.transformer, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
    images = [
        pipeline([0], guidance_scale=scale, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        for scale in (1.0, 4.0)
    ]
    assert images[0].size == (32, 32) and images[0].tobytes() != images[1].tobytes()


def test_codes_follow_the_mean_of_the_vectors_that_choose_them():
    codebook = first_stage.Codebook(torch.tensor([[0.0, 0.0], [10.0, 10.0], [99.0, 99.0]]), decay=0.0)
    vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0], [10.0, 12.0]])
    indices = codebook.nearest(vectors)
    assert indices.tolist() == [0, 0, 1]
    codebook.update(vectors, indices)
    assert codebook.codes[:2].tolist() == [[2.0, 0.0], [10.0, 12.0]]
    assert codebook.restart(vectors, torch.Generator().manual_seed(0)) == 1
    assert codebook.codes[2].tolist() in vectors.tolist()


def test_every_image_is_seen_once_an_epoch():
    seen = torch.cat([training.batch_indices(iteration, 3, 9, seed=5) for iteration in range(3)])
    assert sorted(seen.tolist()) == list(range(9))
    following = torch.cat([training.batch_indices(iteration, 3, 9, seed=5) for iteration in range(3, 6)])
    assert seen.tolist() != following.tolist()


def test_the_learning_rate_rises_then_falls_to_a_hundredth():
    rates = [training.learning_rate(iteration, 100, 10, 1.0) for iteration in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.01)


def test_psnr_is_that_of_the_squared_error():
    images = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    assert first_stage.psnr(images + 10, images).item() == pytest.approx(28.1308, abs=1e-4)
    assert measure.pooled_psnr(images + 10, images) == pytest.approx(28.1308, abs=1e-4)


def test_the_exported_pipeline_is_float16_and_samples(tmp_path):
    torch.manual_seed(0)
    model, unet = first_stage.build(FIRST_STAGE), diffusion.build(DIFFUSION, 3)
    folder = tmp_path / "model"
    for _ in range(2):  # The second time it replaces what is there.
        export.export_pipeline(model, unet, diffusion.build_scheduler(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    pipeline = LDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = measure.sample(pipeline, 2, seed=0)
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(images, measure.sample(pipeline, 2, seed=0))


def test_the_stock_pipeline_takes_the_kl_first_stage(tmp_path):
    torch.manual_seed(0)
    model, unet = kl_first_stage.build(KL_FIRST_STAGE), diffusion.build(DIFFUSION, 4)
    export.export_pipeline(model, unet, diffusion.build_scheduler(), tmp_path / "model")
    pipeline = LDMPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.vqvae, AutoencoderKL)
    assert measure.sample(pipeline, 2, seed=0).shape == (2, 3, 64, 64)


def test_samples_depend_on_their_class_and_on_no_other_image():
    torch.manual_seed(0)
    model = build_class_conditional(CONDITIONAL)
    networks = model.unet, first_stage.build(FIRST_STAGE), diffusion.build_scheduler(), model.embedding
    images = measure.sample_classes(*networks, torch.tensor([0, 1]), seed=0)
    assert images.shape == (2, 3, 32, 32)
    same, other = measure.sample_classes(*networks, torch.tensor([0, 0]), seed=0)
    assert torch.equal(same, images[0])
    assert not torch.equal(other, images[1])


def test_evaluator_weights_keep_their_names(tmp_path):
    source = tmp_path / "weights.pth"
    torch.save({"kernel": torch.ones(2, 3, 1, 1), "variance": torch.tensor([1e-9])}, source)
    with pytest.raises(ValueError, match="install the package's version again"):
        export.export_evaluator(source, "0" * 64, tmp_path / "model.safetensors")
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    export.export_evaluator(source, sha256, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found["kernel"].dtype == torch.float16
    assert found["variance"].tolist() == [pytest.approx(1e-9)]


def test_the_card_changes_only_between_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{card.BEGIN}\nold\n{card.END}\nafter\n")
    card.write(path, "new")
    assert path.read_text() == f"before\n{card.BEGIN}\nnew\n{card.END}\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="needs the lines"):
        card.write(path, "new")


def test_the_table_gives_figures_cost_and_hashes(tmp_path):
    logs, folder = tmp_path / "logs", tmp_path / "data"
    for path in (logs, folder):
        path.mkdir()
    for name in card.TRAININGS:
        (logs / f"{name}.jsonl").write_text('{"iteration": 50, "seconds": 60}\n{"iteration": 1000, "seconds": 1200}\n')
    (folder / "file").write_bytes(b"content")
    figures = {"held_out_psnr": 24.125, "class_accuracy_of_held_out": 0.625, "class_unet_parameters": 1234}
    text = card.table(figures, logs, folder)
    assert "| emoji-class | Parameters of UNet and embedding | 1,234 |" in text
    assert "|  | PSNR of held-out images, mean | 24.12 dB |" in text
    assert "|  | Held-out images put into their own class | 62.5% |" in text
    assert "emoji-text" not in text
    assert "| diffusion | 1,000 | 20 |" in text
    assert f"| file | 7 | `{hashlib.sha256(b'content').hexdigest()}` |" in text


def test_the_grid_shows_every_pixel(tmp_path):
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    card.draw(images, tmp_path / "grid.png")
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png")))
    assert grid.shape == (2 * 18 + 2, 16 * 18 + 2, 3)
    assert torch.equal(grid[20:36:2, 20:36:2].permute(2, 0, 1), images[17])
