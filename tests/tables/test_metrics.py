"""Verdicts on densities of tables follow from their numbers."""

import pytest

from pyro_flowkit.tables.metrics import table_verdict


def difference(value, error=0.01):
    return {
        "rows": 40,
        "log_prob": [0.0, 0.1],
        "gaussian": [0.0, 0.1],
        "difference": [value, error],
    }


METRICS = {
    "kept": "flow",
    "columns": 3,
    "steps": 120,
    "skipped_steps": 0,
    "stop_reason": "max_steps",
    "train": difference(1.0),
    "test": difference(1.0),
}


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"train": difference(1.0), "test": difference(1.0)}, "good", "above"),
        ({"train": difference(1.0), "test": difference(-0.2)}, "bad", "below"),
        ({"train": difference(2.0), "test": difference(1.0)}, "usable", "1.000 more on the rows"),
        ({"train": difference(1.05), "test": difference(1.0)}, "good", "above"),
        ({"kept": "gaussian"}, "usable", "gained nothing"),
        (
            {"skipped_steps": 50, "train": difference(1.0), "test": difference(1.0)},
            "bad",
            "broke down",
        ),
        (
            {"stop_reason": "non-finite at step 3", "train": difference(1), "test": difference(1)},
            "bad",
            "broke down",
        ),
        (
            {"stop_reason": "interrupted", "train": difference(1), "test": difference(1)},
            "usable",
            "interrupted",
        ),
    ],
)
def test_the_verdict_follows_from_the_numbers(changes, level, words):
    verdict = table_verdict({**METRICS, **changes})
    assert verdict.level == level
    assert words in str(verdict)
