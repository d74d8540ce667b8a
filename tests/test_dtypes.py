"""Data of every dtype into every public function that takes data: the right numbers, or a refusal in words."""

import importlib
import inspect

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as P
import pytest
import torch
from torch import Tensor

import pyro_flowkit.transforms as T
from pyro_flowkit import ContinuousFlow, SplineFlow, dequantize, fit, inverse_logit, logit
from pyro_flowkit.diagnostics import (
    heldout_log_prob,
    inference_gaps,
    iterate_convergence,
    latent_usage,
    pointwise_bounds,
    psis,
)
from pyro_flowkit.guides import AmortizedSplineFlow, AutoSplineFlow
from pyro_flowkit.ops import (
    Columns,
    SplineSettings,
    rational_quadratic_forward,
    rational_quadratic_inverse,
    spline_columns,
    spline_elements,
)
from pyro_flowkit.tables import TableDensity
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms.affine import Affine
from pyro_flowkit.transforms.base import InverseTransformModule
from pyro_flowkit.transforms.conditional import ConditionedTransform
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine

matplotlib.use("Agg")

WHOLE = [torch.int64, torch.uint8, torch.bool]
HALF = [torch.float16, torch.bfloat16]
FULL = [torch.float32, torch.float64]
X = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])  # in every dtype


def flow() -> SplineFlow:
    torch.manual_seed(0)
    return perturb_(SplineFlow(2, num_transforms=2, hidden_dims=[8], count_bins=4), 0.3)


def conditional() -> SplineFlow:
    torch.manual_seed(0)
    return perturb_(SplineFlow(2, 2, num_transforms=2, hidden_dims=[8], count_bins=4), 0.3)


def sampled(x: Tensor) -> Tensor:
    def model() -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow()(), obs=x)

    return pyro.poutine.trace(model).get_trace().log_prob_sum()


def standardized(x: Tensor) -> Tensor:
    return flow().standardize(x).log_prob(torch.ones(1, 2))


def fitted(x: Tensor, val_data: Tensor | None = None) -> Tensor:
    trained = flow()
    fit(trained, data=x, val_data=val_data, max_steps=2, seed=0, progress=False)
    return trained.log_prob(torch.ones(1, 2)).detach()


def of_guide(x: Tensor) -> Tensor:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return AutoSplineFlow(model, num_transforms=1, hidden_dims=[4]).setup().log_prob({"z": x})


def element_wise(function) -> object:
    params = 0.3 * torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    return lambda x: function(x, params, count_bins=4)[0]


def elements(x: Tensor) -> Tensor:
    params = 0.3 * torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    return spline_elements(x, params, SplineSettings(4, 3.0, "linear"))[0]


def columns(x: Tensor) -> Tensor:
    params = 0.3 * torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    own = Columns(2, (1,), (0,))
    return spline_columns(x, params, params[0], own, SplineSettings(4, 3.0, "linear"))[0]


def continuous() -> ContinuousFlow:
    torch.manual_seed(0)
    return perturb_(ContinuousFlow(2, hidden_dims=[4]), 0.1)


def continuous_conditional() -> ContinuousFlow:
    torch.manual_seed(0)
    return perturb_(ContinuousFlow(2, 2, hidden_dims=[4]), 0.1)


def of_each_datum(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample(
            "x",
            dist.Normal(z[..., None], torch.ones(2)).to_event(1),
            obs=x.to(torch.get_default_dtype()),
        )


def posterior(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x.to(torch.get_default_dtype()).mean(-1), 0.6))


def amortized() -> AmortizedSplineFlow:
    torch.manual_seed(0)
    settings = {"num_transforms": 1, "hidden_dims": [4]}
    guide = AmortizedSplineFlow(of_each_datum, torch.nn.Linear(2, 3), context_dim=3, **settings)
    guide(X)
    return guide


def amortized_log_prob(x: Tensor) -> Tensor:
    return amortized().log_prob({"z": x[:, 0]}, X)


def unpacked(x: Tensor) -> Tensor:
    return amortized().unpack(x[:, :1])["z"]


def drawn(x: Tensor, make=conditional) -> Tensor:
    made = make()
    torch.manual_seed(0)
    return made.sample(3, x)


def plotted(x: Tensor, make=flow) -> Tensor:
    torch.manual_seed(0)
    axes = make().plot(x, num_samples=20)
    limits = [*axes[1, 0].get_xlim(), *axes[1, 0].get_ylim()]
    plt.close(axes[0, 0].figure)
    return torch.tensor(limits)


def matched(x: Tensor) -> Tensor:
    made = continuous()
    torch.manual_seed(0)
    return made.matching_loss(x)


def of_values(dataset, *names: str) -> Tensor:
    return torch.cat([torch.as_tensor(dataset[name].values).flatten() for name in names])


def with_gaps(x: Tensor) -> Tensor:
    settings = {"num_samples": 40, "num_steps": 6, "num_particles": 2, "seed": 0}
    found = inference_gaps(of_each_datum, posterior, x, train_data=x, **settings)
    return of_values(found, "elbo")


def in_frame(x: Tensor) -> pd.DataFrame:
    array = x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()  # numpy has no bfloat16
    return pd.DataFrame(np.tile(array, (10, 1)), columns=["a", "b"])


def table_density() -> TableDensity:
    noise = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    return TableDensity(pd.DataFrame(noise.numpy(), columns=["a", "b"])).fit(steps=1)


def density_of_table(x: Tensor) -> Tensor:
    frame = in_frame(x) + np.linspace(0.0, 8.0, 40)[:, None] * np.array([1.0, -0.5])
    fitted = TableDensity(frame).fit(steps=1)
    return torch.as_tensor(fitted.log_prob(pd.DataFrame({"a": [1.0], "b": [0.0]})))


def standardization() -> T.Standardization:
    made = T.Standardization(2)
    made.fit(torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) + 1.0, "full")
    return made


ONES = torch.ones(4, 2)
# By the name of what takes the data, and of which argument where there are several.
FUNCTIONS = {
    "SplineFlow.log_prob": lambda x: flow().log_prob(x),
    "SplineFlow.log_prob, context": lambda x: conditional().log_prob(ONES, x),
    "SplineFlow.forward": lambda x: conditional()(x).log_prob(ONES),
    "SplineFlow.transforms": lambda x: conditional().transforms(x)[0](ONES),
    "SplineFlow.sample": drawn,
    "SplineFlow.standardize": standardized,
    "SplineFlow.plot": plotted,
    "ContinuousFlow.log_prob": lambda x: continuous().log_prob(x),
    "ContinuousFlow.log_prob, context": lambda x: continuous_conditional().log_prob(ONES, x),
    "ContinuousFlow.forward": lambda x: continuous_conditional()(x).log_prob(ONES),
    "ContinuousFlow.transforms": lambda x: continuous_conditional().transforms(x)[0](ONES),
    "ContinuousFlow.sample": lambda x: drawn(x, continuous_conditional),
    "ContinuousFlow.standardize": lambda x: continuous().standardize(x).log_prob(ONES),
    "ContinuousFlow.plot": lambda x: plotted(x, continuous),
    "ContinuousFlow.matching_loss": matched,
    "ContinuousFlow.solver_error": lambda x: (continuous().solver_error(x) < 1e-2).float(),
    "FlowDistribution.log_prob": lambda x: flow()().log_prob(x),
    "FlowDistribution.score_parts": lambda x: flow()().score_parts(x).log_prob,
    "pyro.sample": sampled,
    "fit": fitted,
    "fit, val_data": lambda x: fitted(X, x),
    "heldout_log_prob": lambda x: of_values(heldout_log_prob(flow(), x), "log_prob"),
    "heldout_log_prob, context": lambda x: of_values(
        heldout_log_prob(conditional(), ONES, context=x), "log_prob"
    ),
    "pointwise_bounds": lambda x: of_values(
        pointwise_bounds(of_each_datum, posterior, x, num_samples=40, seed=0), "elbo"
    ),
    "latent_usage": lambda x: of_values(
        latent_usage(of_each_datum, posterior, x, num_samples=40, seed=0), "kl"
    ),
    "inference_gaps": with_gaps,
    "iterate_convergence": lambda x: of_values(iterate_convergence(x.repeat(8, 1)), "mean"),
    "psis": lambda x: psis(x[:, 0].repeat(20))[0],
    "AutoSplineFlow.log_prob": of_guide,
    "AmortizedSplineFlow.log_prob": amortized_log_prob,
    "AmortizedSplineFlow.unpack": unpacked,
    "rational_quadratic_forward": element_wise(rational_quadratic_forward),
    "rational_quadratic_inverse": element_wise(rational_quadratic_inverse),
    "spline_elements": elements,
    "spline_columns": columns,
    "dequantize": lambda x: dequantize(x, 2, generator=torch.Generator().manual_seed(0))[0],
    "logit": lambda x: logit(x, alpha=0.1)[0],
    "inverse_logit": lambda x: inverse_logit(x, alpha=0.1)[0],
    "TableDensity": density_of_table,
    "TableDensity.log_prob": lambda x: torch.as_tensor(table_density().log_prob(in_frame(x))),
}
TRANSFORMS = {
    "ActNorm": lambda: T.act_norm(2),
    "Affine": lambda: Affine(torch.tensor([1.0, -0.5]), 0.7),
    "Compose": lambda: T.Compose([T.permute(2), T.lu_linear(2)]),
    "ConditionalCompose": lambda: T.ConditionalCompose([T.conditional_spline(2, 2)], 2),
    "ConditionalSpline": lambda: T.conditional_spline(2, 2, hidden_dims=[4]),
    "ConditionalSplineAutoregressive": lambda: T.conditional_spline_autoregressive(2, 2, [4]),
    "ConditionalSplineCoupling": lambda: T.conditional_spline_coupling(2, 2, hidden_dims=[4]),
    "ConditionedTransform": lambda: T.conditional_spline(2, 2, hidden_dims=[4]).condition(ONES),
    "HierarchicalAffine": lambda: HierarchicalAffine([1, 1], hidden_dims=[4]),
    "InverseTransformModule": lambda: T.spline_coupling(2, hidden_dims=[4]).inv,
    "LULinear": lambda: T.lu_linear(2),
    "Permute": lambda: T.Permute(torch.tensor([1, 0])),
    "Spline": lambda: T.spline(2),
    "SplineAutoregressive": lambda: T.spline_autoregressive(2, [4]),
    "SplineCoupling": lambda: T.spline_coupling(2, hidden_dims=[4]),
    "Standardization": standardization,
}
# those that a user meets without making them
INSIDE = {
    "Affine": Affine,
    "ConditionedTransform": ConditionedTransform,
    "HierarchicalAffine": HierarchicalAffine,
    "InverseTransformModule": InverseTransformModule,
}
METHODS = {
    "call_and_ladj": lambda t, x, *c: t.call_and_ladj(x, *c)[0],
    "inverse_and_ladj": lambda t, x, *c: t.inverse_and_ladj(x, *c)[0],
    "call_and_event_ladj": lambda t, x, *c: t.call_and_event_ladj(x, *c)[1],
    "inverse_and_event_ladj": lambda t, x, *c: t.inverse_and_event_ladj(x, *c)[1],
    "log_abs_det_jacobian": lambda t, x, *c: t.log_abs_det_jacobian(x, x),
    "pushed_derivative": lambda t, x, *c: t.pushed_derivative(
        x, t.call_and_ladj(x, *c)[0].detach(), torch.ones_like(x), *c
    ),
    "forward": lambda t, x, *c: t(x),
    "condition": lambda t, x, *c: t.condition(x)(ONES),
    "fit": lambda t, x: t.fit(x, "diagonal") or t(ONES),
}


def transformed(name: str, method: str):
    """A method of a transform as a function of the data."""

    def function(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        transform = TRANSFORMS[name]()
        if name != "Standardization":
            perturb_(transform, 0.2) if isinstance(transform, torch.nn.Module) else None
        takes_context = isinstance(transform, T.ConditionalFlowTransformModule)
        context = (ONES,) if takes_context and method != "condition" else ()
        return METHODS[method](transform, x, *context)

    return function


FUNCTIONS["ConditionedTransform"] = lambda x: T.conditional_spline(2, 2).condition(x)(ONES)
FUNCTIONS |= {
    f"{name}.{method}": transformed(name, method)
    for name in TRANSFORMS
    for method in METHODS
    if callable(getattr(INSIDE.get(name) or getattr(T, name), method, None))
    and not (method == "forward" and name.startswith("Condition"))
    and not (method == "log_abs_det_jacobian" and name.startswith("Conditional"))
    and not (method == "fit" and name != "Standardization")
}


MODULES = [
    "pyro_flowkit",
    *(f"pyro_flowkit.{m}" for m in ("diagnostics", "guides", "ops", "tables", "transforms")),
]
DATA = {
    "x",
    "y",
    "u",
    "value",
    "values",
    "data",
    "train_data",
    "val_data",
    "rows",
    "context",
    "counts",
}
DATA |= {"inputs", "log_weights", "iterates", "latent", "frame"}
ABSTRACT = {"Bijection", "FlowTransformModule", "ConditionalFlowTransformModule"}


def takers(module: str) -> set[str]:
    """The public functions and methods of a module that take data."""
    imported = importlib.import_module(module)
    found = {}
    for name in set(imported.__all__) - ABSTRACT:
        public = getattr(imported, name)
        if module.endswith("transforms") and public is getattr(P, name, None):
            continue  # Pyro's
        if inspect.isclass(public):
            found[name] = public.__init__
            methods = inspect.getmembers(public, inspect.isfunction)
            found |= {f"{name}.{m}": f for m, f in methods if not m.startswith("_")}
        elif callable(public):
            found[name] = public
    return {
        name
        for name, function in found.items()
        if getattr(function, "__module__", "").startswith("pyro_flowkit")
        and DATA & set(inspect.signature(function).parameters)
    }


@pytest.mark.parametrize("module", MODULES)
def test_no_public_function_that_takes_data_is_left_out(module: str):
    tried = {name.split(",")[0] for name in FUNCTIONS}
    assert takers(module) - tried == set()


def test_what_is_tried_is_public():
    public = set().union(*map(takers, MODULES))
    tried = {name.split(",")[0] for name in FUNCTIONS if name.split(".")[0] not in INSIDE}
    assert tried - public - {"pyro.sample"} == set()


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_whole_numbers_are_taken_for_what_they_are_or_refused(name: str, dtype: torch.dtype):
    expected = FUNCTIONS[name](X)
    try:
        found = FUNCTIONS[name](X.to(dtype))
    except ValueError as error:
        assert str(dtype) in str(error)
        return
    assert found.is_floating_point()
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*HALF, *FULL])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_floating_point_data_give_what_float64_gives(name: str, dtype: torch.dtype):
    if name in (
        "dequantize",
        "fit",
        "ContinuousFlow.matching_loss",
    ):  # draw noise in the dtype of the data; train in it
        expected = FUNCTIONS[name](X)
    else:
        expected = FUNCTIONS[name](X.double())
    found = FUNCTIONS[name](X.to(dtype))
    tolerance = 0.05 if dtype in HALF else 1e-5
    if name in ("dequantize", "ContinuousFlow.matching_loss"):
        tolerance = 1.0  # other noise for another dtype
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("offset", [20231129.0, 1700000061.3])
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_data_far_from_zero_keep_their_digits_in_a_float32_flow(offset: float, kind: str):
    x = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near = SplineFlow(2).standardize(x, kind).log_prob(x)
    far = SplineFlow(2).standardize(x + offset, kind).log_prob(x + offset)
    torch.testing.assert_close(far, near, rtol=0, atol=1e-4)


def test_training_far_from_zero_ends_where_training_near_zero_does():
    x = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def trained(offset: float) -> float:
        pyro.clear_param_store()
        made = SplineFlow(2, num_transforms=2, hidden_dims=[8]).standardize(x + offset)
        fit(made, data=x + offset, max_steps=20, seed=0, progress=False)
        return float(made.log_prob(x + offset).mean().detach())

    assert trained(1700000061.3) == pytest.approx(trained(0.0), abs=1e-3)


@pytest.mark.parametrize("convert", ["half", "float", "double", "bfloat16"])
def test_standardisation_is_exact_after_a_conversion(convert: str):
    x = 20231129.0 + torch.randn(100, 2, dtype=torch.float64)
    made = SplineFlow(2).standardize(x)
    getattr(made, convert)()
    assert made.standardization.loc.dtype == torch.float64
    torch.testing.assert_close(made.standardization.loc, x.mean(0), rtol=0, atol=0)


@pytest.mark.parametrize("mixing", ["lu", "permute"])
def test_density_at_infinity_is_zero(mixing: str):
    made = perturb_(SplineFlow(2, mixing=mixing, hidden_dims=[8]), 0.3)
    x = torch.tensor([[torch.inf, 0.0], [0.5, 1.0], [-torch.inf, torch.inf]])
    found = made.log_prob(x)
    assert found[[0, 2]].tolist() == [-torch.inf, -torch.inf]
    torch.testing.assert_close(found[1], made.log_prob(x[1]))
    found[1].backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in made.parameters())
    with pytest.raises(ValueError, match="real_vector|RealVector|Real"):
        made.log_prob(torch.tensor([[torch.nan, 0.0]]))


@pytest.mark.parametrize(
    ("dtype", "levels"), [(torch.bfloat16, 256), (torch.float32, 2**20), (torch.float64, 2**24)]
)
def test_dequantised_counts_stay_in_their_cells(dtype: torch.dtype, levels: int):
    counts = torch.randint(0, min(levels, 256), (1000, 1)).to(dtype)
    counts = torch.where(counts > 128, levels - 1 - counts, counts) if levels > 256 else counts
    u, _ = dequantize(counts, levels)
    assert torch.equal((u.double() * levels).floor(), counts.double())


def test_cells_that_are_too_small_for_the_dtype_are_refused():
    with pytest.raises(ValueError, match="Expected at most 1048576 levels in torch.float32"):
        dequantize(torch.zeros(3, 1), 2**24)
