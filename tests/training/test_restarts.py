import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training import CsvTracker, FitResult

SMALL = {"num_transforms": 1, "hidden_dims": [4]}


def two_modes():
    """3/10 of the mass around -6, 7/10 around 6; under a prior so wide that its draws come to both."""
    zero = torch.zeros((), dtype=torch.float64)
    x = pyro.sample("x", dist.Normal(zero, 10.0))
    each = torch.stack([-0.5 * (x + 6.0).square(), -0.5 * (x - 6.0).square()], -1)
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    flat = dist.Normal(zero, 10.0).log_prob(x)
    density = (each + shares).logsumexp(-1) - 0.5 * math.log(2 * math.pi)
    pyro.factor("likelihood", density - flat)


def fitted(count=4, **options):
    guide = AutoSplineFlow(two_modes, **SMALL)
    options = {"max_steps": 20, "seed": 0, "progress": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*separate modes")  # that the first start finds
        return fit(two_modes, guide, restarts=count, **options)


def test_result_knows_the_evidence_of_every_mode_and_keeps_the_largest():
    result = fitted()
    assert [restart.number for restart in result.restarts] == [0, 1, 2, 3]
    evidences = np.array([restart.log_evidence for restart in result.restarts])
    modes = np.log([0.3, 0.7])
    nearest = np.abs(evidences[:, None] - modes).min(-1)
    assert nearest.max() < 0.02
    assert {int(np.abs(modes - evidence).argmin()) for evidence in evidences} == {0, 1}
    assert result.guide.median()["x"].item() == pytest.approx(6.0, abs=0.1)
    assert all(restart.steps == 20 for restart in result.restarts)


def test_restarts_are_saved_with_the_result(tmp_path):
    result = fitted(2)
    result.save(tmp_path / "fit.pt")
    pyro.clear_param_store()
    guide = AutoSplineFlow(two_modes, **SMALL).setup()
    assert FitResult.load(tmp_path / "fit.pt", two_modes, guide).restarts == result.restarts


def test_restarts_with_checkpoints_are_resumed(tmp_path):
    first = fitted(2, checkpoint_dir=tmp_path)
    pyro.clear_param_store()
    again = fitted(2, checkpoint_dir=tmp_path, resume=True)
    assert again.restarts == first.restarts
    assert {path.name for path in tmp_path.iterdir()} == {"restart-0", "restart-1"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"guide": AutoNormal(two_modes)},
            "can begin anew, such as an AutoSplineFlow, .*AutoNormal",
        ),
        ({"guide": AutoSplineFlow(two_modes, num_components=2)}, "num_components=1 .*got 2"),
        ({"restarts": 0}, "restarts >= 1, got 0"),
        ({"data": lambda step: torch.zeros(3)}, "data in tensors for restarts=2, got function"),
        ({"trackers": [CsvTracker("history.csv")]}, "no trackers for restarts=2"),
    ],
)
def test_what_cannot_be_started_again_is_refused(change, text):
    call = {"guide": AutoSplineFlow(two_modes, **SMALL), "restarts": 2, **change}
    with pytest.raises(ValueError, match=text):
        fit(two_modes, **call, max_steps=2, progress=False)


def test_a_guide_of_anybodys_begins_anew_where_it_says():
    class Guide(AutoNormal):
        def check_restarts(self):
            asked.append(True)

        def restart(self, number, *args, **kwargs):
            begun.append((number, args, kwargs))
            with torch.no_grad():
                self.locs.x.fill_((-6.0, 6.0)[number - 1])
                self.scales.x = torch.ones_like(self.scales.x)

    asked, begun = [], []
    guide = Guide(two_modes, init_loc_fn=init_to_value(values={"x": torch.tensor(-9.0)}))
    options = {"num_particles": 64, "max_steps": 20, "lr": 0.01, "seed": 0, "progress": False}
    result = fit(two_modes, guide, restarts=3, **options)
    assert asked == [True] and begun == [(1, (), {}), (2, (), {})]
    elbos = [restart.elbo for restart in result.restarts]
    assert elbos[2] == max(elbos) > math.log(0.3)
    assert guide.locs.x.item() == pytest.approx(6.0, abs=0.3)
