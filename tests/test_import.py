"""Importing the package changes nothing outside of it, and no room imports from a floor above its own."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_flowkit

PACKAGE = Path(pyro_flowkit.__file__).parent

# From the ground up; a room imports from itself and from lower floors only.
HOUSE = [
    {"deadline", "recipe", "seeds", "warning"},
    {"files", "ops", "pictures", "programs", "_private_names"},
    {"environment", "nn"},
    {"autoregressive_nn"},
    {"transforms"},
    {"moments", "path_gradient"},
    {"_pyro", "bases", "flow_distribution", "preprocessing"},
    {"head_start", "moves"},
    {"flow"},
    {"flows", "continuous"},
    {"guides", "objectives"},
    {"diagnostics", "testing"},
    {"training"},
    {"lightning", "tables"},
    {"command_line"},
    {"__main__"},
]
FLOORS = {room: number for number, rooms in enumerate(HOUSE, 1) for room in rooms}

SNAPSHOT = """
import json, logging, os, pkgutil, random, sys, warnings
import numpy as np, pandas, tqdm.auto, torch, xarray
import pyro, pyro.infer, pyro.infer.autoguide, pyro.poutine.runtime
from torch.distributions import Distribution, biject_to, kl, transform_to

def snapshot():
    torch_rng, np_rng = torch.random.get_rng_state(), np.random.get_state()
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "denormals": torch.tensor(1e-40).mul(1.0).item(),
        "torch random state": torch_rng.tolist(),
        "numpy random state": [str(part) for part in np_rng],
        "python random state": str(random.getstate()),
        "validation": Distribution._validate_args,
        "pyro validation": pyro.distributions.torch_distribution.TorchDistribution._validate_args,
        "pyro settings": {k: str(v) for k, v in pyro.settings.get().items()},
        "pyro handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "param store": sorted(pyro.get_param_store().keys()),
        "kl": len(kl._KL_REGISTRY),
        "biject_to": len(biject_to._registry),
        "transform_to": len(transform_to._registry),
        "warnings": [str(f) for f in warnings.filters],
        "showwarning": warnings.showwarning.__module__,
        "log handlers": [str(h) for h in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
        "numpy errors": np.geterr(),
        "print options": str(np.get_printoptions()),
        "environment": dict(os.environ),
        "excepthook": sys.excepthook.__module__,
        "xarray options": str(dict(xarray.get_options())),
    }

heavy = ("arviz", "arviz_base", "arviz_stats", "arviz_plots", "matplotlib", "lightning")
heavy += ("mlflow", "tensorboard", "wandb")
"""

IMPORT = """
before = snapshot()
import pyro_flowkit
for module in pkgutil.walk_packages(pyro_flowkit.__path__, "pyro_flowkit."):
    if not module.name.endswith(("__main__", ".lightning")):  # Lightning itself changes and loads a lot
        __import__(module.name)
after = snapshot()
print(json.dumps({
    "changed": {k: [str(before[k])[:300], str(after[k])[:300]] for k in before if before[k] != after[k]},
    "loaded": [name for name in heavy if name in sys.modules],
    "modules": sorted(name for name in sys.modules if name.startswith("pyro_flowkit.")),
}))
"""


@pytest.fixture(scope="module")
def imported():
    """What a fresh interpreter says after importing the package and every module in it."""
    completed = subprocess.run(
        [sys.executable, "-c", SNAPSHOT + IMPORT],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


def test_importing_changes_nothing_global(imported):
    assert imported["changed"] == {}


def test_importing_loads_nothing_heavy(imported):
    assert imported["loaded"] == []


LAZY = """
import sys
import torch
import pyro_flowkit
from pyro_flowkit import SplineFlow, diagnostics, fit

fit(SplineFlow(2), data=torch.randn(20, 2), max_steps=1, progress=False)
diagnostics.psis(torch.zeros(9))
unwanted = ("pandas", "xarray", "arviz", "matplotlib", "lightning")
print([name for name in unwanted if name in sys.modules])
diagnostics.evidence_bounds, diagnostics.reweight
print([name for name in unwanted if name in sys.modules])
print(callable(diagnostics.reweight), callable(diagnostics.plot_guides))
"""


def test_flows_and_fit_need_no_data_frames_and_the_diagnostics_bring_them():
    command = [sys.executable, "-c", LAZY]
    completed = subprocess.run(
        command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert completed.returncode == 0, completed.stderr
    before, after, are_functions = completed.stdout.splitlines()
    assert before == "[]"
    assert "xarray" in after and "arviz" not in after and "matplotlib" not in after
    assert are_functions == "True True"


def test_the_diagnostics_are_all_where_they_are_looked_up():
    diagnostics = pyro_flowkit.diagnostics
    source = Path(diagnostics.__file__).read_text(encoding="utf-8")
    for_checkers = {
        alias.name: node.module.rpartition(".")[2]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and "diagnostics" in str(node.module)
        for alias in node.names
    }
    assert for_checkers == diagnostics._HOMES
    assert set(diagnostics.__all__) == {*diagnostics._HOMES, "psis", "pareto_k_threshold"}
    assert set(diagnostics.__all__) <= set(dir(diagnostics))
    for name, home in diagnostics._HOMES.items():
        assert getattr(diagnostics, name).__module__ == f"pyro_flowkit.diagnostics.{home}"
    with pytest.raises(AttributeError, match="no attribute 'evidence_bound'"):
        _ = diagnostics.evidence_bound


def test_every_module_can_be_imported(imported):
    assert "pyro_flowkit.transforms.coupling" in imported["modules"]


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(path: Path, root: Path = PACKAGE) -> set[str]:
    """What of this package the file imports, anywhere in it; type-checking imports count."""
    return {name for name in all_imports_of(path, root) if name.startswith("pyro_flowkit.")}


def all_imports_of(path: Path, root: Path) -> set[str]:
    """The same of any package, as ``module.name`` where a name is taken from a module."""
    package = [root.name, *path.relative_to(root).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            # `from pyro_flowkit import flows` names a room, `from pyro_flowkit.flows import X` a thing in one
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def test_the_house_is_drawn_as_it_is():
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", page, flags=re.MULTILINE)
    drawn = [(int(floor), set(re.findall(r"`(\w+)`", rooms))) for floor, rooms in rows]
    assert drawn == list(reversed(list(enumerate(HOUSE, 1))))
    for path in re.findall(r"`((?:\w+/)+\w+\.py)`", page):
        assert (PACKAGE / path).exists() or (PACKAGE.parent / path).exists(), path


SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(PACKAGE)) for p in SOURCES])
def test_no_room_imports_from_its_own_floor_or_above(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert room in FLOORS, f"{room} has no floor yet"
    for name in imports_of(path):
        other = room_of(name)
        if other != room:
            assert other in FLOORS, f"{path.name} imports {name} through the front door"
            assert FLOORS[other] < FLOORS[room], f"{room} imports {name}"


def test_no_two_files_import_each_other():
    """Not even for their types: what two files need of each other stands in a third one."""
    names = {
        ".".join(path.with_suffix("").relative_to(PACKAGE.parent).parts): path for path in SOURCES
    }
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    waiting = {}
    for name, path in names.items():
        found = {
            other if other in names else other.rpartition(".")[0] for other in imports_of(path)
        }
        waiting[name] = (found & names.keys()) - {name}
    assert sum(map(len, waiting.values())) > 400, "imports are found"
    while free := [name for name, others in waiting.items() if not others]:
        for name in free:
            del waiting[name]
        for others in waiting.values():
            others.difference_update(free)
    assert waiting == {}, "these import in a circle, or what does"


MAX_LINES = 350
MAX_CODE = 80


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(PACKAGE)) for p in SOURCES])
def test_no_file_is_too_long_to_be_read_at_once(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, "split it by sense"


def code_lines(function: ast.FunctionDef, lines: list[str]) -> int:
    """Lines of a function's body that are neither docstring, nor comment, nor empty."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return 0
    inside = lines[body[0].lineno - 1 : function.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in inside)


def test_no_function_is_too_long_to_be_read_at_once():
    found = {}
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                count = code_lines(node, text.splitlines())
                found[f"{path.relative_to(PACKAGE)}: {node.name}"] = count
    assert max(found.values()) > MAX_CODE / 2, "lines of code are counted"
    assert {name: count for name, count in found.items() if count > MAX_CODE} == {}


# What a program outside of the package may not look up to, in the order of the floors above it.
ABOVE = {
    "pyro_flowkit": ("models", "benchmarks", "tutorials", "tests"),
    "models": ("benchmarks", "tutorials", "tests"),
    "benchmarks": ("tutorials", "tests"),
    "tutorials": ("benchmarks", "tests"),
}


@pytest.mark.parametrize("room", ABOVE)
def test_no_program_imports_from_a_floor_above(room):
    files = sorted((PACKAGE.parent / room).rglob("*.py"))
    assert files
    for path in files:
        tops = {name.partition(".")[0] for name in all_imports_of(path, PACKAGE.parent / room)}
        assert tops.isdisjoint(ABOVE[room]), f"{path.name} imports upwards"


def test_imports_are_found_wherever_they_are_written(tmp_path):
    file = tmp_path / "pyro_flowkit" / "ops" / "upwards.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import pyro_flowkit.training\n"
        "from pyro_flowkit import guides\n"
        "from ..nn import MLP\n"
        "from . import psis\n"
        "def later():\n    from pyro_flowkit.flows import SplineFlow\n"
    )
    rooms = {room_of(name) for name in imports_of(file, tmp_path / "pyro_flowkit")}
    assert rooms == {"training", "guides", "nn", "ops", "flows"}
