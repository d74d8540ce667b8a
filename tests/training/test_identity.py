"""A resumed fit is that very fit, or an error that says what differs."""

import inspect
import re
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training import Callback, CsvTracker

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
SMALL = {"num_transforms": 1, "hidden_dims": [4], "count_bins": 4}
CALL = {
    "data": X,
    "val_data": X[:7],
    "batch_size": 8,
    "max_steps": 4,
    "lr": 0.01,
    "scheduler": "cosine",
    "seed": 0,
    "progress": False,
}


def trained(folder, *, flow=None, **changes):
    pyro.clear_param_store()
    torch.manual_seed(0)
    made = SplineFlow(2, **{**SMALL, **(flow or {})})
    return fit(made, checkpoint_dir=folder, resume=True, **{**CALL, **changes})


BOUND = [
    ({"data": X + 1.0}, "contents of data"),
    ({"data": X.double()}, "contents of data"),
    ({"val_data": X[:8]}, "contents of validation data"),
    ({"val_data": None, "val_fraction": 0.2}, "number of data"),
    ({"batch_size": 10}, "batch_size"),
    ({"seed": 1}, "seed"),
    ({"lr": 0.02}, "lr"),
    ({"scheduler": "constant"}, "scheduler"),
    ({"optimizer": torch.optim.SGD}, "optimizer"),
    ({"clip_norm": 1.0}, "clip_norm"),
    ({"average": 0.9}, "average"),
    ({"non_finite": "raise"}, "non_finite"),
    ({"restore_best": False}, "restore_best"),
    ({"flow": {"num_transforms": 2}}, "structure of model and guide"),
    ({"flow": {"bound": 4.0}}, "structure of model and guide"),
    ({"flow": {"count_bins": 5}}, "structure of model and guide"),
    ({"flow": {"tails": "circular", "mixing": None}}, "structure of model and guide"),
]
BOUND_OF_GUIDES = [
    ({"args": (torch.full((5,), 20.0),)}, "args"),
    ({"kwargs": {"scale": 2.0}}, "kwargs"),
    ({"num_particles": 4}, "num_particles"),
    ({"objective": TraceGraph_ELBO(128)}, "objective"),
    ({"kl_schedule": (0.5, 0.5)}, "kl_schedule"),
]
FREE = [
    {"max_steps": 6},
    {"max_steps": None, "max_epochs": 2},
    {"max_seconds": 60.0},
    {"patience": 3},
    {"callbacks": [Callback()]},
    {"checkpoint_every": 0.0},
    {"progress": True},
    {"device": "cpu"},
    {"check_plates": False},
]
FREE_OF_GUIDES = [{"tolerance": 0.5}, {"restarts": 2}]
ELSEWHERE = {
    "model": "test_another_model_is_another_fit",
    "guide": "test_another_model_is_another_fit",
    "trackers": "test_trackers_may_differ",
    "compile": "takes half a minute",
    "checkpoint_dir": "where it is",
    "resume": "what is tried",
}


@pytest.mark.parametrize(("changes", "name"), BOUND)
def test_another_fit_is_not_resumed(tmp_path, changes, name):
    trained(tmp_path)
    with pytest.raises(ValueError, match=f"by, with {name} = .*, got"):
        trained(tmp_path, **changes)


@pytest.mark.parametrize("changes", FREE)
def test_limits_and_listeners_may_differ(tmp_path, changes):
    trained(tmp_path)
    assert len(trained(tmp_path, **changes).history["step"]) >= 4


def test_every_argument_of_fit_is_bound_or_free():
    bound, free = ([*BOUND, *BOUND_OF_GUIDES], [*FREE, *FREE_OF_GUIDES])
    tried = {name for changes, _ in bound for name in changes} - {"flow"}
    tried |= {name for changes in free for name in changes} | set(ELSEWHERE)
    assert tried == set(inspect.signature(fit).parameters)


def test_the_docstring_lists_what_is_free():
    listed = inspect.getdoc(fit).partition("Free are ")[2].partition(".")[0]
    free = {name for changes in [*FREE, *FREE_OF_GUIDES] for name in changes}
    words = set(re.findall(r"\w+", listed)) - {"and", "each", "start", "has", "a", "folder"}
    assert words == free | {"trackers", "compile"}


def test_trackers_may_differ(tmp_path):
    trained(tmp_path / "run")
    trained(tmp_path / "run", max_steps=6, trackers=[CsvTracker(tmp_path / "history.csv")])
    assert (tmp_path / "history.csv").exists()


def location(y, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


ZEROS = (torch.zeros(5),)


def guided(folder, model=location, args=ZEROS, **changes):
    pyro.clear_param_store()
    return fit(
        model,
        AutoSplineFlow(model, **SMALL),
        args=args,
        **{"max_steps": 4, "seed": 0, "progress": False, **changes},
        checkpoint_dir=folder,
        resume=True,
    )


@pytest.mark.parametrize(("changes", "name"), BOUND_OF_GUIDES)
def test_another_fit_of_a_guide_is_not_resumed(tmp_path, changes, name):
    guided(tmp_path)
    with pytest.raises(ValueError, match=f"by, with {name} = .*, got"):
        guided(tmp_path, **changes)


@pytest.mark.parametrize("changes", FREE_OF_GUIDES)
def test_stops_and_starts_of_a_guide_may_differ(tmp_path, changes):
    guided(tmp_path)
    assert guided(tmp_path, **changes).stop_reason in ("max_steps", "tolerance")


def test_another_model_is_another_fit(tmp_path):
    def other(y):
        location(y)

    guided(tmp_path)
    with pytest.raises(ValueError, match="by, with model and guide = location, .*other"):
        guided(tmp_path, other)


def with_data(y):
    def model():
        location(y)

    return model


def test_what_a_model_takes_from_elsewhere_counts(tmp_path):
    guided(tmp_path, with_data(torch.zeros(5)), args=())
    guided(tmp_path, with_data(torch.zeros(5)), args=(), max_steps=5)
    with pytest.raises(ValueError, match="whose objective there is .* got another one"):
        guided(tmp_path, with_data(torch.full((5,), 20.0)), args=(), max_steps=6)


def test_other_versions_are_named(tmp_path, monkeypatch):
    trained(tmp_path)
    module = sys.modules["pyro_flowkit.training.plan"]
    now = module.versions()
    monkeypatch.setattr(module, "versions", lambda: {**now, "numpy": "0.1"})
    with pytest.raises(ValueError, match="numpy .*, got 0.1: .* resume=False begins anew"):
        trained(tmp_path, max_steps=6)
