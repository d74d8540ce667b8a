"""From names to batches: official splits, binarisation, noise that is fresh in every batch."""

import gzip
import struct

import numpy as np
import pytest
import torch

from models.vae.data import FreshBatches, greyness, load_split, prepare

SIDE = 4


def images(n, seed, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (n, SIDE, SIDE), dtype=np.uint8)


def black_and_white(n, seed):
    """Nearly: one pixel in twenty is grey."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((n, SIDE, SIDE)) < 0.2, 255, 0)
    return np.where(rng.random(x.shape) < 0.05, 100, x).astype(np.uint8)


def write_idx(path, array):
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def npz(tmp_path):
    train, test = black_and_white(60, 0), black_and_white(12, 1)
    path = tmp_path / "pixels.npz"
    np.savez(path, x_train=train, y_train=np.zeros(60), x_test=test, y_test=np.zeros(12))
    return path, train, test


def check_official(name, train, test, key=None):
    dataset, shape = load_split(str(name), key)
    assert torch.equal(dataset.test, torch.from_numpy(test.reshape(len(test), -1)))
    held = torch.cat([dataset.train, dataset.val])
    assert len(dataset.val) == len(train) // 10
    expected = torch.from_numpy(train.reshape(len(train), -1))
    assert sorted(map(tuple, held.tolist())) == sorted(map(tuple, expected.tolist()))
    assert (shape, dataset.levels) == ((SIDE, SIDE), 256)


def test_an_npz_file_brings_its_official_test_rows(npz, tmp_path):
    path, train, test = npz
    check_official(path, train, test)
    np.savez(tmp_path / "other.npz", my_train=train, my_test=test, more=test)
    check_official(tmp_path / "other.npz", train, test, key="my_train")
    dataset, _ = load_split(str(tmp_path / "other.npz"), "more")
    assert sum(len(part) for part in (dataset.train, dataset.val, dataset.test)) == len(test)
    with pytest.raises(ValueError, match="one of my_train, my_test, more, got None"):
        load_split(str(tmp_path / "other.npz"))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_are_found_beside_each_other(tmp_path, ending):
    train, test = images(60, 0), images(12, 1)
    write_idx(tmp_path / f"train-images-idx3-ubyte{ending}", train)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{ending}", test)
    check_official(tmp_path, train, test)
    check_official(tmp_path / f"train-images-idx3-ubyte{ending}", train, test)
    (tmp_path / f"t10k-images-idx3-ubyte{ending}").unlink()
    dataset, _ = load_split(str(tmp_path / f"train-images-idx3-ubyte{ending}"))
    assert len(dataset.test) == 6  # of the only file there is
    with pytest.raises(FileNotFoundError, match="train-images"):
        (tmp_path / "empty").mkdir()
        load_split(str(tmp_path / "empty"))


def test_a_single_array_of_images_is_split_at_random(tmp_path):
    np.savez(tmp_path / "faces.npz", x=images(40, 0))
    dataset, shape = load_split(str(tmp_path / "faces.npz"))
    assert (len(dataset.test), shape, dataset.levels) == (4, (SIDE, SIDE), 256)


def test_the_likelihood_is_chosen_by_the_data(npz, tmp_path):
    np.savez(tmp_path / "grey.npz", x=images(40, 0))
    np.savez(tmp_path / "binary.npz", x_train=images(40, 0, 0, 2), x_test=images(9, 1, 0, 2))
    chosen = {
        name: prepare(name)
        for name in (str(npz[0]), str(tmp_path / "grey.npz"), str(tmp_path / "binary.npz"), "wine")
    }
    nearly, grey, binary, wine = chosen.values()
    assert (nearly.likelihood, grey.likelihood) == ("bernoulli", "logistic")
    assert (binary.likelihood, wine.likelihood) == ("bernoulli", "normal")
    assert "dynamic" in nearly.unit and "dynamic binarisation" in nearly.why
    kinds = [prepared.standardization for prepared in chosen.values()]
    assert kinds == ["centre", "common", "centre", "columns"]
    assert torch.equal(binary.test, torch.from_numpy(images(9, 1, 0, 2).reshape(9, -1)).float())
    assert binary.unit == "binary pixels" and "bernoulli" in binary.why
    explicit = prepare(str(npz[0]), binarisation="none", likelihood="normal")
    assert explicit.why == "" and explicit.levels == 256


def test_greyness_is_zero_for_black_and_white_and_one_for_a_single_grey():
    assert greyness(torch.tensor([[0.0, 255.0, 255.0]]), 256) == pytest.approx(0.0, abs=1e-6)
    assert greyness(torch.full((3, 2), 100.0), 256) == pytest.approx(1.0)


def test_dynamic_binarisation_draws_anew_in_every_batch_and_keeps_the_mean(npz):
    path, train, _ = npz
    prepared = prepare(str(path), binarisation="dynamic", batch_size=54)
    epochs = torch.stack([prepared.batches(step) for step in range(200)])
    assert set(epochs.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(epochs[0].mean(0), epochs[1].mean(0))
    expected = prepared.batches.rows.float().mean(0) / 255
    torch.testing.assert_close(epochs.mean((0, 1)), expected, atol=0.03, rtol=0)
    again = prepare(str(path), binarisation="dynamic", batch_size=54)
    assert torch.equal(prepared.val, again.val) and torch.equal(prepared.test, again.test)


@pytest.mark.parametrize("binarisation", ["static", "threshold"])
def test_static_pixels_are_the_same_in_every_epoch(npz, binarisation):
    prepared = prepare(str(npz[0]), binarisation=binarisation, batch_size=54)
    one, other = (prepared.batches(step) for step in (0, 1))
    assert not torch.equal(one, other)  # another order
    assert sorted(map(tuple, one.tolist())) == sorted(map(tuple, other.tolist()))
    assert set(one.unique().tolist()) == {0.0, 1.0}
    if binarisation == "threshold":
        grey = torch.from_numpy(npz[2].reshape(12, -1))
        assert torch.equal(prepared.test, (grey > 127).float())


def test_dequantisation_noise_is_fresh_in_every_batch_and_stays_in_its_cell():
    prepared = prepare("digits", likelihood="normal", batch_size=2000)
    one, other = (prepared.batches(step) for step in (0, 1))
    assert one.shape == prepared.batches.rows.shape  # no copies are stored

    def cells(batch):
        return sorted(map(tuple, batch.floor().tolist()))

    assert cells(one) == cells(other) == cells(prepared.batches.rows)
    noise = torch.sort((one - one.floor()).flatten()).values
    assert not torch.equal(noise, torch.sort((other - other.floor()).flatten()).values)
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.01) and noise.max() < 1
    assert prepared.unit == "integer levels 0 to 16 with uniform noise"


def test_batches_are_a_function_of_seed_and_step():
    rows = torch.arange(20.0)[:, None]

    def noisy(x, generator):
        return x + torch.rand(x.shape, generator=generator)

    one, two, other = (FreshBatches(rows, noisy, 8, seed) for seed in (0, 0, 1))
    ahead = one(7)
    assert torch.equal(one(2), two(2)) and torch.equal(two(7), ahead)
    assert not torch.equal(other(2), two(2))
    epoch = torch.cat([one(0), one(1)]).floor()
    assert len(epoch.unique()) == 16 and one.per_epoch == 2


def test_data_that_do_not_fit_say_expected_and_got(npz):
    with pytest.raises(ValueError, match="integer levels to binarise, got wine"):
        prepare("wine", binarisation="dynamic")
    with pytest.raises(ValueError, match="binary pixels for the bernoulli likelihood, got.*digits"):
        prepare("digits", binarisation="none", likelihood="bernoulli")
    with pytest.raises(ValueError, match="levels for the logistic likelihood, got wine"):
        prepare("wine", likelihood="logistic")
    with pytest.raises(FileNotFoundError, match="got 'absent.npz'"):
        prepare("absent.npz")
