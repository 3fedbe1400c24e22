"""What is exported says nothing of the machine that made it."""

from diffusers import LDMPipeline

from benchmarks.models.ldm import save_tiny
from benchmarks.small.export import export_pipeline


def test_the_exported_folder_holds_no_path_of_its_maker(tmp_path):
    save_tiny(tmp_path / "trained", 0)
    made = LDMPipeline.from_pretrained(tmp_path / "trained")
    export_pipeline(made.vqvae, made.unet, made.scheduler, tmp_path / "exported")
    assert not [f for f in (tmp_path / "exported").rglob("*.json") if str(tmp_path) in f.read_text(encoding="utf-8")]
    assert LDMPipeline.from_pretrained(tmp_path / "exported").unet.config.sample_size == 8
