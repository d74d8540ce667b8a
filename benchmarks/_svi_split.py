"""Where the time of a step goes: model, guide, densities, gradient, optimizer; and the functions behind it."""

import cProfile
import io
import pstats
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from pyro.poutine import Trace

from benchmarks._svi_models import LR, loop_step, make_elbo
from models._targets import Target

PARTS = (
    "guide",
    "guide's densities",
    "model",
    "model's densities",
    "rest of the ELBO",
    "backward",
    "optimizer",
)
WARM_UP = 2


class Stopwatch:
    """CPU seconds by part; what runs in a part within a part is counted for the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run

    def _charge(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._mark
        self._mark = now


def split(problem: Target, guide: Any, num_particles: int, steps: int) -> dict[str, float]:
    """CPU milliseconds of each part of a step by hand, the mean over the steps.

    Pyro's handlers are counted where they run: with the guide, with the model, or as the rest of the ELBO.
    """
    watch = Stopwatch()
    elbo = make_elbo(num_particles)
    optimizer = torch.optim.Adam(guide.parameters(), lr=LR, fused=True)
    timed_guide = watch.timed("guide", guide)
    timed_model = watch.timed("model", problem.model)
    densities = {
        "compute_score_parts": "guide's densities",
        "compute_log_prob": "model's densities",
    }
    patches = [
        mock.patch.object(Trace, method, watch.timed(name, getattr(Trace, method)))
        for method, name in densities.items()
    ]
    with patches[0], patches[1]:
        for i in range(WARM_UP + steps):
            if i == WARM_UP:
                watch.seconds.clear()
            with watch.part("rest of the ELBO"):
                loss = elbo.differentiable_loss(timed_model, timed_guide, *problem.args)
            with watch.part("optimizer"):
                optimizer.zero_grad()
            with watch.part("backward"):
                loss.backward()
            with watch.part("optimizer"):
                optimizer.step()
    return {name: watch.seconds[name] * 1e3 / steps for name in PARTS}


def profiles(problem: Target, guide: Any, num_particles: int, steps: int) -> list[str]:
    """The Python functions and the PyTorch operations that take the most time of a step by hand."""
    step = loop_step(problem, guide, num_particles)
    for _ in range(WARM_UP):
        step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        step()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(25)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as operations:
        for _ in range(steps):
            step()
    averages = operations.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
    return [line for block in (text.getvalue(), averages) for line in block.splitlines()]
