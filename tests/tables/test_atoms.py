"""Columns with values that many rows share: probabilities there, a density elsewhere, and draws of both."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pyro_flowkit.__main__ import main
from pyro_flowkit.command_line.runs import read_run
from pyro_flowkit.tables import FlowSettings, TableDensity, TableError
from pyro_flowkit.tables.atoms import AtomHeads, find_atoms
from pyro_flowkit.tables.columns import check_table
from tests.tables.small import FIT

RNG = np.random.default_rng(0)
SMALL = FlowSettings(layers=2, width=8)


def rain(rows=800, seed=0):
    """Rain on half of the days, and more of it where it is warm."""
    rng = np.random.default_rng(seed)
    warmth = rng.normal(size=rows)
    amount = np.exp(warmth) * rng.exponential(size=rows)
    return pd.DataFrame({"warmth": warmth, "rain": np.where(rng.random(rows) < 0.5, 0.0, amount)})


@pytest.fixture(scope="module")
def fitted():
    return TableDensity(rain(3000), settings=SMALL).fit(steps=200)


@pytest.mark.parametrize(
    ("column", "atoms"),
    [
        (np.where(RNG.random(400) < 0.5, 0.0, RNG.exponential(size=400)), (0.0,)),
        (np.where(RNG.random(400) < 0.96, -9.0, RNG.normal(size=400)), (-9.0,)),
        (np.clip(RNG.normal(size=400), -1.0, 1.0), (-1.0, 1.0)),
        (np.append(RNG.normal(size=400), [2.5] * 20), (2.5,)),
        (RNG.normal(size=400), ()),
        (RNG.normal(size=2000).round(1), ()),
        (RNG.exponential(size=2000).round(2), ()),
        (np.repeat(RNG.normal(size=40), 10), ()),
        (RNG.poisson(5.0, size=400).astype(float), ()),
    ],
)
def test_values_stand_out_by_their_number(column, atoms):
    assert find_atoms(column) == atoms


def test_an_atom_counts_by_its_probability_however_long_it_is_trained(fitted):
    assert fitted.table.atoms == {"rain": (0.0,)}
    fresh = rain(2000, seed=1)
    log_prob = fitted.log_prob(fresh)
    normal = -0.5 * (fresh["warmth"] ** 2 + np.log(2 * np.pi))
    dry = fresh["rain"] == 0
    assert (log_prob - normal)[dry].mean() == pytest.approx(np.log(0.5), abs=0.15)
    assert (log_prob - normal)[~dry].mean() == pytest.approx(np.log(0.5) - 1.0, abs=0.4)
    assert fitted.metrics["kept"] == "flow"


def test_probability_and_density_add_up_to_one(fitted):
    density = fitted.trained.density
    grid = np.linspace(-40.0, 60.0, 40_001)
    for warmth in (-1.0, 0.5):
        near = np.column_stack([np.full_like(grid, warmth), grid])
        at = torch.tensor([[warmth, 0.0]], dtype=torch.float64)
        elsewhere = density.log_prob(torch.from_numpy(near[near[:, 1] != 0])).exp().numpy()
        total = np.sum(elsewhere) * (grid[1] - grid[0]) + float(density.log_prob(at).exp())
        w = density.preparation.to_flow(torch.tensor([[warmth]], dtype=torch.float64))
        plain = density.flow.log_prob(w.float()).detach().exp()
        assert total == pytest.approx(float(plain) * np.exp(density.preparation.log_det), rel=0.01)


def test_draws_hit_the_atom_as_often_as_the_rows(fitted):
    draws = fitted.sample(4000, seed=1)
    assert list(draws) == ["warmth", "rain"]
    assert (draws["rain"] == 0).mean() == pytest.approx((rain(3000)["rain"] == 0).mean(), abs=0.05)
    wet = draws[draws["rain"] != 0]
    assert wet["rain"].mean() == pytest.approx(np.exp(0.5), rel=0.25)
    assert np.corrcoef(wet["warmth"], wet["rain"])[0, 1] > 0.2


def test_columns_of_atoms_only_have_a_density(tmp_path):
    table = rain(300)[["rain"]].clip(upper=3.0)
    density = TableDensity(table).fit(steps=40)
    mean, error = density.metrics["test"]["log_prob"]
    assert np.isfinite(mean) and 0 < error < 2
    assert density.sample(10).shape == (10, 1)
    both = pd.DataFrame({"a": table["rain"], "b": rain(300, seed=1)["rain"]})
    density = TableDensity(both).fit(steps=5)
    assert density.table.atoms == {"a": (0.0, 3.0), "b": (0.0,)}
    assert np.isfinite(density.log_prob(both)).all()


def test_a_fresh_head_has_the_shares_and_the_regression_of_its_rows():
    rng = np.random.default_rng(0)
    a = rng.normal(size=1000)
    b = np.where(rng.random(1000) < 0.3, 5.0, 100.0 + 3.0 * a + 0.1 * rng.normal(size=1000))
    rows = np.column_stack([a, b])
    heads = AtomHeads(["a", "b"], {"b": [5.0]})
    w = torch.from_numpy(rows[:, :1]).float()
    heads.start(rows, w, rows)
    with torch.no_grad():
        found = heads.log_prob(w, heads.scaled(rows), heads.kinds(rows)).numpy()
    at = b == 5.0
    np.testing.assert_allclose(found[at], np.log(at.mean()), atol=1e-3)
    expected = np.log(1 - at.mean()) - np.log(0.1) - 0.5 * np.log(2 * np.pi * np.e)
    assert found[~at].mean() == pytest.approx(expected, abs=0.05)


BESIDE = {
    "lognormal": (lambda rng, n: np.exp(2.0 * rng.normal(size=n)), stats.lognorm(2.0)),
    "negative": (lambda rng, n: -np.exp(rng.normal(size=n)), None),
    "cauchy": (lambda rng, n: rng.standard_cauchy(size=n), stats.cauchy()),
    "normal": (lambda rng, n: 3.0 + rng.normal(size=n), stats.norm(3.0)),
    "exponential": (lambda rng, n: rng.exponential(size=n), stats.expon()),
}


def inflated(name, rows, seed):
    """A column that is 0 in half of its rows, and its exact log density."""
    rng = np.random.default_rng(seed)
    draw, law = BESIDE[name]
    wet = rng.random(rows) < 0.5
    values = np.where(wet, draw(rng, rows), 0.0)
    if law is None:
        law, values_of = stats.lognorm(1.0), -values
    else:
        values_of = values
    return values[:, None], np.log(0.5) + np.where(
        wet, law.logpdf(np.where(wet, values_of, 1.0)), 0.0
    )


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_beside_an_atom_may_have_heavy_tails(name):
    density = TableDensity(inflated(name, 1000, seed=0)[0]).fit(steps=100)
    fresh, exact = inflated(name, 4000, seed=1)
    difference = density.log_prob(fresh) - exact
    assert abs(difference.mean()) < 0.1  # it was -0.7 for the lognormal, of single rows of -2000
    assert difference.min() > -20.0
    draws = density.sample(4000)["0"].to_numpy()
    assert np.isfinite(draws).all()
    ranks = stats.ks_2samp(draws[draws != 0], fresh[fresh != 0]).statistic
    assert ranks < 0.12


def test_values_on_the_other_side_of_an_atom_have_no_density():
    density = TableDensity(inflated("lognormal", 400, seed=0)[0]).fit(steps=5)
    two = np.column_stack([inflated("lognormal", 400, seed=s)[0][:, 0] for s in (0, 1)])
    both = TableDensity(two).fit(steps=5)
    assert density.log_prob(np.array([[-1.0]])) == -np.inf
    assert both.log_prob(np.array([[-1.0, 2.0]])) == -np.inf
    assert (density.sample(500)["0"] >= 0).all()


def test_a_rounded_column_is_continuous_and_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"a": rng.normal(size=300), "b": rng.normal(size=300).round(1)})
    checked = TableDensity(pd.concat([table] * 2)).table  # copies make no column a rounded one
    assert checked.rounded == {"b": table["b"].nunique()} and checked.atoms == {}
    table.to_csv(tmp_path / "t.csv", index=False)
    assert main(["fit", str(tmp_path / "t.csv"), "-o", str(tmp_path / "run"), *FIT]) == 0
    said = f"rounded, and treated as continuous: b ({table['b'].nunique()} values)"
    assert said in capsys.readouterr().out


def test_integers_atoms_and_copies_keep_apart():
    rng = np.random.default_rng(0)
    table = rain(400).assign(visits=rng.poisson(3.0, size=400))
    density = TableDensity(table, settings=SMALL).fit(steps=5)
    assert density.table.noisy == ["visits"] and set(density.table.atoms) == {"rain"}
    assert density.sample(20)["visits"].dtype == np.int64
    dry = check_table(rain()[["rain"]].to_numpy(), ("rain",), where="t")
    assert len(np.unique(dry.copies())) == len(dry.values)


def test_atoms_may_be_kept_as_a_density_and_need_values_beside_them():
    assert TableDensity(rain(), discrete="keep").table.atoms == {}
    rows = np.where(np.random.default_rng(0).random((200, 1)) < 0.5, 0.5, 0.25)
    with pytest.raises(TableError, match=r"few distinct values in 0 \(2\)"):
        TableDensity(rows)


def test_a_run_keeps_its_atoms(tmp_path, capsys):
    rain(300).to_csv(tmp_path / "rain.csv", index=False)
    run, scores = tmp_path / "run", tmp_path / "scores.csv"
    assert main(["fit", str(tmp_path / "rain.csv"), "-o", str(run), *FIT]) == 0
    assert "atoms in rain, which count by their probability: 0 in 5" in capsys.readouterr().out
    assert main(["score", str(run), str(tmp_path / "rain.csv"), "-o", str(scores)]) == 0
    test = pd.read_csv(run / "test.csv")
    found = pd.read_csv(scores)["log_prob"].to_numpy()[test["row"]]
    np.testing.assert_allclose(found, test["log_prob"], rtol=0, atol=1e-5)
    assert read_run(run).density.heads.atoms == {"rain": (0.0,)}
