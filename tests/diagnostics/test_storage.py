"""Trees written with one generation of ArviZ open with the other, as netCDF and as zarr.

``data/arviz_0.nc`` and ``data/arviz_1.nc`` were written by ``python tests/diagnostics/test_storage.py``
where ArviZ 0.23.4 and 1.3.0 were installed; both are read with whichever is installed here.
"""

import functools
import importlib.metadata
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

from pyro_flowkit.diagnostics import (
    diagnose,
    from_svi,
    loo_approximate_posterior,
    reweight,
    simulation_based_calibration,
    to_arviz,
)

DATA = Path(__file__).parent / "data"
ARVIZ_MAJOR = int(importlib.metadata.version("arviz").split(".")[0])
HISTORY = {"step": np.arange(3), "elbo": np.array([-9.0, -8.0, -7.5]), "seconds": np.arange(3.0)}
Y = torch.tensor([[0.9, 0.1], [-0.3, 1.0], [1.7, 0.2]], dtype=torch.float64)


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def guide(y):
    loc = y.sum(0) / 4 + 0.1
    pyro.sample("mu", dist.Normal(loc, torch.full_like(loc, 0.55)).to_event(1))


def make_tree():
    options = {"coords": {"row": ["a", "b", "c"]}, "dims": {"mu": ["axis"], "y": ["axis"]}}
    return from_svi(model, guide, args=(Y,), num_samples=100, history=HISTORY, seed=0, **options)


@functools.cache
def make_trees():
    tree = make_tree()
    return {
        "fit": tree,
        "reweighted": reweight(tree, seed=0),
        "calibration": simulation_based_calibration(
            model, guide, args=(Y,), num_simulations=20, num_samples=50, seed=0
        ),
    }


def assert_same(back, tree):
    """``back`` is a DataTree, or an InferenceData."""
    groups = back.children if isinstance(back, xr.DataTree) else back.groups()
    assert set(groups) == set(tree.children)
    for name, node in tree.children.items():
        stored = back[name].to_dataset() if isinstance(back, xr.DataTree) else back[name]
        xr.testing.assert_equal(stored, node.to_dataset())
        assert set(node.attrs) <= set(stored.attrs)
        for key, value in node.attrs.items():
            np.testing.assert_array_equal(stored.attrs[key], value)


@pytest.mark.parametrize("kind", ["fit", "reweighted", "calibration"])
def test_groups_are_flat_and_hold_what_netcdf_and_both_arviz_know(kind):
    for node in make_trees()[kind].children.values():
        assert not node.children
        everything = [node.attrs, *(v.attrs for v in node.to_dataset().variables.values())]
        for attrs in everything:
            for value in attrs.values():
                items = value if isinstance(value, list) else [value]
                assert items and all(type(item) in (str, int, float) for item in items)
        for values in node.to_dataset().variables.values():
            assert values.dtype.kind in "ifU"


@pytest.mark.parametrize("kind", ["fit", "reweighted", "calibration"])
def test_netcdf_by_xarray_and_by_arviz_are_one_format(tmp_path, kind):
    import arviz

    tree = make_trees()[kind]
    tree.to_netcdf(tmp_path / "xarray.nc")
    to_arviz(tree).to_netcdf(str(tmp_path / "arviz.nc"))
    for path in tmp_path.iterdir():
        with xr.open_datatree(path) as stored:
            assert_same(stored.load(), tree)
        back = arviz.from_netcdf(str(path))
        assert_same(back, tree)
        if ARVIZ_MAJOR >= 1:
            back.close()


def test_zarr(tmp_path):
    pytest.importorskip("zarr", reason="zarr is optional and not installed")
    tree = make_tree()
    tree.to_zarr(tmp_path / "fit.zarr", zarr_format=2)
    with xr.open_datatree(tmp_path / "fit.zarr", engine="zarr") as stored:
        assert_same(stored.load(), tree)


@pytest.mark.parametrize("reader", ["xarray", "arviz"])
@pytest.mark.parametrize("written_by", ["0", "1"])
def test_files_of_both_generations_of_arviz_open_here(reader, written_by):
    import arviz

    path = str(DATA / f"arviz_{written_by}.nc")
    if reader == "xarray":
        with xr.open_datatree(path) as stored:
            tree = stored.load()
    else:
        data = arviz.from_netcdf(path)
        tree = data if ARVIZ_MAJOR >= 1 else data.to_datatree()
        tree = tree.load()
    assert tree["posterior"]["mu"].dims == ("chain", "draw", "axis")
    assert list(tree["log_likelihood"]["row"].values) == ["a", "b", "c"]
    assert list(tree["posterior"].attrs["sample_dims"]) == ["chain", "draw"]
    assert list(tree["vi_trace"].attrs["sample_dims"]) == ["chain", "step"]
    assert diagnose(tree).level in ("good", "usable")
    assert tree["vi_diagnostics"]["elbo"].attrs["kind"] == "lower bound"
    fresh = make_tree()
    xr.testing.assert_allclose(tree["posterior"].to_dataset(), fresh["posterior"].to_dataset())
    assert loo_approximate_posterior(tree).mcse == pytest.approx(
        loo_approximate_posterior(fresh).mcse
    )
    summary = arviz.summary(to_arviz(tree), kind="stats")
    assert list(summary.index) == ["mu[0]", "mu[1]"]
    tree.close()


def test_a_stored_calibration_keeps_its_verdict(tmp_path):
    tree = make_trees()["calibration"]
    tree.to_netcdf(tmp_path / "sbc.nc")
    with xr.open_datatree(tmp_path / "sbc.nc") as stored:
        assert diagnose(stored) == diagnose(tree)


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    to_arviz(make_tree()).to_netcdf(str(DATA / f"arviz_{ARVIZ_MAJOR}.nc"))
