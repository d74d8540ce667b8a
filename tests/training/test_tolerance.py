import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.room import Gap
from pyro_flowkit.training import Callback
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.training.tolerance import NUM_CONFIRMING, OTHER_SEEDS, Tolerance

DATA = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
TINY = {"num_transforms": 2, "hidden_dims": [8]}


def conjugate(y):
    """Two latents whose posterior is a Gaussian."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu.sum(-1, keepdim=True), 1.0), obs=y)


def scaled(y):
    """Mean and standard deviation; the best Gaussian is some hundredths of a nat below."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0 + y.new_zeros(())))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def banana():
    zero = torch.zeros((), dtype=torch.float64)
    x = pyro.sample("x", dist.Normal(zero, 10.0))
    pyro.sample("y", dist.Normal(0.03 * x.square() - 3.0, 1.0))


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            state.stop = "enough"


class FakeRoom:
    """Gives gaps that were written down; the draws that confirm give one gap, or one after the other."""

    def __init__(self, *gaps, confirmed=None):
        self.gaps, self.confirmed, self.seeds = list(gaps), confirmed, []

    def gap(self, seed, num_draws=0):
        self.seeds.append(seed)
        if seed >= OTHER_SEEDS:
            return self.confirmed if isinstance(self.confirmed, Gap) else self.confirmed.pop(0)
        return self.gaps.pop(0)


def watch(room, nats=0.01, max_steps=None):
    return Tolerance(room, Ranks(), nats, max_steps)


@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_gap_of_normal_log_weights_is_half_their_variance(spread):
    torch.manual_seed(0)
    gaps = [Gap.of(-5.0 + spread * torch.randn(4000, dtype=torch.float64)) for _ in range(20)]
    off = torch.tensor([(gap.nats - spread**2 / 2) / gap.error for gap in gaps])
    assert off.abs().max() < 3.5
    assert off.std() == pytest.approx(1.0, abs=0.5)  # the errors are those that there are
    assert max(gap.error for gap in gaps) < 0.1 * spread**2


def test_gap_does_not_trust_heavy_tails():
    torch.manual_seed(0)
    log_weights = torch.distributions.Exponential(1 / 0.8).sample((2048,)).double()  # pareto k 0.8
    gap = Gap.of(log_weights)
    exact = -math.log(0.2) - 0.8
    assert gap.nats < exact < gap.upper


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gap_with_a_weight_that_is_no_number_is_infinite(bad):
    log_weights = torch.zeros(100)
    log_weights[3] = bad
    assert Gap.of(log_weights).upper == math.inf


def test_fit_by_itself_stops_when_nothing_is_left_to_gain():
    rows = DATA.repeat(3)
    guide = AutoSplineFlow(scaled, **TINY)
    result = fit(scaled, guide, args=(rows,), seed=0, progress=False)
    assert result.stop_reason == "tolerance"
    assert 0 < len(result.history["step"]) < 1000
    assert 0 <= result.gap < 0.01
    assert f"gap={result.gap:.2g}" in repr(result)
    again = fit(scaled, guide, args=(rows,), seed=1, progress=False)
    assert len(again.history["step"]) == 0  # it is there already
    assert again.stop_reason == "tolerance"


def test_fit_takes_no_step_where_the_best_gaussian_is_the_posterior():
    result = fit(conjugate, AutoSplineFlow(conjugate), args=(DATA,), seed=0, progress=False)
    assert result.stop_reason == "tolerance"
    assert len(result.history["step"]) == 0
    assert result.best_step == 0
    assert 0 <= result.gap < 1e-3
    assert "0 steps" in repr(result)


def test_fit_with_steps_of_the_caller_goes_to_their_end():
    result = fit(
        conjugate, AutoSplineFlow(conjugate), args=(DATA,), max_steps=60, seed=0, progress=False
    )
    assert result.stop_reason == "max_steps"
    assert len(result.history["step"]) == 60
    assert result.gap < 1e-3


def test_tolerance_of_the_caller_ends_a_fit_with_steps():
    result = fit(
        conjugate,
        AutoSplineFlow(conjugate),
        args=(DATA,),
        max_steps=60,
        tolerance=0.05,
        seed=0,
        progress=False,
    )
    assert result.stop_reason == "tolerance"
    assert len(result.history["step"]) == 0


def test_fit_goes_on_while_the_gap_is_above_the_tolerance():
    result = fit(
        banana, AutoSplineFlow(banana), max_steps=40, tolerance=0.01, seed=0, progress=False
    )
    assert result.stop_reason == "max_steps"
    assert result.gap > 0.05  # the best Gaussian is .73 nats below


def test_resumed_fit_stops_where_the_uninterrupted_one_does(tmp_path):
    settings = {"args": (DATA,), "tolerance": 0.05, "seed": 0, "progress": False}
    whole = fit(scaled, AutoSplineFlow(scaled, **TINY), **settings)
    pyro.clear_param_store()

    def resumed(*callbacks):
        return fit(
            scaled,
            AutoSplineFlow(scaled, **TINY),
            **settings,
            checkpoint_dir=tmp_path,
            resume=True,
            callbacks=callbacks,
        )

    resumed(StopAt(30))
    pyro.clear_param_store()
    second = resumed()
    assert second.stop_reason == whole.stop_reason == "tolerance"
    assert second.gap == whole.gap
    assert (second.history["elbo"] == whole.history["elbo"]).all()


@pytest.mark.parametrize("bad", [-0.1, math.nan])
def test_tolerance_is_not_negative(bad):
    with pytest.raises(ValueError, match="Expected tolerance >= 0 nats, got"):
        fit(conjugate, AutoSplineFlow(conjugate), args=(DATA,), tolerance=bad)


def test_gap_must_be_below_the_tolerance_with_its_error_and_once_more():
    unsure = watch(FakeRoom(Gap(0.008, 0.002)))
    unsure.judge(100)
    assert not unsure.is_met
    lucky = watch(FakeRoom(Gap(0.008, 0.0005), confirmed=Gap(0.02, 0.001)))
    lucky.judge(100)
    assert not lucky.is_met
    below, above = Gap(0.008, 0.0005), Gap(0.012, 0.0005)
    seldom_seen = watch(FakeRoom(below, confirmed=[below, below, below, above]))
    seldom_seen.judge(100)
    assert not seldom_seen.is_met
    room = FakeRoom(below, confirmed=below)
    near = watch(room)
    assert near.judge(100) == 0.008
    assert near.is_met
    first_draws = {
        float(torch.randn((), generator=torch.Generator().manual_seed(s))) for s in room.seeds
    }
    assert len(first_draws) == len(room.seeds) == 1 + NUM_CONFIRMING


def test_rate_begins_to_fall_when_the_gap_does_not():
    gaps = [Gap(nats, 0.0) for nats in (0.4, 0.2, 0.1, 0.05, 0.06, 0.04, *[0.05] * 13)]
    tolerance = watch(FakeRoom(*gaps), max_steps=6000)
    found = []
    for step in range(100, 2000, 100):
        tolerance.judge(step)
        found.append(tolerance.look_ahead(step))
    assert found == [False] * 18 + [True]
    assert tolerance.end == 4750
    assert not tolerance.look_ahead(1900)  # once


def test_rate_stays_while_the_gap_falls_and_after_its_time():
    gaps = [Gap(0.9**i, 0.0) for i in range(20)]
    tolerance = watch(FakeRoom(*gaps), max_steps=6000)
    for step in range(100, 2100, 100):
        tolerance.judge(step)
        assert not tolerance.look_ahead(step)
    for step, begins in ((700, True), (800, False)):  # by then it falls already
        level = watch(FakeRoom(*[Gap(0.1, 0.0)] * 16), max_steps=2000)
        for number in range(16):
            level.judge(number)
        assert level.look_ahead(step) == begins


def test_tolerance_remembers_what_it_saw():
    first = watch(FakeRoom(*[Gap(0.1, 0.0)] * 16), max_steps=4000)
    for step in range(100, 1700, 100):
        first.judge(step)
    assert first.look_ahead(800)
    second = watch(FakeRoom(), max_steps=4000)
    second.load_state_dict(first.state_dict())
    assert second.end == 2000
    assert second.state_dict() == first.state_dict()
