"""What people pass to ``fit``: understood where it can be meant, refused in words where not."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow

X = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))


def flow(**settings):
    torch.manual_seed(0)
    return SplineFlow(2, **{"num_transforms": 1, "hidden_dims": [4], **settings})


def trained(model=None, guide=None, **options):
    model = flow() if model is None else model
    if guide is None:
        options = {"data": X, **options}
    return fit(model, guide, **{"max_steps": 2, "seed": 0, "progress": False, **options})


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def location():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def ends(step):
    if step:
        raise StopIteration
    return X


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"optimizer": pyro.optim.Adam({"lr": 0.1})}, TypeError, "got one of Pyro's: pass torch"),
        (
            {"optimizer": torch.optim.Adam([torch.zeros(1, requires_grad=True)])},
            TypeError,
            "got Adam: pass the class",
        ),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "a Pyro model with a density .* got Linear"),
        ({"model": flow()()}, TypeError, "pass flow, not flow\\(\\)"),
        ({"model": AutoNormal(location), "guide": location}, ValueError, "change their places"),
        ({"model": SplineFlow}, TypeError, r"got the class SplineFlow: .* SplineFlow\(\.\.\.\)"),
        (
            {"model": location, "guide": AutoSplineFlow},
            TypeError,
            "got the class AutoSplineFlow: make one of it first",
        ),
        ({"model": 3}, TypeError, "a model that can be called, got int"),
        ({"model": location, "guide": 3}, TypeError, "a guide that can be called, got int"),
        ({"guide": X}, TypeError, "got Tensor: rows to train on go into data="),
        ({"args": X}, TypeError, "args to be a tuple of arguments, got Tensor"),
        ({"batch_size": 50.0}, TypeError, "batch_size to be an integer, got 50.0"),
        ({"max_steps": 10.5}, TypeError, "max_steps to be an integer, got 10.5"),
        ({"max_steps": True}, TypeError, "max_steps to be an integer, got True"),
        ({"callbacks": [lambda state: None]}, TypeError, "got function without on_start"),
        ({"data": ends}, ValueError, "got StopIteration at step 1"),
        ({"data": np.array(["a", "b"])}, TypeError, "Expected data to hold numbers, got an array"),
        ({"data": pd.DataFrame({"a": [1.0], "b": ["x"]})}, TypeError, "got others: b"),
        ({"data": {"x": X, "z": X}}, ValueError, "first parameters of the model, x, context, got"),
        ({"val_data": "rows.csv"}, TypeError, "Expected val_data to be a tensor"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(options, error, text):
    with pytest.raises(error, match=text):
        trained(**options)


@pytest.mark.parametrize("more", [(X,), (X, X)], ids=["one", "two"])
def test_arguments_after_the_guide_are_told_their_place(more):
    with pytest.raises(TypeError, match=rf"in args, got {len(more)} after .* args=\(x, y\)"):
        fit(location, AutoNormal(location), *more)


@pytest.mark.parametrize(
    "data",
    [X.numpy(), X.double().numpy(), pd.DataFrame(X.numpy()), (X.numpy(),), {"x": X.numpy()}],
    ids=["numpy", "float64", "frame", "tuple", "dict"],
)
def test_arrays_and_frames_are_data(data):
    expected = trained().history["elbo"]
    np.testing.assert_allclose(trained(data=data).history["elbo"], expected, rtol=1e-5)


@pytest.mark.parametrize("data", [X.numpy(), pd.DataFrame(X.numpy())], ids=["numpy", "frame"])
def test_a_flow_takes_scale_and_shift_from_what_it_is_fitted_to(data):
    assert torch.equal(flow().standardize(data).log_prob(X), flow().standardize(X).log_prob(X))


def test_keys_of_a_dict_say_which_argument_is_which():
    y = X @ torch.tensor([1.0, 2.0])
    runs = []
    for data in ((X, y), {"y": y.numpy(), "x": X.numpy()}):
        pyro.clear_param_store()
        runs.append(trained(regression, AutoSplineFlow(regression), data=data, max_steps=3))
    assert (runs[0].history["elbo"] == runs[1].history["elbo"]).all()


def test_series_are_columns():
    column = pd.Series([1.0, 2.0, 3.0])

    def model(x):
        assert x.shape == (3,)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    trained(model, AutoNormal(model), data=column)


def test_fit_trains_where_gradients_are_off():
    with torch.no_grad():
        result = trained()
        assert not torch.is_grad_enabled()
    assert (result.history["elbo"] == trained().history["elbo"]).all()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        trained()


def test_a_folder_that_is_named_like_a_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "step-0000000007.pt").mkdir()
    trained(checkpoint_dir=tmp_path, resume=True)
    assert (tmp_path / "step-0000000007.pt").is_dir()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SplineFlow(2, hidden_dims=64),
        lambda: AutoSplineFlow(location, hidden_dims=64),
        lambda: AmortizedSplineFlow(location, torch.nn.Linear(1, 1), context_dim=1, hidden_dims=64),
    ],
)
def test_a_single_width_is_refused(make):
    with pytest.raises(ValueError, match=r"a sequence of widths, got 64: \[64, 64\]"):
        make()


def test_draws_of_a_shape():
    assert flow().sample((5,)).shape == (5, 2)
    assert flow().sample(torch.Size([3, 4])).shape == (3, 4, 2)
    assert flow().sample(5).shape == (5, 2)


def test_raw_data_beyond_the_bound_are_warned_of_with_the_remedy():
    far = X * torch.tensor([1.0, 1000.0]) + torch.tensor([0.0, 5e4])
    with pytest.warns(UserWarning, match="100% of the rows .* column 1.*flow.standardize"):
        trained(data=far)
    trained(flow().standardize(far), data=far)


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_without_a_density_are_named(batch_size, bad):
    rows = X.clone()
    rows[3, 1] = rows[70, 0] = bad
    with pytest.raises(ValueError, match="finite data, got NaN or inf in 2 of 100 rows: 3, 70"):
        trained(data=rows, batch_size=batch_size)
    with pytest.raises(ValueError, match="finite val_data, got NaN or inf in 2 of 100 rows"):
        trained(val_data=rows, batch_size=batch_size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_a_loader_without_a_density_are_named_in_its_first_epoch(bad):
    rows = X.clone()
    rows[73, 1] = bad
    loader = DataLoader(TensorDataset(rows), batch_size=10)
    with pytest.raises(ValueError, match=r"finite batch 7 of the DataLoader.* 1 of 10 rows: 3"):
        trained(data=loader, max_steps=20)


def missing(y):
    """A model without a density at NaN."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 20, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(z, 1.0, validate_args=False), obs=y)


def masked(y):
    """A model that leaves NaN out by a mask, as in a survey with missing answers."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    known = y.isfinite()
    with pyro.plate("rows", 20, subsample_size=len(y)), poutine.mask(mask=known):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y.masked_fill(~known, 0.0))


def imputed(y):
    """A model that draws what is missing."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    known = y.isfinite()
    with pyro.plate("rows", 20, subsample_size=len(y)):
        filled = y.masked_fill(~known, 0.0)
        pyro.sample("y", dist.Normal(z, 1.0), obs=filled, obs_mask=known)


def imputing_guide(y):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.3))
    with pyro.plate("rows", 20, subsample_size=len(y)):
        pyro.sample("y_unobserved", dist.Normal(torch.zeros(len(y)), 1.0))


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_model_without_a_density_at_some_rows_says_which(batch_size):
    y = torch.zeros(20)
    y[[3, 17]] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or inf in 2 of 20 rows: 3, 17.*obs_mask"):
        trained(missing, AutoNormal(missing), data=y, batch_size=batch_size, max_steps=2)


def validated(y):
    """The same, where Pyro validates."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2000, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore:Expected a start where the model's log-density")
@pytest.mark.parametrize("make", [AutoNormal, AutoSplineFlow])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_what_pyro_refuses_at_some_rows_says_which(make, batch_size):
    y = torch.zeros(2000)  # of so many Pyro's own error shows neither the numbers nor the rows
    y[[333, 1717]] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or inf in 2 of 2000 rows: 333, 1717.*obs_mask"):
        trained(validated, make(validated), data=y, batch_size=batch_size, max_steps=2)


class OfUsers(torch.nn.Module):
    """A module with a density that is no flow of ours; it may know what to do with NaN."""

    def __init__(self, means_them):
        super().__init__()
        self.shift, self.means_them = torch.nn.Parameter(torch.zeros(())), means_them

    def log_prob(self, y):
        known = y.isfinite() if self.means_them else torch.ones_like(y, dtype=torch.bool)
        return known * -0.5 * (torch.where(known, y, 0.0) - self.shift).square()


@pytest.mark.parametrize("as_loader", [False, True])
def test_rows_of_a_module_with_a_density_are_looked_at(as_loader):
    y = torch.zeros(20)
    y[[3, 17]] = torch.nan
    data = DataLoader(TensorDataset(y), batch_size=10) if as_loader else y
    found = (
        "batch 0 of the DataLoader, got NaN or inf in 1 of 10" if as_loader else "data, got .* 2"
    )
    with pytest.raises(ValueError, match=f"finite {found}.*rows: 3"):
        trained(OfUsers(False), data=data)
    assert trained(OfUsers(True), data=data).skipped_steps == 0


@pytest.mark.parametrize("program", [missing, validated])
@pytest.mark.parametrize("row", [3, 17])
def test_rows_of_a_loader_for_a_model_are_named_in_its_first_epoch(program, row):
    y = torch.zeros(20)
    y[row] = torch.nan
    loader = DataLoader(TensorDataset(y), batch_size=5)
    said = (
        rf"finite batch {row // 5} of the DataLoader.* 1 of 5 rows: {row % 5}, at which the model"
    )
    with pytest.raises(ValueError, match=said):
        trained(program, AutoNormal(program), data=loader, max_steps=8, check_plates=False)


@pytest.mark.parametrize("model", [None, missing])
def test_rows_held_out_are_looked_at(model):
    y = torch.zeros(20) if model else X[:20].clone()
    held_out = y.clone()
    held_out[7] = torch.nan
    for val_data, name in (
        (held_out, "val_data, got NaN or inf in 1 of 20 rows: 7"),
        (DataLoader(TensorDataset(held_out), batch_size=5), "batch 1 of val_data, got .* rows: 2"),
    ):
        guide = None if model is None else AutoNormal(model)
        with pytest.raises(ValueError, match=f"Expected finite {name}"):
            trained(model, guide, data=y, val_data=val_data, max_steps=3)


def test_rows_of_a_loader_that_a_model_means_go_on():
    y = torch.zeros(20)
    y[[3, 17]] = torch.nan
    loader = DataLoader(TensorDataset(y), batch_size=5)
    result = trained(masked, AutoNormal(masked), data=loader, val_data=loader, max_steps=8)
    assert result.skipped_steps == 0 and len(result.history["elbo"]) == 8


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize(("model", "guide"), [(masked, None), (imputed, imputing_guide)])
def test_a_model_that_means_its_missing_numbers_goes_on(model, guide, batch_size):
    y = torch.zeros(20)
    y[[3, 17]] = torch.nan
    own = AutoNormal(model) if guide is None else guide
    result = trained(model, own, data=y, batch_size=batch_size, max_steps=8)
    assert result.skipped_steps == 0 and len(result.history["elbo"]) == 8
