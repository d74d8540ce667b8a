"""The private names of other libraries that the package leans on: all are listed, all are there."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import pyro_flowkit
from pyro_flowkit import SplineFlow
from pyro_flowkit._private_names import PRIVATE_NAMES
from pyro_flowkit.ops import scratch
from pyro_flowkit.ops.eager import was_made_by

ROOT = Path(pyro_flowkit.__file__).parent
# of every class made by these, whether it wants them or not
OF_METACLASSES = {"_abc_impl", "_is_protocol", "_is_runtime_protocol", "_backward_cls"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def trees() -> Iterator[ast.AST]:
    for path in ROOT.rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def defined(node: ast.AST) -> Iterator[str]:
    """Names that a piece of code defines: functions, classes, variables, attributes, tensors of modules."""
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            yield node.name
        case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
            yield name
        case ast.Assign():
            yield from (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
        case ast.Attribute(ctx=ast.Store()):
            yield node.attr
        case ast.Call(
            func=ast.Attribute(attr="register_buffer"), args=[ast.Constant(value=name), *_]
        ):
            yield str(name)


def used(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Attribute():
            yield node.attr
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str() as name), *_]
        ):
            yield name
        case ast.ImportFrom(module=str() as module) if not module.startswith("pyro_flowkit"):
            yield from module.split(".")
            yield from (alias.name for alias in node.names)


def classes() -> Iterator[type]:
    for found in pkgutil.walk_packages(pyro_flowkit.__path__, "pyro_flowkit."):
        if found.name.rpartition(".")[2] not in ("__main__", "_fused", "lightning"):
            for value in vars(importlib.import_module(found.name)).values():
                if inspect.isclass(value) and value.__module__ == found.name:
                    yield value


def test_every_private_name_that_the_code_uses_is_listed() -> None:
    own = {name for node in trees() for name in defined(node)}
    foreign = {name for node in trees() for name in used(node) if is_private(name)} - own
    assert "_storage_Use_Count" in foreign, "the search finds what there is"
    assert foreign - {name for _, name in PRIVATE_NAMES} == set()


def test_every_private_name_that_a_class_redefines_is_listed() -> None:
    redefined = {
        name
        for of in classes()
        for name in vars(of)
        for base in of.__mro__[1:]
        if is_private(name)
        and not base.__module__.startswith("pyro_flowkit")
        and name in vars(base)
    } - OF_METACLASSES
    assert "_setup_prototype" in redefined, "the search finds what there is"
    assert redefined - {name for _, name in PRIVATE_NAMES} == set()


def test_no_name_is_listed_that_the_code_does_not_have() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for path in ROOT.rglob("*.py")
        if path.name != "_private_names.py"
    )
    unused = [
        name for _, name in PRIVATE_NAMES if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code)
    ]
    assert unused == []


def find(owner: str) -> Any:
    parts, index = owner.split("."), 1
    found: Any = importlib.import_module(parts[0])
    for part in parts[1:]:
        index += 1
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:index]))
    return found


@pytest.mark.parametrize(("owner", "name"), PRIVATE_NAMES)
def test_private_names_are_where_they_are_said_to_be(owner: str, name: str) -> None:
    if owner.startswith("lightning"):
        pytest.importorskip("lightning.pytorch")
    found = find(owner)
    if not hasattr(found, name):  # what functions and classes write, and strings
        assert inspect.isfunction(found) or inspect.isclass(found) or isinstance(found, ModuleType)
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", inspect.getsource(found))


def test_memory_is_fresh_where_pytorch_does_not_count_owners(monkeypatch) -> None:
    monkeypatch.setattr(scratch, "_count_owners", None)
    first = scratch.scratch(3, 5, torch.float64)
    first.fill_(1.0)
    del first
    assert scratch.scratch(3, 5, torch.float64).shape == (3, 5)
    x = torch.linspace(-2.0, 2.0, 10).reshape(5, 2)
    flow = SplineFlow(2, num_transforms=2, hidden_dims=[8])
    (-flow.log_prob(x).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_nodes_of_unknown_making_are_nobodys() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 2 * grad

    node = Double.apply(torch.ones(1, requires_grad=True)).grad_fn
    assert was_made_by(node, Double)

    class Silent:
        pass

    assert not was_made_by(node, Silent)  # type: ignore[arg-type]
