"""What pip builds: a wheel with the kernel where there is a compiler, one that runs without it where there is none.

Nothing is downloaded: the builds take the setuptools of the test environment.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
KERNEL_SOURCES = sorted((ROOT / "pyro_flowkit" / "ops" / "_kernel").glob("*.[ch]"))


@pytest.fixture
def sources(tmp_path):
    """A copy of what a build needs, beside folders that it must leave out."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in NEEDED:
        shutil.copy(ROOT / name, copy)
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    shutil.copytree(ROOT / "pyro_flowkit", copy / "pyro_flowkit", ignore=built)
    for name in ("models", "tests", "benchmarks", "tutorials"):
        (copy / name).mkdir()
        (copy / name / "__init__.py").touch()
    return copy


def run(command, *, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def build_wheel(sources, **environment):
    """Returns its path."""
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run(["-m", "pip", "wheel", ".", *options, "-w", "dist"], cwd=sources, **environment)
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel


def check_contents(names):
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"pyro_flowkit"}
    assert "pyro_flowkit/py.typed" in names and "pyro_flowkit/ops/fused.py" in names
    assert not [name for name in names if name.endswith((".c", ".h", ".o"))]


def use_wheel(wheel, place):
    """Unpack a wheel and let a small flow of it run; returns the backend that it used."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    script = (
        "import torch, pyro_flowkit\n"
        "from pyro_flowkit.ops import backend\n"
        "flow = pyro_flowkit.SplineFlow(3, num_transforms=2, hidden_dims=[4])\n"
        "assert flow().log_prob(torch.randn(5, 3)).isfinite().all()\n"
        "print(pyro_flowkit.__file__, backend())\n"
    )
    printed = run(["-c", script], cwd=place, PYTHONPATH=str(place), PYRO_FLOWKIT_REFERENCE="")
    file, backend = printed.split()
    assert Path(file).is_relative_to(place)
    return backend


@pytest.fixture
def quick_compiler(tmp_path):
    """What to set in the environment so that the kernel is compiled in a hurry."""
    if os.name != "posix":
        return {}
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    if not shutil.which(compiler.split()[0]):
        pytest.skip("there is no C compiler")
    script = tmp_path / "cc"
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    script.chmod(0o755)
    return {"CC": str(script)}


def test_with_a_compiler_the_wheel_holds_the_kernel(sources, tmp_path, quick_compiler):
    wheel = build_wheel(sources, **quick_compiler)
    assert re.fullmatch(r"pyro_flowkit-[^-]+-cp311-abi3-(?!any)\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    check_contents(names)
    assert [n for n in names if re.fullmatch(r"pyro_flowkit/ops/_fused\b.*\.(so|pyd)", n)]
    assert use_wheel(wheel, tmp_path / "unpacked") == "fused"


def test_without_a_compiler_the_wheel_runs_on_the_reference(sources, tmp_path):
    wheel = build_wheel(sources, CC=str(tmp_path / "no_such_compiler"))
    names = zipfile.ZipFile(wheel).namelist()
    check_contents(names)
    assert not [name for name in names if "_fused" in name]
    assert use_wheel(wheel, tmp_path / "unpacked") == "reference"


def test_the_source_distribution_holds_the_sources_of_the_kernel(sources):
    script = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(["-c", script], cwd=sources)
    (archive,) = (sources / "dist").glob("*.tar.gz")
    names = {name.split("/", 1)[-1] for name in tarfile.open(archive).getnames()}
    assert KERNEL_SOURCES
    assert {str(path.relative_to(ROOT)) for path in KERNEL_SOURCES} <= names
    assert {"setup.py", "pyproject.toml", "pyro_flowkit/py.typed"} <= names
