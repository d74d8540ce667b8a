import pytest

from benchmarks import program_styles
from models._styles import regression


def test_a_row_has_both_styles_and_a_walk_its_weight(monkeypatch, capsys):
    monkeypatch.setattr(program_styles, "MODELS", {"regression": regression})
    monkeypatch.setattr(program_styles, "STEPS", 5)
    monkeypatch.setattr(program_styles, "TIMES", 8)
    ((name, elbo, other, apart, warned, *_, ratio),) = program_styles.both_styles(3)
    assert name == "regression"
    assert float(elbo) == pytest.approx(float(other), abs=1e-3)
    assert float(apart) < 1e-3 and warned == "0" and float(ratio) > 0
    capsys.readouterr()
    program_styles.weigh("site_by_site")
    seconds, megabytes, step, reason = capsys.readouterr().out.rstrip("\n").split("\t")
    assert float(seconds) > 0 and float(megabytes) < 200 and "(" in step
    assert reason == ""  # it is recorded
