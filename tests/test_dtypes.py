"""Data of every dtype into every public function that takes data: the right numbers, or a refusal in words."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flowkit.transforms as T
from pyro_flowkit import SplineFlow, dequantize, fit, logit
from pyro_flowkit.diagnostics import heldout_log_prob
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.ops import rational_quadratic_forward, rational_quadratic_inverse
from pyro_flowkit.testing import perturb_

WHOLE = [torch.int64, torch.int32, torch.uint8, torch.bool]
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


def fitted(x: Tensor) -> Tensor:
    trained = flow()
    fit(trained, data=x, max_steps=2, seed=0, progress=False)
    return trained.log_prob(torch.ones(1, 2)).detach()


def of_guide(x: Tensor) -> Tensor:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return AutoSplineFlow(model, num_transforms=1, hidden_dims=[4]).setup().log_prob({"z": x})


def element_wise(function) -> object:
    params = 0.3 * torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    return lambda x: function(x, params, count_bins=4)[0]


def coupling(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return perturb_(T.spline_coupling(2, hidden_dims=[4], count_bins=4), 0.3)(x)


FUNCTIONS = {
    "SplineFlow.log_prob": lambda x: flow().log_prob(x),
    "FlowDistribution.log_prob": lambda x: flow()().log_prob(x),
    "context": lambda x: conditional().log_prob(torch.ones(4, 2), x),
    "pyro.sample": sampled,
    "standardize": standardized,
    "heldout_log_prob": lambda x: torch.tensor(heldout_log_prob(flow(), x)["log_prob"].values),
    "fit": fitted,
    "AutoSplineFlow.log_prob": of_guide,
    "spline_coupling": coupling,
    "inverse": lambda x: T.spline_coupling(2).inv(x),
    "lu_linear": lambda x: T.lu_linear(2)(x),
    "permute": lambda x: T.Permute(torch.tensor([1, 0]))(x),
    "rational_quadratic_forward": element_wise(rational_quadratic_forward),
    "rational_quadratic_inverse": element_wise(rational_quadratic_inverse),
    "dequantize": lambda x: dequantize(x, 2, generator=torch.Generator().manual_seed(0))[0],
    "logit": lambda x: logit(x, alpha=0.1)[0],
}


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
    if name in ("dequantize", "fit"):  # draw noise in the dtype of the data; train in it
        expected = FUNCTIONS[name](X)
    else:
        expected = FUNCTIONS[name](X.double())
    found = FUNCTIONS[name](X.to(dtype))
    tolerance = 0.05 if dtype in HALF else 1e-5
    if name == "dequantize":
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
