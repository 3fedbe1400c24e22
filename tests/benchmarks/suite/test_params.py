import copy

import pytest
import yaml

from benchmarks.suite import discover
from benchmarks.suite.params import check_methods, load, parse

PLUGINS = {
    discover.METHODS: ("full_precision", "nearest", "prev", "tfmq"),
    discover.FAMILIES: ("ldm",),
    discover.EXTRACTORS: ("efficientnet_lite0",),
    discover.DATASETS: ("emoji",),
}


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    monkeypatch.setattr(discover, "names", PLUGINS.get)


@pytest.fixture
def document(task_settings):
    del task_settings["name"]
    return {
        "name": "small",
        "tasks": {"emoji-ldm4": task_settings},
        "tables": {
            "leaderboard": {
                "protocol": "shared",
                "tasks": ["emoji-ldm4"],
                "precisions": ["w8a8", "w4a8"],
                "methods": ["nearest", "tfmq"],
            },
            "ablation": {
                "protocol": "shared",
                "tasks": ["emoji-ldm4"],
                "precisions": ["w4a8"],
                "methods": ["prev"],
                "beside": ["tfmq"],
            },
            "published": {
                "protocol": "published",
                "tasks": ["emoji-ldm4"],
                "precisions": ["w4a8"],
                "methods": ["tfmq"],
                "beside": ["tfmq"],
            },
        },
        "methods": {"nearest": {}, "tfmq": {"iterations": 1000}, "prev": {}},
    }


def test_a_suite_is_read_from_yaml(document, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document))
    suite = load(path)
    assert suite == parse(document)
    assert suite.tasks["emoji-ldm4"].name == "emoji-ldm4"
    assert suite.tasks["emoji-ldm4"].guidance_scale == 1.0
    assert suite.methods["tfmq"] == {"iterations": 1000}


def test_cells_are_those_of_full_precision_and_of_each_table_once(document):
    suite = parse(document)
    assert [cell.name for cell in suite.cells()] == [
        "emoji-ldm4/full_precision/w32a32",
        "emoji-ldm4/nearest/w8a8",
        "emoji-ldm4/nearest/w4a8",
        "emoji-ldm4/tfmq/w8a8",
        "emoji-ldm4/tfmq/w4a8",
        "emoji-ldm4/prev/w4a8",
        "emoji-ldm4/tfmq-published/w4a8",
    ]
    assert [cell.name for cell in suite.measured("ablation")] == ["emoji-ldm4/prev/w4a8"]
    for table in ("ablation", "published"):
        assert [cell.name for cell in suite.beside(table)] == ["emoji-ldm4/tfmq/w4a8"]


def test_a_precision_may_have_several_calibration_seeds(document):
    document["tables"]["leaderboard"] |= {"methods": ["tfmq"], "seeds": {"w4a8": 3}}
    suite = parse(document)
    assert suite.pools == 3
    assert [cell.name for cell in suite.measured("leaderboard")] == [
        "emoji-ldm4/tfmq/w8a8",
        *(f"emoji-ldm4/tfmq/w4a8{seed}" for seed in ("", "-s1", "-s2")),
    ]
    assert [cell.name for cell in suite.beside("ablation")] == ["emoji-ldm4/tfmq/w4a8"]
    assert [cell.seed for cell in suite.cells() if cell.method == "full_precision"] == [0]


@pytest.mark.parametrize("scheduler", ["pndm", "euler"])
def test_only_ddim_adds_noise(document, scheduler):
    document["tasks"]["emoji-ldm4"] |= {"scheduler": scheduler, "eta": 0.5}
    with pytest.raises(ValueError, match=f"eta is 0.5, but {scheduler} adds no noise: give 0"):
        parse(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("gate",), 1, "unknown key in params 'gate': did you mean 'gates'"),
        (("tasks", "emoji-ldm4", "step"), 1, "unknown key in params.tasks.emoji-ldm4 'step': did you mean 'steps'"),
        (("tasks", "emoji-ldm4", "steps"), "20", "params.tasks.emoji-ldm4.steps is '20': it must be a whole number"),
        (("tasks", "emoji-ldm4", "steps"), 0, "steps is 0, but must be at least 1"),
        (("tasks", "emoji-ldm4", "steps"), True, "must be a whole number"),
        (("tasks", "emoji-ldm4", "data_images"), 0, "data_images is 0, but must be at least 1"),
        (("tasks", "emoji-ldm4", "eta"), 2.0, "eta is 2.0, but must be from 0"),
        (("tasks", "emoji-ldm4", "family"), "ldn", "unknown family 'ldn': did you mean 'ldm'"),
        (("tasks", "emoji-ldm4", "scheduler"), "dim", "did you mean 'ddim'"),
        (("tasks", "emoji-ldm4", "evaluator"), "inception", "unknown evaluator 'inception'"),
        (("methods", "tfqm"), {}, "unknown method 'tfqm': did you mean 'tfmq'.*baselines/tfqm.py"),
        (("methods", "nearest"), None, "params.methods.nearest is None: it must be a mapping"),
        (("methods", "full_precision"), {}, "full-precision row is always there"),
        (("tables", "leaderboard", "precisions"), ["4w8a"], "precision '4w8a' is not of the form"),
        (("tables", "leaderboard", "precisions"), ["w32a32"], "full-precision row is always there"),
        (("tables", "leaderboard", "precisions"), ["w4a8", "w4a8"], "each once"),
        (("tables", "leaderboard", "protocol"), "share", "did you mean 'shared'"),
        (("tables", "leaderboard", "backend"), "execute", "did you mean 'executed'"),
        (("tables", "leaderboard", "methods"), [], "give at least one"),
        (("tables", "leaderboard", "methods"), ["tfqm"], "did you mean 'tfmq'.*Add `tfqm: {}` under methods"),
        (("tables", "leaderboard", "methods"), ["nearest", "tfmq", "prev"], "two tables measure emoji-ldm4/prev/w4a8"),
        (("tables", "leaderboard", "tasks"), ["emoji-ldm8"], "unknown task in tables.leaderboard 'emoji-ldm8'"),
        (("tables", "ablation", "beside"), ["prev", "tfqm"], "did you mean 'tfmq'"),
        (("tables", "ablation", "precisions"), ["w4a32"], "shows emoji-ldm4/tfmq/w4a32 beside its own, but no table"),
        (("tables", "ablations"), {}, "params.tables.ablations lacks"),
        (("tables", "leaderboard", "seeds"), {"w4a9": 2}, "unknown precision in seeds 'w4a9': did you mean 'w4a8'"),
        (("tables", "leaderboard", "seeds"), {"w4a8": 0}, "seeds of w4a8 is 0, but must be at least 1"),
        (("tables", "ablation", "seeds"), {"w4a8": 2}, "shows emoji-ldm4/tfmq/w4a8-s1 beside its own, but no table"),
        (("tasks", "emoji-ldm4", "guidance_scale"), 3.0, "guidance_scale is 3.0, but without prompts only 1"),
        (("tasks", "emoji-ldm4", "guidance_scale"), -2.0, "guidance_scale is -2.0, but must be at least 0"),
        (
            ("tasks", "emoji-ldm4", "clip"),
            ["data/clip"],
            "clip scores how images match prompts, but there are no prompts",
        ),
    ],
)
def test_mistakes_are_named(document, path, value, message):
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        parse(document)


def test_missing_keys_are_named(document):
    del document["name"], document["tasks"]["emoji-ldm4"]["eta"]
    with pytest.raises(ValueError, match="params lacks name"):
        parse(document)
    with pytest.raises(ValueError, match="params.tasks.emoji-ldm4 lacks eta"):
        parse(document | {"name": "small"})
    with pytest.raises(ValueError, match="params is None"):
        parse(None)


def test_parsing_leaves_the_document_alone(document):
    before = copy.deepcopy(document)
    parse(document)
    assert document == before


def test_records_of_tasks_without_tf32_do_not_know_of_it(document):
    task = parse(document).tasks["emoji-ldm4"]
    assert "tf32" not in task.described() and task.described()["steps"] == task.steps
    document["tasks"]["emoji-ldm4"]["tf32"] = True
    assert parse(document).tasks["emoji-ldm4"].described()["tf32"] is True


def test_gates_are_bounds_of_known_tasks(document):
    document["gates"] = {"emoji-ldm4": {"fd_data": [1, 2.5]}}
    assert parse(document).gates["emoji-ldm4"]["fd_data"] == (1, 2.5)
    document["gates"] = {"emoji-ldm4": {"fd_data": [3, 2.5]}}
    with pytest.raises(ValueError, match=r"gates.emoji-ldm4.fd_data is \[3.*but must be \[low, high\]"):
        parse(document)
    document["gates"] = {"emoji-ldm8": {"fd_data": [1, 2]}}
    with pytest.raises(ValueError, match="unknown task in gates 'emoji-ldm8': did you mean 'emoji-ldm4'"):
        parse(document)


def test_a_task_may_have_settings_of_its_own_for_a_method(document):
    document["tasks"]["emoji-ldm8"] = document["tasks"]["emoji-ldm4"]
    document["overrides"] = {"tfmq": {"emoji-ldm8": {"batch": 8}}}
    suite = parse(document)
    assert suite.settings("emoji-ldm4", "tfmq") == {"iterations": 1000}
    assert suite.settings("emoji-ldm8", "tfmq") == {"iterations": 1000, "batch": 8}
    assert suite.settings("emoji-ldm8", "full_precision") == {}
    document["overrides"] = {"tfqm": {"emoji-ldm8": {"batch": 8}}}
    with pytest.raises(ValueError, match="unknown method in overrides 'tfqm': did you mean 'tfmq'"):
        parse(document)
    document["overrides"] = {"tfmq": {"emoji-ldm9": {"batch": 8}}}
    with pytest.raises(ValueError, match="unknown task in overrides.tfmq 'emoji-ldm9': did you mean"):
        parse(document)
    document["overrides"] = {"tfmq": {"emoji-ldm8": {"bach": 8}}}
    with pytest.raises(ValueError, match=r"overrides\.tfmq\.emoji-ldm8.*'bach': did you mean 'batch'"):
        check_methods(parse(document))


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ({"images": {"emoji-ldm8": [128]}}, "unknown task in rounds.images 'emoji-ldm8': did you mean 'emoji-ldm4'"),
        ({"images": {"emoji-ldm4": []}}, r"rounds.images.emoji-ldm4 is \[\]: give rising counts"),
        ({"images": {"emoji-ldm4": [256, 128]}}, r"is \[256, 128\]: give rising counts of images, each above 1"),
        ({"images": {"emoji-ldm4": [1, 128]}}, "each above 1"),
        ({"images": {"emoji-ldm4": [100, 256]}}, "has 100: give multiples of the task's batch, 32"),
        ({"images": {"emoji-ldm4": [128, 6400]}}, "ends at 6400, but the task has 512 images at most"),
        (
            {"images": {"emoji-ldm4": [128]}, "spending": "pocok"},
            "unknown rounds.spending 'pocok': did you mean 'pocock'",
        ),
    ],
)
def test_rounds_are_checked(document, rounds, message):
    assert parse(document).rounds is None
    with pytest.raises(ValueError, match=message):
        parse(document | {"rounds": rounds})


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_rows_are_equal_within_a_share(document, share):
    assert parse(document).equal_within == 0 and parse(document | {"equal_within": 0.1}).equal_within == 0.1
    with pytest.raises(ValueError, match=f"equal_within is {share}, but must be at least 0 and below 1"):
        parse(document | {"equal_within": share})


def test_the_last_round_may_be_all_images(document):
    document["tasks"]["emoji-ldm4"]["images"] = 500
    chosen = parse(document | {"rounds": {"images": {"emoji-ldm4": [64, 500]}}}).rounds
    assert chosen.images == {"emoji-ldm4": (64, 500)} and chosen.spending == "pocock"
