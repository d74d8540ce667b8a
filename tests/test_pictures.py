"""What trained things look like: the plots of flows and guides, and a result in a notebook."""

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AutoSplineFlow
from tests.tiny import TINY

matplotlib.use("Agg")


@pytest.fixture
def close_all():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def label_of_legend(panels):
    return [text.get_text() for text in panels[0, -1].get_legend().get_texts()]


def model():
    a = pyro.sample("a", dist.Normal(3.0, 0.1))
    pyro.sample("b", dist.Normal(torch.zeros(2), a).to_event(1))


@pytest.mark.usefixtures("close_all")
def test_a_flow_is_drawn_over_its_data():
    torch.manual_seed(0)
    data = torch.randn(300, 2) + 5.0
    panels = SplineFlow(2, **TINY).standardize(data).plot(data, num_samples=200)
    assert panels.shape == (2, 2)
    assert label_of_legend(panels) == ["data", "flow"]
    assert 4.5 < np.mean(panels[1, 0].get_xlim()) < 5.5
    assert panels[1, 0].get_ylabel() == "x[1]"


@pytest.mark.usefixtures("close_all")
def test_a_flow_is_drawn_alone_and_given_a_context():
    panels = SplineFlow(2, 3, **TINY).plot(context=torch.zeros(3), num_samples=50)
    assert label_of_legend(panels) == ["flow"]


@pytest.mark.usefixtures("close_all")
def test_a_guide_is_drawn_over_the_latents_that_a_reference_has():
    torch.manual_seed(0)
    guide = AutoSplineFlow(model, **TINY).setup()
    alone = guide.plot(num_samples=50)
    assert [alone[-1, i].get_xlabel() for i in range(3)] == ["a", "b[0]", "b[1]"]
    over = guide.plot({"b": torch.randn(100, 2), "other": torch.zeros(100)}, num_samples=50)
    assert [over[-1, i].get_xlabel() for i in range(2)] == ["b[0]", "b[1]"]
    assert label_of_legend(over) == ["reference", "guide"]
    with pytest.raises(ValueError, match=r"latents \['a', 'b'\] in the reference, got \['c'\]"):
        guide.plot({"c": torch.zeros(3)})


def test_a_notebook_shows_why_a_fit_stopped_and_what_it_reached():
    data = torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
    flow = SplineFlow(1, **TINY)
    result = fit(flow, data=data, val_fraction=0.5, max_steps=20, seed=0, progress=False)
    result.notes = ("a < b",)
    shown = result._repr_html_()
    best = f"{result.validation['elbo'].max():.5g} nats, the best"
    for part in ("max_steps", f"20; the state of step {result.best_step}", best, "a &lt; b"):
        assert part in shown
    assert "gap" not in shown and "left out" not in shown
