import json
import shutil
import zipfile

import pytest
import yaml

from benchmarks.sources.coco_captions import MEMBERS, captions_of, read_ids, write_prompts
from benchmarks.stages import prompts


@pytest.fixture
def lists(root):
    return root / "benchmarks" / "paper" / "prompts"


def annotations(ids, year=2014):
    """A COCO caption file with a caption for each id, and some more."""
    entries = [{"id": each, "image_id": 7, "caption": f"Caption\n{each}  here. "} for each in sorted([*ids, 10**7])]
    return {"info": {"year": year, "version": "1.0"}, "images": [{"id": 7}], "annotations": entries}


def pack(path, documents):
    with zipfile.ZipFile(path, "w") as archive:
        for member, document in documents.items():
            archive.writestr(f"annotations/{member}", json.dumps(document))
    return path


def test_the_committed_lists_are_disjoint(lists):
    evaluation, calibration = (read_ids(lists / "coco" / f"{purpose}.ids") for purpose in ("evaluation", "calibration"))
    assert (len(evaluation), len(calibration)) == (25_000, 500)
    assert not set(evaluation) & set(calibration)


def test_the_lists_are_of_real_captions(lists):
    """Against another list of COCO 2014: MLPerf's of 5,000 captions of val2014, of which 93 were looked at.

    Nine are of images in the test split; the others are not, so none of their captions may be here.
    """
    evaluation = read_ids(lists / "coco" / "evaluation.ids")
    assert {392, 1159, 1473, 1517, 4797, 6517, 8892, 9639, 13801} <= set(evaluation)
    assert not {70, 277, 310, 414, 639, 689, 699, 748, 939} & set(evaluation)


def test_the_first_5000_captions_are_of_different_images(lists):
    """An image's captions lie 5,000 lines apart, by id."""
    evaluation = read_ids(lists / "coco" / "evaluation.ids")
    for image in range(5000):
        assert evaluation[image::5000] == sorted(evaluation[image::5000])


def test_prompts_follow_the_lists(tmp_path, lists):
    folder = tmp_path / "coco"
    folder.mkdir()
    ids = {"calibration": [30, 10, 20], "evaluation": [3, 2, 1]}
    for purpose, listed in ids.items():
        (folder / f"{purpose}.ids").write_text("".join(f"{each}\n" for each in listed), encoding="utf-8")
    archive = pack(tmp_path / "a.zip", {MEMBERS[purpose]: annotations(listed) for purpose, listed in ids.items()})
    left = tmp_path / ".a.zip.999999999"  # of a run that was killed
    left.mkdir()
    counts = write_prompts(archive, folder)
    assert counts == {folder / "calibration.txt": 3, folder / "evaluation.txt": 3}
    assert (folder / "evaluation.txt").read_text(
        encoding="utf-8"
    ) == "Caption 3 here.\nCaption 2 here.\nCaption 1 here.\n"
    assert (folder / "calibration.txt").read_text(encoding="utf-8").splitlines()[0] == "Caption 30 here."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "coco"]


def test_the_stage_reads_the_fetched_archive(tmp_path, lists, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lists / "coco", "prompts/coco", ignore=shutil.ignore_patterns("*.txt"))
    source = yaml.safe_load((lists.parent / "sources.yaml").read_text(encoding="utf-8"))[prompts.NAME]
    source |= {"sha256": None, "bytes": None}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({prompts.NAME: source}), encoding="utf-8")
    with pytest.raises(ValueError, match="downloads/annotations_trainval2014.zip is missing: run `python .*captions`"):
        prompts.run()
    (tmp_path / "downloads").mkdir()
    documents = {name: annotations(read_ids(lists / "coco" / f"{purpose}.ids")) for purpose, name in MEMBERS.items()}
    pack(tmp_path / "downloads" / "annotations_trainval2014.zip", documents)
    prompts.run()
    assert capsys.readouterr().out == (
        "prompts/coco/calibration.txt: 500 captions, prompts/coco/evaluation.txt: 25,000 captions\n"
    )
    lines = (tmp_path / "prompts" / "coco" / "evaluation.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"Caption {read_ids(lists / 'coco' / 'evaluation.ids')[0]} here."
    pack(tmp_path / "downloads" / "annotations_trainval2014.zip", dict.fromkeys(documents, annotations([1], year=2017)))
    with pytest.raises(ValueError, match="2014.zip is not coco-captions: its .* is of 2017, .*: delete it and run"):
        prompts.run()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"captions_train2017.json": [1]},
            "no member that ends with captions_train2014.json, but has annotations/capt",
        ),
        ({MEMBERS["calibration"]: [10], MEMBERS["evaluation"]: [1, 3]}, "val2014.json lacks 1 of the 3 listed.*as 2"),
    ],
)
def test_the_captions_of_another_year_are_named(tmp_path, members, message):
    (tmp_path / "calibration.ids").write_text("10\n", encoding="utf-8")
    (tmp_path / "evaluation.ids").write_text("3\n2\n1\n", encoding="utf-8")
    archive = pack(tmp_path / "a.zip", {name: annotations(ids) for name, ids in members.items()})
    with pytest.raises(ValueError, match=message):
        write_prompts(archive, tmp_path)
    assert not list(tmp_path.glob("*.txt"))


def test_a_caption_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(annotations([1], year=2017)), encoding="utf-8")
    with pytest.raises(ValueError, match="is of 2017, but the lists of captions are of 2014"):
        captions_of(path, [1])
    instances = {"info": {"year": 2014}, "annotations": [{"id": 1, "bbox": []}]}
    for text in ("{", json.dumps(instances), "[]", json.dumps({"annotations": []})):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="captions_val2014.json is not a COCO caption file"):
            captions_of(path, [1])


def test_a_damaged_list_names_the_line(tmp_path):
    path = tmp_path / "evaluation.ids"
    with pytest.raises(ValueError, match="there is no list of captions"):
        read_ids(path)
    for text, message in (
        ("1\nx\n", "line 2 is 'x'"),
        ("1\n\n2\n", "line 2 is ''"),
        ("5\n6\n5\n", "line 3 has caption 5 a"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_ids(path)


def test_classes_are_all_there_and_evaluation_goes_round_them(lists):
    evaluation, calibration = (
        (lists / "imagenet" / f"{purpose}.txt").read_text(encoding="utf-8").splitlines()
        for purpose in ("evaluation", "calibration")
    )
    assert evaluation == [str(label) for label in range(1000)]
    assert sorted(calibration, key=int) == evaluation
