"""``compile=True``: the part of a step that ``torch.compile`` can take, if that is faster, and in words what was done.

That part is ``log_prob`` of a flow with an exact likelihood. A Pyro program is Python that handlers look into at every
step; its flows run in the fused kernel on a CPU, and by PyTorch's operations elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pyro_flowkit.ops import backend
from pyro_flowkit.training.losses import Batch, MaximumLikelihood, Variational

REPEATS = 5
MIN_GAIN = 1.1


def compile_where_it_pays(loss: MaximumLikelihood | Variational, batch: Batch) -> str:
    """Compiles the flow's ``log_prob`` if a step is then at least a tenth faster; says what was done, and why."""
    if not isinstance(loss, MaximumLikelihood):
        return "nothing compiled: a Pyro program runs in Python, under handlers that torch.compile cannot see through"
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
        return (
            f"nothing compiled: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        )
    change = f"{1e3 * before:.3g} ms before, {1e3 * after:.3g} ms compiled"
    if after * MIN_GAIN > before:
        loss.log_prob = eager
        return f"nothing compiled: log_prob and its gradient took {change}"
    return f"log_prob compiled: with its gradient it took {change}"


def _seconds(loss: MaximumLikelihood, batch: Batch) -> float:
    """The fastest of a few evaluations, the first left out, without leaving gradients or noise behind."""
    times = []
    with torch.random.fork_rng():
        for _ in range(1 + REPEATS):
            begun = time.perf_counter()
            torch.autograd.grad(loss.loss(batch), loss.parameters(), allow_unused=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return min(times[1:])
