"""This project's flows as the benchmarks run them, and the list of all competitors.

Like for like with the other libraries: couplings with ``identity=True`` and nothing between them. The defaults are what
``SplineFlow`` builds when only sizes are given: splines for both halves, LU layers in between, and in the VI step the
path gradient.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import _peers
from benchmarks._setting import Setting, Task, TorchFlow, conditioners, perturb, torch_tasks
from models._measure import is_installed
from pyro_flowkit import ContinuousFlow, FlowDistribution, SplineFlow, ops
from pyro_flowkit.transforms import spline_autoregressive, spline_coupling

FUSED = "pyro_flowkit, fused"
REFERENCE = "pyro_flowkit, reference"
DEFAULTS = "pyro_flowkit, defaults"
COMPILED = "pyro_flowkit, compiled"
CONDITIONERS = "conditioners alone"
CONTINUOUS = "pyro_flowkit, continuous"
CONTINUOUS_STEPS = 16
MATCHING_STEP = "matching step"


def like_for_like(setting: Setting) -> tuple[FlowDistribution, list[Tensor]]:
    """The flow that every library has, and its parameters."""
    couplings = [
        spline_coupling(
            setting.dim,
            hidden_dims=setting.hidden_dims,
            count_bins=setting.count_bins,
            bound=setting.bound,
            mask=mask,
            identity=True,
        )
        for mask in setting.masks()
    ]
    parameters = perturb(couplings)
    base = dist.Normal(torch.zeros(setting.dim), torch.ones(setting.dim)).to_event(1)
    return FlowDistribution(base, couplings), parameters


def same_flow(setting: Setting) -> dict[str, Task]:
    flow, parameters = like_for_like(setting)
    return torch_tasks(
        TorchFlow(
            flow.log_prob, lambda n: flow.rsample_and_log_prob((n,)), _sampler(flow), parameters
        ),
        setting,
    )


def compiled_flow(setting: Setting) -> dict[str, Task]:
    flow, parameters = like_for_like(setting)
    log_prob = torch.compile(flow.log_prob)
    draw = torch.compile(flow.rsample_and_log_prob)
    return torch_tasks(
        TorchFlow(log_prob, lambda n: draw((n,)), lambda n: draw((n,)), parameters), setting
    )


def default_flow(setting: Setting) -> dict[str, Task]:
    pyro.clear_param_store()
    flow = SplineFlow(
        setting.dim,
        num_transforms=setting.num_couplings,
        hidden_dims=setting.hidden_dims,
        count_bins=setting.count_bins,
        bound=setting.bound,
    )
    parameters = perturb([flow])

    def draw(n: int) -> tuple[Tensor, Tensor]:
        distribution = flow(path_gradient=True)
        x = distribution.rsample((n,))
        return x, distribution.score_parts(x).entropy_term

    return torch_tasks(TorchFlow(flow.log_prob, draw, flow.sample, parameters), setting)


def autoregressive_flow(setting: Setting) -> dict[str, Task]:
    """Autoregressive layers whose order alternates, with nothing between them."""
    order = torch.arange(setting.dim)
    layers = [
        spline_autoregressive(
            setting.dim,
            setting.hidden_dims,
            setting.count_bins,
            setting.bound,
            permutation=order.flip(0) if i % 2 else order,
        ).inv
        for i in range(setting.num_couplings)
    ]
    parameters = perturb(layers)
    base = dist.Normal(torch.zeros(setting.dim), torch.ones(setting.dim)).to_event(1)
    flow = FlowDistribution(base, layers)
    return torch_tasks(
        TorchFlow(
            flow.log_prob, lambda n: flow.rsample_and_log_prob((n,)), _sampler(flow), parameters
        ),
        setting,
    )


def continuous_flow(setting: Setting) -> dict[str, Task]:
    """The flow of a field with a block for each of the settings' layers, in 16 fixed steps; and flow matching."""
    pyro.clear_param_store()
    flow = ContinuousFlow(setting.dim, hidden_dims=setting.hidden_dims, num_steps=CONTINUOUS_STEPS)
    parameters = perturb([flow])
    x = setting.points()

    def matching_step() -> None:
        for parameter in parameters:
            parameter.grad = None
        flow.matching_loss(x).mean().backward()

    def draw(n: int) -> tuple[Tensor, Tensor]:
        return flow().rsample_and_log_prob((n,))

    tasks = torch_tasks(TorchFlow(flow.log_prob, draw, flow.sample, parameters), setting)
    return {**tasks, MATCHING_STEP: matching_step}


def _sampler(flow: FlowDistribution) -> Callable[[int], Tensor]:
    return lambda n: flow.sample((n,))


def in_reference(build: Callable[[Setting], dict[str, Task]], setting: Setting) -> dict[str, Task]:
    """Tasks that run on the PyTorch reference of the spline."""

    def run(task: Task) -> object:
        with ops.use_reference():
            return task()

    return {quantity: partial(run, task) for quantity, task in build(setting).items()}


BUILDERS: dict[str, Callable[[Setting], dict[str, Task]]] = {
    FUSED: same_flow,
    REFERENCE: partial(in_reference, same_flow),
    COMPILED: compiled_flow,
    DEFAULTS: default_flow,
    "pyro": _peers.pyro_flow,
    "nflows": _peers.nflows_flow,
    "normflows": _peers.normflows_flow,
    "zuko": _peers.zuko_flow,
    "zuko NSF": partial(_peers.zuko_flow, masked=True),
    "flowjax": _peers.flowjax_flow,
    CONDITIONERS: conditioners,
}
"""Every competitor by the name it has in the tables."""

PEERS = tuple(BUILDERS)[4:-1]


AUTOREGRESSIVE = "pyro_flowkit, autoregressive"
AUTOREGRESSIVE_BUILDERS: dict[str, Callable[[Setting], dict[str, Task]]] = {
    AUTOREGRESSIVE: autoregressive_flow,
    "nflows autoregressive": _peers.nflows_autoregressive,
    "zuko autoregressive": partial(_peers.zuko_flow, masked=True, passes=None),
}
"""The autoregressive flows, which are compared with one another."""

CONTINUOUS_BUILDERS: dict[str, Callable[[Setting], dict[str, Task]]] = {
    CONTINUOUS: continuous_flow,
    "zuko continuous": _peers.zuko_continuous,
}
"""The continuous flows, which are compared with one another."""


def missing() -> list[str]:
    """Competitors that this environment cannot run."""
    peers = [*PEERS, *list(AUTOREGRESSIVE_BUILDERS)[1:], *list(CONTINUOUS_BUILDERS)[1:]]
    absent = [name for name in peers if not is_installed(name.split()[0])]
    return absent if ops.backend() == "fused" else [FUSED, *absent]


def float32_errors(setting: Setting) -> dict[str, float]:
    """Largest error of a float32 log-density (nats), against the reference in float64, over the points."""
    flow, _ = like_for_like(setting)
    x = setting.points()
    wide = copy.deepcopy(flow.transforms)
    base = dist.Normal(torch.zeros(setting.dim).double(), torch.ones(setting.dim).double())
    exact_flow = FlowDistribution(base.to_event(1), [t.double() for t in wide])
    paths: dict[str, AbstractContextManager[object]] = {REFERENCE: ops.use_reference()}
    if ops.backend() == "fused":
        paths[FUSED] = nullcontext()
    with torch.no_grad():
        with ops.use_reference():
            exact = exact_flow.log_prob(x.double())
        errors = {}
        for name, path in paths.items():
            with path:
                errors[name] = float((flow.log_prob(x).double() - exact).abs().max())
    return errors
