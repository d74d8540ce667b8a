"""What is built and measured: the sizes of a flow, the four quantities, and the conditioners as the floor."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flowkit.nn import MLP
from pyro_flowkit.transforms.masks import half_mask

QUANTITIES = ("log_prob", "training step", "VI step", "sampling")
NOISE = 0.05

Task = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """A flow and a batch: what every library builds alike."""

    dim: int
    batch: int
    num_couplings: int = 8
    count_bins: int = 8
    hidden_dims: tuple[int, ...] = (64, 64)
    bound: float = 5.0

    def masks(self) -> list[Tensor]:
        """Of each coupling; True = passed through to the conditioner."""
        return [half_mask(self.dim, flip=i % 2 == 1) for i in range(self.num_couplings)]

    def points(self) -> Tensor:
        return torch.randn(self.batch, self.dim, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class TorchFlow:
    """A flow in PyTorch: its density, draws with their log-density and gradient, draws alone, parameters."""

    log_prob: Callable[[Tensor], Tensor]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    sample: Callable[[int], object]
    parameters: Sequence[Tensor]


def target_energy(x: Any) -> Any:
    """Minus the log-density of the toy target of the VI step."""
    return 0.5 * (x * x).sum(-1)


def torch_tasks(flow: TorchFlow, setting: Setting) -> dict[str, Task]:
    """The four quantities of a flow in PyTorch, as calls without arguments."""
    x = setting.points()

    def backward(loss: Tensor) -> None:
        for parameter in flow.parameters:
            parameter.grad = None
        loss.backward()

    def training_step() -> None:
        backward(-flow.log_prob(x).mean())

    def vi_step() -> None:
        draws, log_prob = flow.draw(setting.batch)
        backward((log_prob + target_energy(draws)).mean())

    tasks = (
        partial(torch.no_grad()(flow.log_prob), x),
        training_step,
        vi_step,
        partial(torch.no_grad()(flow.sample), setting.batch),
    )
    return dict(zip(QUANTITIES, tasks, strict=True))


@torch.no_grad()
def perturb(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Add the same kind of noise to all parameters; returns them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [p for module in modules for p in module.parameters()]
    for p in parameters:
        p.add_(NOISE * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return parameters


class Conditioner(MLP):
    """This project's network, as nflows and normflows call it and ask for its width."""

    def __init__(self, setting: Setting, input_dim: int, output_dim: int):
        super().__init__(input_dim, output_dim, setting.hidden_dims)
        self.hidden_features = setting.hidden_dims[-1]


def conditioners(setting: Setting) -> dict[str, Task]:
    """The networks alone, on the halves of the points: forward where nothing is learned, else backward as well."""
    passed = setting.dim // 2
    num_params = (setting.dim - passed) * (3 * setting.count_bins - 1)
    networks = [Conditioner(setting, passed, num_params) for _ in range(setting.num_couplings)]
    parameters = perturb(networks)
    x = setting.points()[:, :passed].contiguous().requires_grad_()
    gradients = [torch.randn(setting.batch, num_params) for _ in networks]

    @torch.no_grad()
    def forward() -> None:
        for network in networks:
            network(x)

    def step() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        torch.autograd.backward([network(x) for network in networks], gradients)

    return dict(zip(QUANTITIES, (forward, step, step, forward), strict=True))
