"""Published statistics are read as they are, and nothing else is taken for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.datasets import _published
from benchmarks.metrics._frechet import frechet_distance, moments


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(_published, "POOLED", 6)
    monkeypatch.setattr(_published, "SPATIAL", 4)


def features(count, size, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(dtype=np.float64, **changes):
    """What numpy makes of some features, as the publishers do it."""
    pooled, spatial = features(40, 6).numpy(), features(40, 4, 1).numpy()
    content = {
        "mu": pooled.mean(axis=0),
        "sigma": np.cov(pooled, rowvar=False),
        "mu_s": spatial.mean(axis=0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }
    content = {name: array.astype(dtype) for name, array in content.items()} | changes
    return {name: array for name, array in content.items() if array is not None}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_reference_batch_of_adm_gives_both_moments_and_no_image(dtype, tmp_path):
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    pickled = np.array([{"never": "unpickled"}], dtype=object)
    np.savez(path, arr_0=pickled, **statistics(dtype))
    found = _published.read(path)
    for part, size, seed in ((found.pooled, 6, 0), (found.spatial, 4, 1)):
        expected = moments(features(40, size, seed))
        assert part.mean.dtype == part.covariance.dtype == torch.float64
        torch.testing.assert_close(part.mean, expected.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part.covariance, expected.covariance, rtol=1e-6, atol=1e-6)
        assert part.count == 1_281_167
        assert frechet_distance(features(40, size, seed), part) == pytest.approx(0, abs=1e-5)


def test_statistics_of_clean_fid_have_no_spatial_part(tmp_path):
    path = tmp_path / "lsun_church_clean_trainfull_256.npz"
    np.savez(path, **statistics(mu_s=None, sigma_s=None))
    found = _published.read(path)
    assert found.spatial is None and found.pooled.count == 126_227
    assert "spatial.mean" not in found.to_tensors()


def test_the_count_of_another_file_is_not_known(tmp_path):
    np.savez(tmp_path / "mine.npz", **statistics())
    assert _published.read(tmp_path / "mine.npz").pooled.count == 0


def test_the_identity_is_name_and_content(tmp_path):
    paths = [tmp_path / "a" / "mine.npz", tmp_path / "b" / "mine.npz"]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        np.savez(path, **statistics(mu=features(1, 6, seed)[0].numpy()))
    first, second = map(_published.identity, paths)
    assert first.startswith("mine.npz@") and len(first) == len("mine.npz@") + 8 and first != second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "has mu, mu_s, sigma_s, but statistics are mu and sigma"),
        ({"sigma_s": None}, "has mu, mu_s, sigma, but statistics are mu and sigma"),
        ({"mu": np.zeros(5)}, r"mu in .* is float64 \(5,\) instead of floating point \(6,\)"),
        ({"sigma": np.eye(5)}, r"sigma in .* is float64 \(5, 5\) instead of floating point \(6, 6\)"),
        ({"sigma": np.eye(6, dtype=int)}, "sigma in .* is int64"),
        ({"mu": np.full(6, np.nan)}, "mu in .* has values that are not finite"),
        ({"sigma": np.full((6, 6), np.inf)}, "sigma in .* has values that are not finite"),
        ({"sigma": np.eye(6) - np.eye(6, k=1)}, "sigma in .* is not a covariance matrix"),
        ({"sigma_s": -np.eye(4)}, "sigma_s in .* is not a covariance matrix"),
        ({"sigma": np.zeros((6, 6))}, "sigma in .* is not a covariance matrix"),
        ({"mu": np.array([{"a": 1}], dtype=object)}, "mu in .* cannot be read .*pickle"),
        ({"sigma": np.zeros((200, 200))}, r"sigma in .* is larger than \(6, 6\)"),
    ],
)
def test_what_are_no_statistics_is_refused(changes, message, tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, **statistics(**changes))
    with pytest.raises(ValueError, match=message) as raised:
        _published.read(path)
    assert "\n" not in str(raised.value)


def test_features_of_clean_fid_are_no_statistics(tmp_path):
    np.savez(tmp_path / "kid.npz", feats=np.zeros((3, 6)))
    with pytest.raises(ValueError, match="has feats, but statistics are mu and sigma"):
        _published.read(tmp_path / "kid.npz")


def test_a_truncated_or_other_file_is_one_line(tmp_path):
    path = tmp_path / "whole.npz"
    np.savez(path, **statistics())
    whole = path.read_bytes()
    truncated = [whole[: len(whole) * part // 8] for part in range(8)]
    for content in [*truncated, b"<html>Not found</html>", b"\x80\x04K\x01."]:
        path.write_bytes(content)
        with pytest.raises(ValueError) as raised:
            _published.read(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_flipped_byte_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "whole.npz"
    np.savez(path, **statistics())
    whole, expected = path.read_bytes(), _published.read(path).to_tensors()
    found = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            tensors = _published.read(path).to_tensors()
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
        else:
            assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert found > len(whole) / 7 / 2


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ValueError, match="mine.npz is missing: download it"):
        _published.read(tmp_path / "mine.npz")


@pytest.mark.parametrize(
    ("name", "evaluator"),
    [
        ("VIRTUAL_lsun_bedroom256.npz", "inception"),
        ("cifar10_legacy_tensorflow_train_32.npz", "inception"),
        ("ffhq_clean_trainval70k_256.npz", "inception_clean"),
        ("mine.npz", "inception"),
        ("mine.npz", "inception_clean"),
    ],
)
def test_statistics_go_with_the_resize_they_were_made_with(name, evaluator, tmp_path):
    _published.check_evaluator(tmp_path / name, evaluator)
    others = {"inception", "inception_clean", "efficientnet_lite0"} - {evaluator}
    for other in others - ({"inception", "inception_clean"} if name == "mine.npz" else set()):
        with pytest.raises(ValueError, match=f"{name} was made with .*, so {other} cannot be compared with it"):
            _published.check_evaluator(tmp_path / name, other)


def test_no_evaluator_resizes_as_pytorch_fid(tmp_path):
    with pytest.raises(ValueError, match="pytorch-fid's resize"):
        _published.check_evaluator(tmp_path / "ffhq_legacy_pytorch_trainval_256.npz", "inception")


def test_the_sizes_are_those_of_the_network(tmp_path, monkeypatch):
    monkeypatch.undo()
    assert (_published.POOLED, _published.SPATIAL) == (2048, 17 * 17 * 7)
    covariance = np.diag(np.linspace(0.1, 1, 2048, dtype=np.float32))
    np.savez(tmp_path / "ffhq_clean_trainval70k_256.npz", mu=np.ones(2048, np.float32), sigma=covariance)
    found = _published.read(tmp_path / "ffhq_clean_trainval70k_256.npz")
    assert found.pooled.covariance.shape == (2048, 2048) and found.pooled.count == 70_000
