"""The guide's plates are those of the model: their sizes, their rows and their scale, whatever the batch."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_flowkit.testing import perturb_
from tests.guides.amortized_models import DATA, SIZE, make_guide, model
from tests.tiny import step

ROWS = torch.arange(SIZE).float()


def scale_of(guide, *args) -> float:
    trace = poutine.trace(guide).get_trace(*args)
    return float(trace.nodes["_AmortizedSplineFlow_latent"]["scale"])


def joint(program, guide, *args):
    """The traces of a guide and of the model against it."""
    guide_trace = poutine.trace(guide).get_trace(*args)
    replayed = poutine.replay(program, trace=guide_trace)
    return guide_trace, poutine.trace(replayed).get_trace(*args)


@pytest.mark.parametrize("first", [SIZE, 5])
def test_batches_may_have_any_size_and_stand_for_all_data(first: int) -> None:
    guide = make_guide().setup(DATA[:first])
    for size in (5, 1, SIZE, 3):
        assert scale_of(guide, DATA[:size]) == pytest.approx(SIZE / size)
        assert guide(DATA[:size])["z"].shape == (size,)
        step(guide, DATA[:size], of=model)


@torch.no_grad()
def test_batches_of_a_whole_add_up_to_it() -> None:
    guide = perturb_(make_guide().setup(DATA), 0.1)
    whole = poutine.trace(guide).get_trace(DATA)
    whole.compute_log_prob()
    node = whole.nodes["_AmortizedSplineFlow_latent"]
    expected = float(node["log_prob_sum"])
    parts = 0.0
    for rows in torch.arange(SIZE).split(4):
        fixed = poutine.condition(
            guide, data={"_AmortizedSplineFlow_latent": node["value"].detach()[rows]}
        )
        part = poutine.trace(fixed).get_trace(DATA[rows])
        part.compute_log_prob()
        parts += float(part.nodes["_AmortizedSplineFlow_latent"]["log_prob_sum"]) / 3
    assert parts == pytest.approx(expected, rel=1e-4)


def test_plate_whose_size_is_the_batch_is_followed() -> None:
    def unscaled(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[..., 0])

    guide = make_guide(unscaled).setup(DATA[:5])
    for size in (5, SIZE, 2):
        assert scale_of(guide, DATA[:size]) == 1.0


def test_size_may_change_from_call_to_call() -> None:
    def resized(x: Tensor, size: int) -> None:
        with pyro.plate("rows", size, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = make_guide(resized, lambda x, size: x).setup(DATA[:5], 100)
    assert scale_of(guide, DATA[:5], 100) == 20.0
    assert scale_of(guide, DATA[:5], 10) == 2.0


def indexed(x: Tensor, rows: Tensor) -> None:
    with pyro.plate("rows", SIZE, subsample=rows) as index:
        pyro.sample("z", dist.Normal(ROWS[index], 0.1))


def test_rows_that_the_model_is_given_are_the_guides() -> None:
    guide = make_guide(indexed, lambda x, rows: x).setup(DATA[:3], torch.tensor([4, 7, 1]))
    rows = torch.tensor([2, 11, 5, 0])
    _, trace = joint(indexed, guide, DATA[rows], rows)
    assert torch.equal(trace.nodes["rows"]["value"], rows)
    assert torch.equal(trace.nodes["z"]["fn"].loc, ROWS[rows])
    assert trace.nodes["z"]["scale"] == 3.0


def subsampled(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", SIZE, subsample_size=4) as index:
        pyro.sample("z", dist.Normal(mean + ROWS[index], 0.1))


def test_rows_that_the_model_draws_are_those_whose_features_are_used() -> None:
    guide = make_guide(subsampled, lambda x: torch.stack([ROWS, ROWS], -1)).setup(DATA)
    with torch.no_grad():
        guide.affine.weight[0, 0] = 1.0 / guide.affine.weight_rate[0, 0]  # loc = row + constant
        guide.affine.raw_constant[:2] = torch.tensor([0.0, -1.0])
    seen = set()
    for _ in range(5):
        guide_trace, model_trace = joint(subsampled, guide, DATA)
        rows = model_trace.nodes["rows"]["value"]
        assert torch.equal(guide_trace.nodes["rows"]["value"], rows)
        assert torch.allclose(guide_trace.nodes["z"]["value"], ROWS[rows], atol=0.01)
        assert model_trace.nodes["z"]["scale"] == 3.0
        seen |= set(rows.tolist())
    assert len(seen) > 4
    assert guide.median(DATA)["z"].shape == (SIZE,)  # all data have features


def test_create_plates_gives_the_plates() -> None:
    def create_plates(x: Tensor) -> pyro.plate:
        return pyro.plate("rows", 10 * SIZE, subsample_size=len(x), dim=-1)

    guide = make_guide(create_plates=create_plates).setup(DATA)
    assert scale_of(guide, DATA[:6]) == 20.0


def test_unpickled_guide_without_its_model_serves_new_data() -> None:
    guide = make_guide().setup(DATA[:5])
    guide._plain_model = (None,)
    assert guide(torch.randn(3 * SIZE, 2))["z"].shape == (3 * SIZE,)
    assert scale_of(guide, DATA[:4]) == 3.0


def test_features_for_other_rows_are_refused() -> None:
    guide = make_guide(encoder=lambda x: DATA[:3]).setup(DATA[:3])
    with pytest.raises(ValueError, match=r"'rows', 5, or 12 for all data, got 3"):
        guide(DATA[:5])


def test_model_that_hides_its_subsampled_plate_is_refused() -> None:
    exposed = poutine.block(model, expose=["z", "weights"])
    with pytest.raises(ValueError, match="create_plates"):
        make_guide(exposed).setup(DATA[:5])
    make_guide(exposed).setup(DATA)  # nothing is hidden in a whole plate


def test_model_that_leaves_out_its_plate_is_refused() -> None:
    def moody(x: Tensor) -> None:
        if len(x) > 3:
            model(x)

    guide = make_guide(moody).setup(DATA)
    with pytest.raises(RuntimeError, match="'rows'"):
        guide(DATA[:2])


# Which plate


def two_plates(x: Tensor) -> None:
    with pyro.plate("groups", 3):
        pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", SIZE):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_several_plates_need_a_name() -> None:
    with pytest.raises(ValueError, match="2: 'groups', 'rows'.*plate='groups'"):
        make_guide(two_plates).setup(DATA)
    guide = make_guide(two_plates, plate="rows").setup(DATA)
    values = guide(DATA)
    assert values["g"].shape == (3,) and values["z"].shape == (SIZE,)
    assert {site.name for site in guide._global.sites} == {"g"}
    with pytest.raises(ValueError, match=r"\('groups', 'rows'\), got 'row'"):
        make_guide(two_plates, plate="row").setup(DATA)


def test_the_only_subsampled_plate_is_the_datas() -> None:
    def uneven(x: Tensor) -> None:
        with pyro.plate("groups", 3):
            pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", SIZE, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = make_guide(uneven, condition_on_global=True).setup(DATA[:5])
    assert guide(DATA[:4])["z"].shape == (4,)
    elbo = Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1)
    step(guide, DATA[:4], of=uneven, elbo=elbo)


def test_two_subsampled_plates_are_refused() -> None:
    def both(x: Tensor) -> None:
        with pyro.plate("left", SIZE, subsample_size=len(x)):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("right", SIZE, subsample_size=len(x)):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'left', 'right'"):
        make_guide(both).setup(DATA[:5])
    with pytest.raises(ValueError, match="'b' inside plate 'right', which subsamples 5 of 12"):
        make_guide(both, plate="left").setup(DATA[:5])


def test_no_local_latents_point_to_auto_spline_flow() -> None:
    def overall(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", SIZE, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[..., 0])

    guide = make_guide(overall)
    for _ in range(2):  # a guide that was refused is not set up
        with pytest.raises(ValueError, match="AutoSplineFlow"):
            guide(DATA)


def test_discrete_latent_points_to_enumeration_and_sphere_to_a_reparametrisation() -> None:
    def discrete(x: Tensor) -> None:
        with pyro.plate("rows", SIZE):
            pyro.sample("k", dist.Bernoulli(0.5))

    def sphere(x: Tensor) -> None:
        with pyro.plate("rows", SIZE):
            pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))

    with pytest.raises(ValueError, match="enumeration.html"):
        make_guide(discrete).setup(DATA)
    with pytest.raises(ValueError, match="ProjectedNormalReparam"):
        make_guide(sphere).setup(DATA)


def test_support_may_not_differ_from_row_to_row() -> None:
    def ragged(x: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample_size=len(x)):
            pyro.sample("z", dist.Uniform(0.0, 1.0 + x[:, 0].exp()))

    def even(x: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample_size=len(x)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(x)), 2.0))

    with pytest.raises(ValueError, match="support for all rows of 'z'"):
        make_guide(ragged).setup(DATA)
    guide = make_guide(even).setup(DATA)
    z = guide(DATA[:5])["z"]
    assert z.shape == (5,) and bool(((z > 0) & (z < 2)).all())


# Plates inside the data's


def inner_right(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", SIZE, subsample_size=len(x), dim=-2):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(mu + w[..., 0], s))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def inner_left(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    rows = pyro.plate("rows", SIZE, subsample_size=len(x), dim=-1)
    with rows:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("columns", 2, dim=-2), rows:
        z = pyro.sample("z", dist.Normal(mu, s))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)


@pytest.mark.parametrize(
    ("nested", "shapes"),
    [
        (inner_right, {"s": (5, 1), "w": (5, 1, 3), "z": (5, 2)}),
        (inner_left, {"s": (5,), "z": (2, 5)}),
    ],
)
@pytest.mark.parametrize("condition_on_global", [False, True])
def test_plates_inside_are_part_of_the_datum(nested, shapes, condition_on_global) -> None:
    guide = make_guide(nested, plate="rows", condition_on_global=condition_on_global).setup(DATA)
    perturb_(guide, 0.05)
    values = guide(DATA[:5])
    assert {name: tuple(values[name].shape) for name in shapes} == shapes
    medians = guide.median(DATA[:5])
    assert {name: tuple(medians[name].shape) for name in shapes} == shapes
    draws = guide.unpack(guide.get_posterior(DATA[:5]).sample((7,)))
    assert {name: tuple(draws[name].shape) for name in shapes} == {
        name: (7, *shape) for name, shape in shapes.items()
    }
    with torch.no_grad():
        one_by_one = torch.tensor([Trace_ELBO().loss(nested, guide, DATA[:5]) for _ in range(100)])
        together = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=2)
        loss = together.loss(nested, guide, DATA[:5])
    assert abs(loss - float(one_by_one.mean())) < 5 * float(one_by_one.std()) / 10


def test_values_inside_keep_their_places() -> None:
    guide = make_guide(inner_left, plate="rows").setup(DATA)
    latent = torch.arange(15.0).reshape(5, 3)  # s, then z of both columns
    z = guide.unpack(latent)["z"]
    assert torch.equal(z, latent[:, 1:].mT)


def test_subsampled_plate_inside_is_refused() -> None:
    def inside(x: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample_size=len(x), dim=-2):
            with pyro.plate("columns", 10, subsample_size=2, dim=-1):
                pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'columns', which subsamples 2 of 10"):
        make_guide(inside, plate="rows").setup(DATA)
