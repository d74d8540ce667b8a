"""Adam in one call of PyTorch's fused kernel, for the many small parameters of a flow."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

IS_POSSIBLE = (
    hasattr(torch, "_fused_adam_")
    and hasattr(torch, "_foreach_add_")
    and hasattr(torch_optimizer, "_global_optimizer_pre_hooks")
    and hasattr(torch_optimizer, "_global_optimizer_post_hooks")
)
"""Whether PyTorch has what :class:`Adam` is made of, which it does not promise."""


def _bare(method: Any) -> Any:
    """A method without the wrapper that keeps PyTorch's compiler out, and imports it for that: a second and a half."""
    return getattr(method, "__wrapped__", method)


class Adam(torch.optim.Adam):
    """``torch.optim.Adam(fused=True)`` with the same numbers and the same state.

    With twenty parameters of a thousand numbers two thirds of its step are spent around the kernel: on profiling, on
    sorting by device, and on a count of steps for every parameter. Parameters that began together share a count here.
    """

    add_param_group = _bare(torch.optim.Optimizer.add_param_group)
    zero_grad = _bare(torch.optim.Optimizer.zero_grad)
    state_dict = _bare(torch.optim.Optimizer.state_dict)
    load_state_dict = _bare(torch.optim.Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of all parameters that have a gradient; hooks are called as by every optimizer.

        Args:
            closure: evaluated first, with gradients; its value is returned.
        """
        arguments = () if closure is None else (closure,)
        for hook in _all(
            self._optimizer_step_pre_hooks, torch_optimizer._global_optimizer_pre_hooks
        ):
            hook(self, arguments, {})
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        for hook in _all(
            self._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks
        ):
            hook(self, arguments, {})
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # else PyTorch would call the hooks, too

    def _step_group(self, group: dict[str, Any]) -> None:
        moving = [p for p in group["params"] if p.grad is not None]
        self._begin([p for p in moving if not self.state[p]])
        if len(moving) < len(group["params"]):
            self._part(moving, group["params"])
        for kind in {(p.dtype, p.device) for p in moving}:
            parameters = [p for p in moving if (p.dtype, p.device) == kind]
            states = [self.state[p] for p in parameters]
            counts = [state["step"] for state in states]
            torch._foreach_add_(list({id(count): count for count in counts}.values()), 1)
            beta1, beta2 = group["betas"]
            torch._fused_adam_(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                counts,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )

    def _begin(self, parameters: list[Tensor]) -> None:
        """Give parameters their state, with one count of steps for all of a kind."""
        counts: dict[Any, Tensor] = {}
        for p in parameters:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError("Expected dense gradients for Adam, got sparse ones")
            count = counts.setdefault((p.dtype, p.device), torch.zeros((), device=p.device))
            first, second = torch.zeros_like(p), torch.zeros_like(p)
            self.state[p].update(step=count, exp_avg=first, exp_avg_sq=second)

    def _part(self, moving: list[Tensor], everyone: list[Tensor]) -> None:
        """Let parameters that move count by themselves where others do not move."""
        ids = {id(p) for p in moving}
        kept = {
            id(self.state[p]["step"]) for p in everyone if id(p) not in ids and self.state.get(p)
        }
        counts: dict[int, Tensor] = {}
        for p in moving:
            count = self.state[p]["step"]
            if id(count) in kept:
                self.state[p]["step"] = counts.setdefault(id(count), count.clone())


def _all(*hooks: Mapping[int, Callable[..., Any]]) -> Iterator[Callable[..., Any]]:
    return chain.from_iterable(of_one.values() for of_one in hooks)
