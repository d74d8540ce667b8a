"""What docs/coming_from/pyro.md says of Pyro's flows and of ours, where no other test says it."""

import re
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as P
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow

import pyro_flowkit.transforms as T
from pyro_flowkit import SplineFlow
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.testing import perturb_

PAGE = Path(__file__).parents[1] / "docs" / "coming_from" / "pyro.md"
DIM, CONTEXT, ROWS = 3, 2, 5


def vectors():
    return dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)


def model():
    z = pyro.sample("z", vectors())
    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(2.0))


def jacobian_depends(transform, dim=4):
    """Which output depends on which input."""
    x = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.autograd.functional.jacobian(transform.double(), x) != 0


def test_the_programs_of_the_page_run_and_its_commands_exist() -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert namespace["flow_dist"].log_prob(torch.zeros(7, 2)).shape == (7,)
    for path in re.findall(r"python -m (\S+)", text):
        assert (PAGE.parents[2] / f"{path.replace('.', '/')}.py").exists(), path
    for path in re.findall(r"`(tests/\S+\.py)`", text):
        assert (PAGE.parents[2] / path).exists(), path


def test_the_page_names_every_transform_that_takes_the_place_of_pyros() -> None:
    ours = {name for name in P.__all__ if getattr(T, name) is not getattr(P, name)}
    paragraph = PAGE.read_text().split("These are ours")[1].split("All others")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == ours


CONSTRUCTORS = {
    "Pyro": lambda: P.conditional_spline(DIM, CONTEXT),
    "conditional_spline": lambda: T.conditional_spline(DIM, CONTEXT),
    "conditional_spline_coupling": lambda: T.conditional_spline_coupling(DIM, CONTEXT),
    "iterated": lambda: T.iterated(2, T.conditional_spline_coupling, DIM, CONTEXT),
    "SplineFlow": lambda: SplineFlow(DIM, CONTEXT),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_batch_of_contexts_has_the_shapes_of_the_table(name) -> None:
    context, flow = torch.randn(ROWS, CONTEXT), CONSTRUCTORS[name]()
    if name == "SplineFlow":
        d = flow(context)
    else:
        d = dist.ConditionalTransformedDistribution(vectors(), [flow]).condition(context)
    as_pyro = name in ("Pyro", "conditional_spline")
    assert d.batch_shape == (() if as_pyro else (ROWS,)) and d.event_shape == (DIM,)
    if as_pyro:
        assert d.sample((ROWS,)).shape == (ROWS, DIM)
        error, message = ((IndexError, None), (ValueError, r"sample\(\(5,\)\)"))[name != "Pyro"]
        with pytest.raises(error, match=message):
            d.sample()
    else:
        assert d.sample().shape == (ROWS, DIM)
        if name == "SplineFlow":
            assert d.sample((ROWS,)).shape == (ROWS, ROWS, DIM)
        else:
            with pytest.warns(UserWarning, match=r"call sample\(\)"):
                assert d.sample((ROWS,)).shape == (ROWS, ROWS, DIM)
    with pyro.plate("rows", ROWS):
        assert pyro.sample("z", d).shape == (ROWS, DIM)
    assert d.log_prob(torch.zeros(ROWS, DIM)).shape == (ROWS,)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("conditional_spline", IndexError),
        ("conditional_affine_coupling", RuntimeError),
        ("conditional_planar", None),
    ],
)
def test_pyros_conditional_transforms_know_nothing_of_the_batch_of_a_context(name, error) -> None:
    """One draw for all contexts is an error of torch's there, or one and the same noise for all of them."""
    conditional = dist.ConditionalTransformedDistribution(
        vectors(), [getattr(P, name)(DIM, context_dim=CONTEXT)]
    )
    d = conditional.condition(torch.randn(CONTEXT).expand(ROWS, CONTEXT))
    assert d.batch_shape == ()
    assert len(d.sample((ROWS,)).unique(dim=0)) == ROWS
    if error is None:
        assert d.sample().shape == (ROWS, DIM) and d.sample().std(0).max() < 1e-6
    else:
        with pytest.raises(error):
            d.sample()


def test_pyros_flows_are_random_at_first_and_ours_are_their_base() -> None:
    x = torch.randn(50, 4)
    assert (P.spline_coupling(4)(x) - x).abs().mean() > 0.1
    assert (T.spline_coupling(4)(x) - x).abs().max() < 2e-6


def test_pyros_density_jumps_at_the_bound_and_ours_does_not() -> None:
    def jump(transform):
        edge = torch.tensor(3.0, dtype=torch.float64)
        x = torch.stack([torch.nextafter(edge, edge * 0), torch.nextafter(edge, edge * 2)])[:, None]
        inside, outside = transform.double().log_abs_det_jacobian(x, transform(x))
        return float((inside - outside).abs().detach())

    assert jump(P.Spline(1, order="quadratic")) == pytest.approx(1e-3, rel=0.01)
    assert jump(perturb_(T.Spline(1))) < 1e-9


def test_pyros_default_order_is_linear_and_ours_refuses_it_by_name() -> None:
    assert (
        P.Spline(2).order == P.conditional_spline(2, 1).condition(torch.zeros(1)).order == "linear"
    )
    for build in (
        lambda: T.Spline(2, order="linear"),
        lambda: T.spline(2, order="linear"),
        lambda: T.conditional_spline(2, 1, order="linear"),
    ):
        with pytest.raises(ValueError, match='order="quadratic", got .linear.'):
            build()
    T.Spline(2, 16, order="quadratic")


def test_pyros_iterated_couplings_never_transform_the_first_half_given_the_second() -> None:
    theirs = jacobian_depends(P.iterated(3, P.spline_coupling, 4))
    ours = jacobian_depends(perturb_(T.iterated(3, T.spline_coupling, 4), 0.3))
    assert not theirs[:2, 2:].any() and ours.all()


def test_what_the_classes_of_pyro_take_besides_is_an_error() -> None:
    network = torch.nn.Linear(2, 2)
    for build in (
        lambda: T.SplineCoupling(4, 2, network),
        lambda: T.ConditionalSpline(network, 2, 8),
        lambda: T.permute(4, dim=-2),
    ):
        with pytest.raises((TypeError, ValueError)):
            build()


def test_pyros_log_density_of_a_draw_is_stale_after_a_step_and_ours_is_not() -> None:
    for module, stale in ((P, True), (T, False)):
        transform = module.spline_coupling(4)
        base = dist.Normal(torch.zeros(4), torch.ones(4))
        d = dist.TransformedDistribution(base, [transform])
        x = torch.randn(7, 4)
        before = d.log_prob(x).detach()
        perturb_(transform, 0.5)
        after = d.log_prob(x).detach()
        assert torch.equal(before, after) == stale
        d.clear_cache()
        fresh = d.log_prob(x).detach()
        assert torch.equal(after, fresh) != stale


def test_states_of_pyros_transforms_are_refused_and_stores_not_read() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        T.spline_coupling(4).load_state_dict(P.spline_coupling(4).state_dict())
    store = pyro.get_param_store()
    pyro.module("flow", P.spline_coupling(4))
    theirs = set(store.keys())
    pyro.module("flow", T.spline_coupling(4), update_module_params=True)
    assert not theirs & (set(store.keys()) - theirs)
    assert {key.split("$$$")[1] for key in set(store.keys()) - theirs} == {
        name for name, _ in T.spline_coupling(4).named_parameters()
    }


def test_our_transforms_train_in_pyros_guide_which_starts_as_its_base() -> None:
    guide = AutoNormalizingFlow(model, partial(T.iterated, 2, T.spline_coupling))
    x = torch.randn(9, DIM)
    guide()
    torch.testing.assert_close(guide.get_posterior().log_prob(x), vectors().log_prob(x))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(num_particles=4))
    losses = [svi.step() for _ in range(50)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1.0


def test_pyros_guide_has_no_median_and_ours_has() -> None:
    theirs = AutoNormalizingFlow(model, partial(P.iterated, 2, P.spline_coupling))
    theirs()
    with pytest.raises(NotImplementedError):
        theirs.median()
    ours = AutoSplineFlow(model)
    ours()
    assert ours.median()["z"].shape == (DIM,)


def test_the_guides_have_the_names_of_the_page_in_the_store() -> None:
    AutoNormalizingFlow(model, partial(P.iterated, 2, P.spline_coupling))()
    AutoSplineFlow(model)()
    names = [
        re.sub(r"(\$\$\$|(?<=flow)|(?<=affine)).*", "", name)
        for name in pyro.get_param_store().keys()
        if "_prototype" not in name
    ]
    assert set(names) == {
        "AutoNormalizingFlow.transform",
        "AutoSplineFlow.flow",
        "AutoSplineFlow.affine",
    }


def test_a_saved_store_gives_pyros_fresh_guide_another_flow(tmp_path) -> None:
    """And ours the trained one, as tests/guides/test_pitfalls.py has it."""
    store, x = pyro.get_param_store(), torch.randn(9, DIM)

    def fresh():
        guide = AutoNormalizingFlow(model, partial(P.iterated, 2, P.spline_coupling))
        guide()
        return guide.get_posterior().log_prob(x)

    saved = fresh()
    store.save(str(tmp_path / "store"))
    store.clear()
    store.load(str(tmp_path / "store"))
    assert (fresh() - saved).abs().max() > 0.1


def test_pyros_guide_takes_the_latents_of_a_subsample_for_those_of_all_rows() -> None:
    """Where ours refuses them, as tests/guides/test_pitfalls.py has it."""

    def local():
        with pyro.plate("rows", 20, subsample_size=5):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoNormalizingFlow(local, partial(P.iterated, 2, P.spline_coupling))
    guide()
    assert guide.latent_dim == 5
    with pytest.raises(ValueError, match="subsample"):
        AutoSplineFlow(local)()
