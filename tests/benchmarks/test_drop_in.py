"""Runs of a guide in the place of another are kept, told apart and judged as they are."""

import math

import pytest
import torch

from benchmarks import _drop_in_runs, drop_in
from benchmarks._drop_in_report import OURS, THEIRS, compare, lines, verdicts
from benchmarks._drop_in_runs import Cell, Run, append, read, train
from models._drop_in_more import Bend

FAST = ["--fast", "--programs", "plane", "--rates", "0.01", "--particles", "1", "--seeds", "0"]


def run(guide: str, elbo: dict[int, float], *, program="p", seed=0, fault=None, se=0.01) -> Run:
    step = max(elbo, default=0) + 1 if fault else None
    return Run(
        Cell(program, guide, 0.01, 8, seed),
        (300, 2000),
        elbo,
        dict.fromkeys(elbo, se),
        fault,
        step,
        ms=2.5,
    )


def test_a_command_that_was_stopped_goes_on(tmp_path, capsys) -> None:
    path, report = tmp_path / "runs.jsonl", tmp_path / "drop_in.md"
    arguments = [*FAST, "--runs", str(path), "--output", str(report)]
    drop_in.main([*arguments, "--guides", THEIRS])
    assert not report.exists()
    kept = path.read_text()
    path.write_text(kept + '{"program": "inclined pl')  # the process ended while it wrote
    found = drop_in.main(arguments)
    text = path.read_text()
    assert text.startswith(kept) and text.count("\n") == 2
    assert [r.cell.guide for r in read(path)] == [THEIRS, OURS]
    assert "inclined plane" in report.read_text()
    capsys.readouterr()
    assert drop_in.main(arguments) == found
    assert path.read_text() == text
    assert " particles 1 " not in capsys.readouterr().out  # no training was reported


def test_runs_of_other_steps_are_not_taken_for_those_asked_for(tmp_path) -> None:
    path = tmp_path / "runs.jsonl"
    drop_in.main([*FAST, "--runs", str(path), "--guides", THEIRS])
    drop_in.main([*FAST, "--runs", str(path), "--guides", THEIRS, "--steps", "2"])
    assert [r.steps for r in read(path)] == [(2, 4), (2,)]


@pytest.mark.parametrize("guide", [OURS, THEIRS])
def test_an_elbo_on_the_way_leaves_the_training_as_it_was(guide) -> None:
    cell = Cell("banana", guide, 0.01, 1, 3)
    alone = train(cell, steps=(4,), draws=100, batch=50)
    both = train(cell, steps=(2, 4), draws=100, batch=50)
    assert both.elbo[4] == alone.elbo[4]
    assert both.elbo[2] != both.elbo[4]


@pytest.mark.parametrize(
    "end, message",
    [
        (math.nan, "FloatingPointError: the loss is NaN"),
        (ValueError("no\n  such"), "ValueError: no such"),
    ],
)
def test_a_run_that_fails_is_recorded_with_its_step(monkeypatch, end, message) -> None:
    class Scripted:
        def __init__(self, *_: object):
            self.losses = iter((math.inf, 1.0, end))

        def step(self) -> float:
            loss = next(self.losses)
            if isinstance(loss, Exception):
                raise loss
            return loss

    monkeypatch.setattr(_drop_in_runs, "SVI", Scripted)
    found = train(Cell("banana", THEIRS, 0.01, 1, 0), steps=(2, 5), draws=100, batch=50)
    assert (found.fault, found.fault_step, found.infinite) == (message, 3, 1)
    assert list(found.elbo) == [2] and math.isfinite(found.elbo[2])


def test_a_run_survives_its_file(tmp_path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    one = run(OURS, {300: -math.inf, 2000: -5.25}, fault="ValueError: so")
    append(path, one)
    append(path, run(THEIRS, {300: -7.0}))
    assert read(path)[0] == one
    assert len(read(path)) == 2
    assert read(tmp_path / "none.jsonl") == []


def test_verdicts_count_what_was_asked() -> None:
    runs = [
        run(THEIRS, {300: -50.0, 2000: -50.0}, program="level"),
        run(OURS, {300: -50.09, 2000: -49.0}, program="level"),
        run(THEIRS, {300: -500.0, 2000: -500.0}, program="below"),
        run(OURS, {300: -504.0, 2000: -506.0}, program="below"),
        run(THEIRS, {300: -0.7, 2000: -0.7}, program="small"),
        run(OURS, {300: -0.75, 2000: -0.69}, program="small"),
        run(THEIRS, {300: -9.0}, program="alone", fault="the loss is NaN"),
        run(OURS, {300: -8.0, 2000: -7.0}, program="alone"),
        run(THEIRS, {300: -9.0, 2000: -9.0}, program="lost"),
        run(OURS, {300: math.nan}, program="lost", fault="the loss is NaN"),
    ]
    cells = compare(runs, (300, 2000))
    assert len(cells) == 10
    differences = {(c.program, c.steps): c.difference for c in cells}
    assert differences["below", 2000] == -6.0
    assert differences["alone", 2000] == math.inf
    assert differences["lost", 300] == differences["lost", 2000] == -math.inf
    level = {key for key, cell in zip(differences, cells, strict=True) if cell.is_level}
    assert level == {
        *((name, n) for name in ("level", "small", "alone") for n in (300, 2000)),
    }
    far = {(c.program, c.steps) for c in cells if c.is_far_below}
    assert far == {("below", 2000), ("lost", 300), ("lost", 2000)}
    # 1 % of .7 nats is less than the tolerance
    assert {(c.program, c.steps) for c in cells if c.is_below_by_share} == far | {("small", 300)}
    better = {(c.program, c.steps) for c in cells if c.is_better}
    assert better == {("level", 2000), ("alone", 300), ("alone", 2000)}
    faults, shares, never, programs = verdicts(runs, (300, 2000))
    assert faults[1:] == ("1 of 5 do", False)
    assert shares[1:] == ("6 of 10, 60.0%", False)
    assert never[1:] == ("3 are; 4 by the share alone, beyond their error", False)
    assert programs[1].startswith("2 of 5 at the median") and not programs[2]
    text = "\n".join(lines(runs, (300, 2000)))
    assert "**-6.00 (0.01)**" in text and "ahead" in text and "**none" in text


def test_verdicts_hold_where_all_is_well() -> None:
    names = [f"program {i}" for i in range(10)]
    runs = [
        run(guide, {300: value, 2000: value + 1}, program=name, seed=seed)
        for name in names
        for seed in range(2)
        for guide, value in ((THEIRS, -12.0), (OURS, -11.0))
    ]
    assert all(holds for *_, holds in verdicts(runs, (300, 2000)))
    nothing = verdicts([], (300, 2000))
    assert not any(holds for *_, holds in nothing)


def test_the_banana_has_volume_one() -> None:
    bend, x = Bend(1.15, 1.0), torch.randn(5, 2, dtype=torch.float64)
    y = bend(x)
    torch.testing.assert_close(bend.inv(y), x)
    jacobians = torch.func.vmap(torch.func.jacrev(bend._call))(x)
    torch.testing.assert_close(
        jacobians.det().abs().log(), bend.log_abs_det_jacobian(x, y), atol=1e-12, rtol=0
    )
