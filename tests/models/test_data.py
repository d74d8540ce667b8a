"""The data sets: what they hold, how they are split, and what bad files say."""

import gzip
import math
import struct

import numpy as np
import pytest
import torch

from models import data


def test_digits_are_the_real_ones_with_seventeen_levels() -> None:
    digits = data.digits()
    assert (digits.event_shape, digits.levels, digits.event_size) == ((64,), 17, 64)
    assert [len(part) for part in (digits.train, digits.val, digits.test)] == [1439, 179, 179]
    assert digits.train.dtype == torch.float32
    everything = torch.cat([digits.train, digits.val, digits.test])
    assert everything.min() == 0 and everything.max() == 16
    assert everything.sum().item() == 561718  # the sum over scikit-learn's array


def test_split_is_a_seeded_permutation_that_loses_and_repeats_no_row() -> None:
    rows = np.arange(40.0).reshape(20, 2)
    one, two, other = (data.split(rows, "rows", seed=seed) for seed in (0, 0, 1))
    joined = torch.cat([one.train, one.val, one.test])
    order = np.random.default_rng(0).permutation(20)
    assert torch.equal(joined, torch.from_numpy(rows[order]).float())
    assert torch.equal(one.test, two.test)
    assert not torch.equal(one.train, other.train)
    assert one.to(torch.float64).val.dtype == torch.float64


@pytest.mark.parametrize("name", data.TABLES)
def test_tables_have_their_columns(name: str) -> None:
    columns = {"wine": 13, "breast_cancer": 30, "diabetes": 10, "iris": 4, "linnerud": 3}
    table = data.table(name)
    assert table.event_shape == (columns[name],)
    assert table.levels is None
    assert torch.isfinite(table.train).all()


@pytest.mark.parametrize("name", data.TARGETS)
def test_targets_are_seeded_and_bounded(name: str) -> None:
    one = data.target(name, sizes=(500, 50, 60), seed=3)
    again = data.target(name, sizes=(500, 50, 60), seed=3)
    assert [tuple(part.shape) for part in (one.train, one.val, one.test)] == [
        (500, 2),
        (50, 2),
        (60, 2),
    ]
    assert torch.equal(one.train, again.train)
    assert not torch.equal(one.train[:50], one.val)
    assert one.train.abs().max() < 4.0


def test_two_moons_lies_on_its_half_circles() -> None:
    points = data.two_moons(4000, np.random.default_rng(0))
    x, y = 0.9 * points[:, 0] + 0.5, 0.5 * points[:, 1] + 0.25
    upper = np.abs(np.hypot(x, y) - 1.0)
    lower = np.abs(np.hypot(x - 1.0, y - 0.5) - 1.0)
    assert np.minimum(upper, lower).max() < 0.25
    assert abs((upper < lower).mean() - 0.5) < 0.05


def test_checkerboard_fills_half_of_the_board_evenly() -> None:
    points = data.checkerboard(8000, np.random.default_rng(0))
    cells = np.floor(points + 2.0).astype(int)
    assert ((cells.sum(1) % 2) == 0).all()
    counts = np.bincount(4 * cells[:, 0] + cells[:, 1], minlength=16)
    assert np.count_nonzero(counts) == 8
    assert counts[counts > 0].min() > 850


def idx_bytes(images: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{images.ndim}I", 0, 8, images.ndim, *images.shape)
    return header + images.tobytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read_compressed_or_not(tmp_path, compressed: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 5), dtype=np.uint8)
    content = idx_bytes(images)
    path = tmp_path / ("train-images-idx3-ubyte" + (".gz" if compressed else ""))
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert np.array_equal(data.read_idx(path), images)
    dataset = data.images_from_file(path)
    assert (dataset.event_shape, dataset.levels) == ((20,), 256)
    assert dataset.name == "train-images-idx3-ubyte"
    total = sum(part.sum().item() for part in (dataset.train, dataset.val, dataset.test))
    assert total == images.sum()


def test_images_are_read_from_npz_by_key(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 5), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=np.zeros(30))
    assert data.images_from_file(tmp_path / "mnist.npz", key="x_train").event_shape == (20,)
    with pytest.raises(ValueError, match="one of x_train, y_train, got None"):
        data.images_from_file(tmp_path / "mnist.npz")


@pytest.mark.parametrize("header", ["a,b,c\n", ""])
def test_csv_with_and_without_a_header(tmp_path, header: str) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3)).round(3)
    body = "\n".join(",".join(f"{value:.3f}" for value in row) for row in rows)
    (tmp_path / "table.csv").write_text(header + body + "\n")
    dataset = data.table_from_file(tmp_path / "table.csv")
    assert dataset.event_shape == (3,)
    joined = torch.cat([dataset.train, dataset.val, dataset.test]).double()
    assert joined.sum().item() == pytest.approx(rows.sum(), abs=1e-4)


def test_discrete_columns_can_be_left_out(tmp_path) -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(size=100), rng.integers(0, 3, 100)], axis=1)
    np.savez(tmp_path / "table.npz", rows=rows)
    assert data.table_from_file(tmp_path / "table.npz").event_shape == (2,)
    assert data.table_from_file(tmp_path / "table.npz", min_distinct=0.05).event_shape == (1,)
    with pytest.raises(ValueError, match="more than 100 distinct values, got at most 100"):
        data.table_from_file(tmp_path / "table.npz", min_distinct=1.0)


def test_bad_input_says_expected_and_got(tmp_path) -> None:
    with pytest.raises(ValueError, match="Expected a table among wine.*got 'whine'"):
        data.table("whine")
    with pytest.raises(ValueError, match="Expected a target among two-moons.*got 'moon'"):
        data.target("moon")
    with pytest.raises(FileNotFoundError, match="Expected a file at .*nothing is downloaded"):
        data.images_from_file(tmp_path / "absent.gz")
    (tmp_path / "wrong").write_bytes(b"GIF89a..")
    with pytest.raises(ValueError, match="begins with 0x47494638"):
        data.read_idx(tmp_path / "wrong")
    (tmp_path / "short").write_bytes(idx_bytes(np.zeros((2, 3), dtype=np.uint8))[:-1])
    with pytest.raises(ValueError, match=r"Expected 6 values for shape \(2, 3\), got 5"):
        data.read_idx(tmp_path / "short")
    (tmp_path / "text.csv").write_text("a,b\n1.0,x\n2.0,y\n")
    with pytest.raises(ValueError, match="Expected columns of numbers, got text in b"):
        data.table_from_file(tmp_path / "text.csv")
    with pytest.raises(ValueError, match="Expected finite values in rows, got 1"):
        data.split(np.array([[1.0, math.nan]] * 1 + [[1.0, 2.0]] * 30), "rows")
    with pytest.raises(ValueError, match=r"integers 0..3, got values from 0.0 to 4.0"):
        data.split(np.array([[0.0], [4.0]] * 20), "rows", levels=4)
    with pytest.raises(ValueError, match=r"at least one row each.*got \(5, 0, 0\) of 5"):
        data.split(np.zeros((5, 1)), "rows")
    with pytest.raises(ValueError, match=r"Expected rows of shape .* got \(5,\)"):
        data.split(np.zeros(5), "rows")
