"""Side-by-side measurements against other libraries: speed and accuracy, on this machine, in one run.

Run them from the repository root, with the extra `bench` installed for the libraries to compare with:

    python -m benchmarks.spline_kernel      the spline alone: fused kernel and PyTorch reference
    python -m benchmarks.spline_flows       whole flows: this project, pyro, nflows, normflows, zuko, flowjax
    python -m benchmarks.svi_step           a step of variational inference: AutoSplineFlow and Pyro's guides

Each prints its tables and writes them to `benchmarks/results/`. What is measured is CPU time on one thread; numerical
libraries read their number of threads when they are loaded, so it is set here, before any of them.
"""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"):
    os.environ[_name] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
