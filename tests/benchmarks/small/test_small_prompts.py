import pytest

from benchmarks.small import prompts
from benchmarks.small.class_conditional import class_names
from benchmarks.small.data import Emoji, load_table


def rows(count: int, category: str = "Objects", split: str = "train") -> list[Emoji]:
    return [Emoji(i, f"{category} {split} {i}", category, "google", split) for i in range(count)]


def test_calibration_and_evaluation_prompts_are_disjoint_names_of_training_images():
    table = rows(800) + rows(800) + rows(50, split="held-out") + rows(50, category="Component")
    calibration, evaluation = prompts.draw_names(table)
    assert len(calibration) == prompts.CALIBRATION and len(evaluation) == prompts.EVALUATION
    assert len({*calibration, *evaluation}) == prompts.CALIBRATION + prompts.EVALUATION
    assert {*calibration, *evaluation} <= {row.name for row in rows(800)}
    assert prompts.draw_names(table[::-1]) == (calibration, evaluation)
    with pytest.raises(ValueError, match="cannot be drawn from 5 names"):
        prompts.draw_names(rows(5))


def test_the_committed_prompts_are_those_of_the_data(root, tmp_path):
    if not (root / "data" / "emoji").is_dir():
        pytest.skip("the data is not here")
    table = load_table(root / "data" / "emoji")
    classes = class_names(table)
    for task, lists in (("emoji-class", (classes, classes)), ("emoji-text", prompts.draw_names(table))):
        prompts.write(tmp_path / task, *lists)
        for name in ("calibration", "evaluation"):
            path = root / "benchmarks" / "prompts" / task / f"{name}.txt"
            assert path.read_bytes() == (tmp_path / task / f"{name}.txt").read_bytes()
