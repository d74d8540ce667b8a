"""Bounds and exact values per datum: plates, masks, scales, batches."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_flowkit.diagnostics import heldout_log_prob, pointwise_bounds
from pyro_flowkit.flows import SplineFlow
from tests.tiny import calm_

DATA = torch.linspace(-2.0, 2.0, 7, dtype=torch.float64)


def local_model(x):
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1): x_i ~ N(0, 2)."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def exact(x):
    return dist.Normal(torch.zeros_like(x), math.sqrt(2.0)).log_prob(x)


def bounds_of(model=local_model, guide=local_guide, data=DATA, **options):
    options = {"num_samples": 1000, "seed": 0} | options
    return pointwise_bounds(model, guide, data, **options)


def assert_exact(bounds, expected):
    expected = expected.numpy()
    error = np.abs(bounds["log_evidence"] - expected) / bounds["log_evidence_se"]
    assert float(error.max()) < 4
    assert (bounds["elbo"] - 3 * bounds["elbo_se"] < expected).all()


def test_every_datum_has_its_own_numbers():
    bounds = bounds_of()
    assert bounds["elbo"].dims == ("obs_id",) and bounds["iwae"].dims == ("obs_id", "n_particles")
    assert set(bounds.data_vars) == {
        *("elbo", "elbo_se", "iwae", "iwae_se", "log_evidence", "log_evidence_se"),
        *("pareto_k", "pareto_k_sd", "ess", "log_ess_se", "largest_weight", "num_draws", "gap_se"),
    }
    assert_exact(bounds, exact(DATA))


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 6, "chunk_size": 400}])
def test_batches_and_chunks_do_not_change_the_answer(options):
    bounds = bounds_of(**options)
    assert bounds.sizes["obs_id"] == 7
    assert_exact(bounds, exact(DATA))


def test_the_scale_of_the_plate_and_of_annealing_is_left_out():
    def scaled_model(x):
        with pyro.plate("rows", 7000, subsample=x):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def scaled_guide(x):
        with pyro.plate("rows", 7000, subsample=x):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    scaled = bounds_of(scaled_model, scaled_guide)
    np.testing.assert_allclose(scaled["elbo"], bounds_of()["elbo"], rtol=1e-12)


def test_masks_count():
    def masked_model(x, seen):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)

    def masked_guide(x, seen):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    seen = DATA > 0
    bounds = bounds_of(masked_model, masked_guide, (DATA, seen), batch_size=4)
    assert_exact(bounds.sel(obs_id=seen.numpy()), exact(DATA[seen]))
    np.testing.assert_allclose(bounds["elbo"].sel(obs_id=~seen.numpy()), 0.0, atol=1e-12)


def test_plates_inside_the_datum_are_summed():
    data = DATA.repeat(2, 1).T * torch.tensor([1.0, 0.5], dtype=torch.float64)

    def pixel_model(x):
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def pixel_guide(x):
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", 2, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    bounds = bounds_of(pixel_model, pixel_guide, data)
    assert_exact(bounds, exact(data).sum(-1))
    assert bounds.attrs["event_size"] == 2
    with pytest.raises(ValueError, match=r"\['pixels', 'rows'\]: choose with plate="):
        bounds_of(pixel_model, pixel_guide, data[:2])
    assert_exact(
        bounds_of(pixel_model, pixel_guide, data[:2], plate="rows"), exact(data[:2]).sum(-1)
    )


def test_a_global_latent_is_refused_by_name():
    def global_model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def global_guide(x):
        pyro.sample("loc", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        local_guide(x)

    with pytest.raises(ValueError, match="'loc' of the model.*'loc' of the guide.*global latent"):
        bounds_of(global_model, global_guide)


def test_a_plate_of_another_size_is_refused():
    def wrong_model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def wrong_guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))

    with pytest.raises(ValueError, match="plate over the data of size 7, got none"):
        bounds_of(wrong_model, wrong_guide)


def test_sites_that_hold_no_density_may_be_anywhere():
    def annotated_model(x):
        pyro.deterministic("half", torch.tensor(0.5))
        local_model(x)

    np.testing.assert_allclose(bounds_of(annotated_model)["elbo"], bounds_of()["elbo"])


def test_models_that_cannot_be_vectorised_still_give_the_answer():
    def loop_model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            mean = torch.stack([z[i] if z[i].item() > -9.0 else z[i] for i in range(len(x))])
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    with pytest.warns(UserWarning, match="one by one") as caught:
        bounds = bounds_of(loop_model, num_samples=300, batch_size=4)
    assert len(caught) == 1  # said once, not once per batch
    assert_exact(bounds, exact(DATA))


def test_methods_of_a_module_run_in_eval_mode():
    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def model(self, x):
            local_model(self.dropout(x))

        def guide(self, x, scale):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(self.dropout(x) / 2, scale))

    program = Program()
    bounds = bounds_of(program.model, functools.partial(program.guide, scale=0.8))
    np.testing.assert_allclose(bounds["elbo"], bounds_of()["elbo"])
    assert program.dropout.training


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_densities_that_are_no_numbers_are_refused():
    def broken_model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            nothing = dist.Unit(torch.where(x > 1.5, z * math.nan, z), validate_args=False)
            pyro.sample("x", nothing, obs=x.new_empty((len(x), 0)))

    with pytest.raises(ValueError, match="1000 of 7000 that are NaN"):
        bounds_of(broken_model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.tensor([0.0, math.nan, 1.0]), "in 1 of 3 rows"),
        (torch.zeros(0), r"lengths \[0\]"),
        ((torch.zeros(3), torch.zeros(4)), r"lengths \[3, 4\]"),
        (np.zeros(3), "ndarray"),
        (torch.tensor(1.0), r"\(\)"),
    ],
)
def test_bad_data_are_refused_with_numbers(data, message):
    with pytest.raises(ValueError, match=message):
        bounds_of(data=data)


class Density(nn.Module):
    """Stands in for a flow."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_prob(self, x, context=None):
        self.rows.append(len(x))
        loc = 0.0 if context is None else context
        return torch.distributions.Normal(loc, 1.0).log_prob(x).sum(-1)


def test_heldout_values_are_exact_in_batches():
    flow, data = Density(), torch.randn(10, 3)
    scores = heldout_log_prob(flow, data, batch_size=4)
    assert flow.rows == [4, 4, 2]
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(data).sum(-1)
    np.testing.assert_allclose(scores["log_prob"], expected.numpy(), rtol=1e-6)
    assert scores["log_prob"].attrs["kind"] == scores.attrs["kind_log_prob"] == "exact"
    assert scores.attrs["event_size"] == 3


def test_heldout_values_take_a_context_per_row():
    data = torch.randn(10, 3)
    scores = heldout_log_prob(Density(), data, context=data, batch_size=4)
    np.testing.assert_allclose(scores["log_prob"], -1.5 * math.log(2 * math.pi), rtol=1e-6)


def test_heldout_refuses_what_is_no_density_of_rows():
    class Summed(Density):
        def log_prob(self, x, context=None):
            return super().log_prob(x).sum()

    class Broken(Density):
        def log_prob(self, x, context=None):
            return super().log_prob(x) * math.nan

    with pytest.raises(ValueError, match=r"shape \(10,\), got \(\)"):
        heldout_log_prob(Summed(), torch.zeros(10, 3))
    with pytest.raises(ValueError, match="NaN in 10 rows"):
        heldout_log_prob(Broken(), torch.zeros(10, 3))
    with pytest.raises(ValueError, match="in 1 of 10 rows"):
        heldout_log_prob(Density(), torch.zeros(10, 3).index_fill(0, torch.tensor([4]), math.inf))


def perturbed_flow(*args, **kwargs):
    flow = SplineFlow(*args, num_transforms=2, hidden_dims=[8], **kwargs).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if flow.affine is not None:
        calm_(flow.affine)
    return flow


def test_heldout_values_of_a_flow_are_its_log_prob():
    flow, data = perturbed_flow(2), torch.randn(9, 2, dtype=torch.float64)
    scores = heldout_log_prob(flow, data, batch_size=4)
    np.testing.assert_allclose(scores["log_prob"], flow.log_prob(data).detach(), rtol=1e-12)


def test_a_flow_as_posterior_is_vectorised_over_particles():
    flow = perturbed_flow(2, 2)
    data = torch.randn(6, 2, dtype=torch.float64)

    def flow_model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 2.0).to_event(1), obs=x)

    def flow_guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", flow(x))

    bounds = bounds_of(flow_model, flow_guide, data, vectorize=True, num_samples=2000)
    assert_exact(bounds, dist.Normal(0.0, math.sqrt(5.0)).log_prob(data).sum(-1))
