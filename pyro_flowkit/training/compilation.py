"""``compile=True``: the part of a step that ``torch.compile`` can take, if that is faster, and in words what was done.

That part is ``log_prob`` of a flow with an exact likelihood, and the density of a recorded model with its derivative.
The draws of a guide and the layers of a flow run in the fused kernel on a CPU, and by PyTorch's operations elsewhere. A
model that is not recorded is Python that handlers look into at every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pyro_flowkit.ops import backend
from pyro_flowkit.training.losses import Batch, MaximumLikelihood
from pyro_flowkit.training.variational import Variational

REPEATS = 5
MIN_GAIN = 1.1


def compile_where_it_pays(loss: MaximumLikelihood | Variational, batch: Batch) -> str:
    """Compiles what ``torch.compile`` makes at least a tenth faster; says what was done, and why."""
    if not isinstance(loss, MaximumLikelihood):
        return _compile_density(loss, batch)
    if backend() == "fused" and all(p.device.type == "cpu" for p in loss.parameters()):
        return "nothing compiled: on this CPU the flow runs in the fused kernel, which the compiler only calls"
    eager = loss.log_prob
    compiled: Callable[..., torch.Tensor] = torch.compile(eager)
    before = _seconds(loss, batch)
    loss.log_prob = compiled
    try:
        after = _seconds(loss, batch)
    except Exception as error:  # whatever the compiler may raise; the fit goes on without it
        loss.log_prob = eager
        return _failed(error)
    change = f"{1e3 * before:.3g} ms before, {1e3 * after:.3g} ms compiled"
    if after * MIN_GAIN > before:
        loss.log_prob = eager
        return f"nothing compiled: log_prob and its gradient took {change}"
    return f"log_prob compiled: with its gradient it took {change}"


def _compile_density(loss: Variational, batch: Batch) -> str:
    graph = loss.density_graph(batch)
    if graph is None:
        return "nothing compiled: a Pyro program runs in Python, under handlers that torch.compile cannot see through"
    plain = graph.run
    before = _seconds_of(lambda: plain(*graph.example))
    try:
        graph.compile()
    except Exception as error:  # whatever the compiler may raise; the fit goes on without it
        return _failed(error)
    after = _seconds_of(lambda: graph.run(*graph.example))
    change = f"{1e3 * before:.3g} ms before, {1e3 * after:.3g} ms compiled"
    if after * MIN_GAIN > before:
        graph.run = plain
        return f"nothing compiled: the model's density and its derivative took {change}"
    return f"the model's density compiled: with its derivative it took {change}"


def _failed(error: Exception) -> str:
    text = str(error).strip() or "without a word"
    return f"nothing compiled: {type(error).__name__}: {text.splitlines()[0][:200]}"


def _seconds_of(call: Callable[[], object]) -> float:
    """The fastest of a few calls, the first left out."""
    times = []
    for _ in range(1 + REPEATS):
        begun = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _seconds(loss: MaximumLikelihood, batch: Batch) -> float:
    """Of an evaluation that leaves neither gradients nor noise behind."""

    def evaluate() -> None:
        torch.autograd.grad(loss.loss(batch), loss.parameters(), allow_unused=True)

    with torch.random.fork_rng():
        return _seconds_of(evaluate)
