r"""One and the same spline flow in this project, Pyro, nflows, normflows, zuko and flowjax.

Couplings of half masks that alternate, rational-quadratic splines with linear tails, conditioners with ReLU, a standard
normal base. Only the half that a coupling transforms goes through splines, and nothing mixes the dimensions but the
alternation, since every library can do that. All parameters are moved off their first values by the same noise.

Each library is called in the cheapest way that it documents. What differs all the same:

- pyro: ``SplineCoupling(identity=True, order="quadratic")`` with ``Permute`` reversing the dimensions in between,
  and a ``clear_cache()`` a step, without which it would answer a second call on the same tensor from its cache.
- nflows: ``PiecewiseRationalQuadraticCouplingTransform`` with this project's networks instead of its residual ones; it
  divides the logits by the square root of their width, in place.
- normflows: the layer under ``CoupledRationalQuadraticSpline``, which itself fixes a residual network and adds splines
  for the other half; ``sample`` gives the log-density too, always.
- zuko: ``GeneralCouplingTransform`` of ``MonotonicRQSTransform``; for draws ``Flow(flow.transform.inv, flow.base)``,
  its recipe for training by samples. "zuko NSF" is the flow of that name with ``passes=2``, whose networks also compute
  what the masks throw away. zuko turns the validation of ``torch.distributions`` off; the others run with it on.
- the autoregressive flows of zuko (``NSF`` as it comes) and nflows (feed-forward masked networks,
  ``ReversePermutation`` in between) compute densities in one pass and draws in D passes.
- flowjax: ``coupling_flow``, whose splines also learn the slopes at the bounds; compiled, with ``invert`` set for the
  density and for draws in turn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from benchmarks._setting import (
    NOISE,
    QUANTITIES,
    Conditioner,
    Setting,
    Task,
    TorchFlow,
    perturb,
    target_energy,
    torch_tasks,
)


def pyro_flow(setting: Setting) -> dict[str, Task]:
    import pyro.distributions as dist
    import pyro.distributions.transforms as T
    from pyro.nn import DenseNN

    passed = setting.dim // 2
    transformed = setting.dim - passed
    counts = (setting.count_bins, setting.count_bins, setting.count_bins - 1)
    layers: list[nn.Module] = []
    transforms: list[Any] = []
    for i in range(setting.num_couplings):
        network = DenseNN(passed, list(setting.hidden_dims), [transformed * n for n in counts])
        layers.append(
            T.SplineCoupling(
                setting.dim,
                passed,
                network,
                setting.count_bins,
                setting.bound,
                order="quadratic",
                identity=True,
            )
        )
        if i > 0:
            transforms.append(T.permute(setting.dim, torch.arange(setting.dim).flip(0)))
        transforms.append(layers[-1])
    parameters = perturb(layers)
    base = dist.Normal(torch.zeros(setting.dim), torch.ones(setting.dim)).to_event(1)
    flow = dist.TransformedDistribution(base, transforms)

    def log_prob(x: Tensor) -> Tensor:
        flow.clear_cache()
        return flow.log_prob(x)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        flow.clear_cache()
        x = flow.rsample(torch.Size([n]))
        return x, flow.log_prob(x)

    def sample(n: int) -> Tensor:
        flow.clear_cache()
        return flow.sample(torch.Size([n]))

    return torch_tasks(TorchFlow(log_prob, draw, sample, parameters), setting)


def nflows_flow(setting: Setting) -> dict[str, Task]:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform

    couplings = [
        PiecewiseRationalQuadraticCouplingTransform(
            (~mask).int(),
            partial(Conditioner, setting),
            num_bins=setting.count_bins,
            tails="linear",
            tail_bound=setting.bound,
        )
        for mask in setting.masks()
    ]
    flow = Flow(CompositeTransform(couplings), StandardNormal([setting.dim]))
    return torch_tasks(
        TorchFlow(flow.log_prob, flow.sample_and_log_prob, flow.sample, perturb([flow])), setting
    )


def nflows_autoregressive(setting: Setting) -> dict[str, Task]:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import (
        CompositeTransform,
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        ReversePermutation,
    )

    layers: list[nn.Module] = []
    for i in range(setting.num_couplings):
        if i > 0:
            layers.append(ReversePermutation(setting.dim))
        layers.append(
            MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                setting.dim,
                setting.hidden_dims[0],
                num_bins=setting.count_bins,
                tails="linear",
                tail_bound=setting.bound,
                num_blocks=len(setting.hidden_dims) - 1,
                use_residual_blocks=False,
            )
        )
    flow = Flow(CompositeTransform(layers), StandardNormal([setting.dim]))
    return torch_tasks(
        TorchFlow(flow.log_prob, flow.sample_and_log_prob, flow.sample, perturb([flow])), setting
    )


def normflows_flow(setting: Setting) -> dict[str, Task]:
    import normflows
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    class Layer(normflows.flows.Flow):
        """As ``CoupledRationalQuadraticSpline`` wraps it: the layer's inverse makes the draws."""

        def __init__(self, mask: Tensor):
            super().__init__()
            self.coupling = PiecewiseRationalQuadraticCoupling(
                (~mask).int(),
                partial(Conditioner, setting),
                num_bins=setting.count_bins,
                tails="linear",
                tail_bound=setting.bound,
            )

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            z, ladj = self.coupling.inverse(z)
            return z, ladj.view(-1)

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            z, ladj = self.coupling(z)
            return z, ladj.view(-1)

    base = normflows.distributions.DiagGaussian(setting.dim, trainable=False)
    flow = normflows.NormalizingFlow(base, [Layer(mask) for mask in setting.masks()])
    return torch_tasks(TorchFlow(flow.log_prob, flow.sample, flow.sample, perturb([flow])), setting)


def zuko_flow(setting: Setting, *, masked: bool = False, passes: int | None = 2) -> dict[str, Task]:
    zuko = _zuko()
    hidden: dict[str, Any] = {"hidden_features": setting.hidden_dims, "activation": nn.ReLU}
    if masked:
        flow = zuko.flows.NSF(
            setting.dim,
            transforms=setting.num_couplings,
            bins=setting.count_bins,
            passes=passes,
            **hidden,
        )
    else:
        bins = setting.count_bins
        couplings = [
            zuko.flows.coupling.GeneralCouplingTransform(
                setting.dim,
                mask=mask,
                univariate=partial(zuko.transforms.MonotonicRQSTransform, bound=setting.bound),
                shapes=[(bins,), (bins,), (bins - 1,)],
                **hidden,
            )
            for mask in setting.masks()
        ]
        zeros, ones = torch.zeros(setting.dim), torch.ones(setting.dim)
        base = zuko.lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal, zeros, ones, buffer=True
        )
        flow = zuko.lazy.Flow(couplings, base)
    sampler = flow if passes is None else zuko.lazy.Flow(flow.transform.inv, flow.base)
    return _zuko_tasks(flow, sampler, setting)


def zuko_continuous(setting: Setting) -> dict[str, Task]:
    """zuko's ``CNF`` as it comes, with an exact trace and its adaptive solver."""
    flow = _zuko().flows.CNF(setting.dim, hidden_features=setting.hidden_dims)
    return _zuko_tasks(flow, flow, setting)


def _zuko() -> Any:
    validation = Distribution._validate_args
    import zuko

    Distribution.set_default_validate_args(validation)  # which zuko turns off for everyone
    return zuko


def _zuko_tasks(flow: Any, sampler: Any, setting: Setting) -> dict[str, Task]:
    tasks = torch_tasks(
        TorchFlow(
            lambda x: flow().log_prob(x),
            lambda n: sampler().rsample_and_log_prob((n,)),
            lambda n: sampler().sample((n,)),
            perturb([flow]),
        ),
        setting,
    )
    return {quantity: partial(_without_validation, task) for quantity, task in tasks.items()}


def _without_validation(task: Task) -> object:
    validation = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        return task()
    finally:
        Distribution.set_default_validate_args(validation)


def flowjax_flow(setting: Setting) -> dict[str, Task]:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import StandardNormal
    from flowjax.flows import coupling_flow

    key = jax.random.key(0)

    def make(*, invert: bool) -> tuple[Any, Any]:
        flow = coupling_flow(
            key,
            base_dist=StandardNormal((setting.dim,)),
            transformer=RationalQuadraticSpline(
                knots=setting.count_bins - 1, interval=setting.bound
            ),
            flow_layers=setting.num_couplings,
            nn_width=setting.hidden_dims[0],
            nn_depth=len(setting.hidden_dims),
            invert=invert,
        )
        params, static = eqx.partition(flow, eqx.is_inexact_array)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        leaves = [
            leaf + NOISE * jax.random.normal(k, leaf.shape)
            for leaf, k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(tree, leaves), static

    density, density_static = make(invert=True)
    sampler, sampler_static = make(invert=False)

    def nll(params: Any, x: Any) -> Any:
        return -eqx.combine(params, density_static).log_prob(x).mean()

    def kl(params: Any, key: Any) -> Any:
        flow = eqx.combine(params, sampler_static)
        draws, log_prob = flow.sample_and_log_prob(key, (setting.batch,))
        return (log_prob + target_energy(draws)).mean()

    log_prob = jax.jit(lambda params, x: eqx.combine(params, density_static).log_prob(x))
    sample = jax.jit(
        lambda params, key: eqx.combine(params, sampler_static).sample(key, (setting.batch,))
    )
    train, vi = jax.jit(jax.value_and_grad(nll)), jax.jit(jax.value_and_grad(kl))
    x = jnp.asarray(setting.points().numpy())

    def ready(function: Callable, *args: Any) -> object:
        return jax.block_until_ready(function(*args))

    tasks = (
        partial(ready, log_prob, density, x),
        partial(ready, train, density, x),
        partial(ready, vi, sampler, key),
        partial(ready, sample, sampler, key),
    )
    return dict(zip(QUANTITIES, tasks, strict=True))
