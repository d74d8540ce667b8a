"""Builds the optional spline kernel; everything else about the package is in pyproject.toml."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "pyro_flowkit/ops/_kernel"


class BuildKernel(build_ext):
    def build_extensions(self) -> None:
        if self.compiler.compiler_type != "msvc":
            for extension in self.extensions:
                # Values stay IEEE: these two flags only drop errno and floating-point exceptions.
                extension.extra_compile_args = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
        super().build_extensions()


kernel = Extension(
    "pyro_flowkit.ops._fused",
    sources=[f"{SOURCES}/{name}.c" for name in ("kernel", "module", "module_chain")],
    depends=[
        f"{SOURCES}/{name}.h"
        for name in (
            "kernel",
            "module",
            "instance",
            "vector",
            "spline",
            "loops",
            "perceptron",
            "linear",
            "hierarchy",
            "chain",
        )
    ],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    py_limited_api=True,
    optional=True,  # without a compiler the package runs on the PyTorch reference
)

setup(
    ext_modules=[kernel],
    cmdclass={"build_ext": BuildKernel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
