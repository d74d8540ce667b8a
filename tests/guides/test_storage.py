"""A guide in a file comes back as it was, for its own model and for no other."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training import DamagedFileError, FitResult

Y = torch.tensor([1.0, 0.5, 2.0])
TINY = {"num_transforms": 1, "hidden_dims": [4], "count_bins": 4}


def model(y=Y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.ones((), dtype=y.dtype)))
    with pyro.plate("rows", 3):
        theta = pyro.sample("theta", dist.Normal(mu, sigma))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def moved(guide):
    """The guide with other parameters than a fresh one has."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return guide


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"base": "student_t", "affine": "diagonal", "hierarchical": False, "init_scale": 0.3},
        {"affine": "low_rank", "bound": 6.0, "path_gradient": False},
        {"num_components": 2},
    ],
    ids=["defaults", "student_t", "low_rank", "mixture"],
)
def test_a_guide_comes_back_as_it_was(tmp_path, settings):
    guide = moved(AutoSplineFlow(model, **TINY, **settings).setup())
    guide.save(tmp_path / "a.guide")
    pyro.clear_param_store()
    again = AutoSplineFlow.load(tmp_path / "a.guide", model)
    values = {name: value[:5] for name, value in guide.sample(5).items()}
    assert torch.equal(again.log_prob(values), guide.log_prob(values))
    assert again._settings() == guide._settings()
    assert again.path_gradient == guide.path_gradient


def test_arguments_dtype_and_a_guide_that_is_still_alive(tmp_path):
    guide = moved(AutoSplineFlow(model, **TINY).setup(Y.double()))
    guide.save(tmp_path / "a.guide")
    again = AutoSplineFlow.load(
        tmp_path / "a.guide", model, args=(Y.double(),)
    )  # without a warning
    assert again.median()["mu"].dtype == torch.float64
    assert torch.equal(again.median()["theta"], guide.median()["theta"])
    converted = AutoSplineFlow.load(tmp_path / "a.guide", model)  # a model in single precision
    assert torch.equal(converted.median()["theta"], guide.median()["theta"])


def without_theta():
    pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.sample("sigma", dist.HalfNormal(1.0))


def other_support(y=Y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("theta", dist.Normal(mu, sigma.exp()))


def other_size(y=Y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("rows", 4):
        pyro.sample("theta", dist.Normal(mu, sigma))


def other_order(y=Y):
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", 3):
        pyro.sample("theta", dist.Normal(mu, sigma))


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (without_theta, r"got mu \(\) Real, sigma \(\) GreaterThanEq$"),
        (other_support, r"got mu \(\) Real, sigma \(\) Real, theta \(3,\) Real$"),
        (other_size, r"theta \(3,\) Real, got .*theta \(4,\) Real$"),
        (other_order, r"got sigma \(\) GreaterThanEq, mu"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_model_is_refused(tmp_path, wrong, got):
    AutoSplineFlow(model, **TINY).setup().save(tmp_path / "a.guide")
    with pytest.raises(
        ValueError, match="Expected a model with the latents of the file, mu.*" + got
    ):
        AutoSplineFlow.load(tmp_path / "a.guide", wrong)


def masked(seen):
    with pyro.plate("rows", 3), pyro.poutine.mask(mask=seen):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=Y)


def test_a_model_that_masks_other_latents_is_refused(tmp_path):
    guide = AutoSplineFlow(masked, **TINY).setup(torch.tensor([True, True, False]))
    guide.save(tmp_path / "a.guide")
    with pytest.raises(ValueError, match="may mask other latents"):
        AutoSplineFlow.load(
            tmp_path / "a.guide", masked, args=(torch.tensor([True, False, False]),)
        )


def test_a_file_of_something_else_and_a_guide_without_parameters_are_refused(tmp_path):
    (tmp_path / "noise").write_bytes(b"noise")
    with pytest.raises(DamagedFileError, match="Expected a guide that PyTorch can read"):
        AutoSplineFlow.load(tmp_path / "noise", model)
    history = {name: torch.zeros(0).numpy() for name in ("step", "elbo")}
    result = FitResult(torch.nn.Linear(1, 1), None, history, "max_steps", 0, 0)
    result.save(tmp_path / "result")
    with pytest.raises(
        DamagedFileError, match="Expected a guide of pyro_flowkit, got 'fit result'"
    ):
        AutoSplineFlow.load(tmp_path / "result", model)
    with pytest.raises(RuntimeError, match="has no parameters yet"):
        AutoSplineFlow(model).save(tmp_path / "a.guide")


def test_the_file_holds_nothing_that_can_be_executed(tmp_path):
    AutoSplineFlow(model, **TINY).setup().save(tmp_path / "a.guide")
    content = torch.load(tmp_path / "a.guide", weights_only=True)
    assert [name for name, *_ in content["latents"]] == ["mu", "sigma", "theta"]
