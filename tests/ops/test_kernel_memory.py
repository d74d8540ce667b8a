"""The kernel touches no memory but its arguments': a C program calls all of it under the sanitizers of the compiler."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from pyro_flowkit import SplineFlow

HERE = Path(__file__).parent
KERNEL = HERE.parents[1] / "pyro_flowkit" / "ops" / "_kernel"
FLAGS = [
    "-std=c11",
    "-O1",
    "-g1",  # enough for line numbers
    "-Wall",
    "-Wextra",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


def find_compiler():
    candidates = [os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]
    for command in filter(None, candidates):
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    return None


@pytest.fixture(scope="module")
def sanitizing_compiler(tmp_path_factory):
    """The command of a compiler whose sanitizers run here, and the environment that they need."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler")
    place = tmp_path_factory.mktemp("probe")
    (place / "probe.c").write_text("int main(void) { return 0; }\n")
    command = [*compiler, *FLAGS, str(place / "probe.c"), "-o", str(place / "probe")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{compiler[0]} has no AddressSanitizer or UndefinedBehaviorSanitizer")
    for options in (
        "detect_leaks=1",
        "detect_leaks=0",
    ):  # leaks cannot be looked for in every container
        environment = {**os.environ, "ASAN_OPTIONS": options}
        done = subprocess.run([place / "probe"], env=environment, capture_output=True)
        if done.returncode == 0:
            return compiler, environment
    pytest.skip("programs with AddressSanitizer do not run on this system")


@pytest.mark.parametrize("macros", [[], ["-DPYRO_FLOWKIT_SCALAR"]], ids=["vectors", "scalars"])
def test_every_instance_keeps_to_its_memory(sanitizing_compiler, tmp_path, macros):
    compiler, environment = sanitizing_compiler
    program = tmp_path / "driver"
    sources = [str(HERE / "kernel_driver.c"), str(KERNEL / "kernel.c")]
    built = subprocess.run(
        [*compiler, *FLAGS, *macros, f"-I{KERNEL}", *sources, "-lm", "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "warning:" not in built.stderr, built.stderr
    done = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" 0 failures\n"), done.stdout


def test_no_call_takes_a_reference_from_none():
    """On Python 3.11 None is mortal: an interpreter whose kernel took one a call ended after thousands of steps."""
    flow = SplineFlow(3, num_transforms=2)
    x = torch.randn(5, 3)

    def work():
        for _ in range(50):
            flow.log_prob(x).sum().backward()
            flow.sample(2)

    work()
    before = sys.getrefcount(None)
    work()
    assert abs(sys.getrefcount(None) - before) < 50, (
        "less than one for every four calls of the kernel"
    )
