"""Side-by-side measurements against other libraries: speed and accuracy, on this machine, in one run.

Run them from the repository root, with the extra ``bench`` installed for the libraries to compare with:

    python -m benchmarks.spline_kernel      the spline alone: fused kernel and PyTorch reference
    python -m benchmarks.spline_flows       whole flows: this project, pyro, nflows, normflows, zuko, flowjax
    python -m benchmarks.svi_step           a step of variational inference: AutoSplineFlow and Pyro's guides
    python -m benchmarks.time_to_posterior  CPU seconds to a posterior, beside a Gaussian, NumPyro's IAF and NUTS
    python -m benchmarks.near_gaussian      AutoSplineFlow on posteriors where a Gaussian is nearly enough
    python -m benchmarks.amortized          AmortizedSplineFlow against an exact posterior
    python -m benchmarks.tables DATA.npz    densities of tables with the command line's defaults
    python -m benchmarks.fit_overhead       what fit costs beyond a loop written by hand
    python -m benchmarks.faults             a fit that is killed again and again, and damaged checkpoints
    python -m benchmarks.pyro_examples      Pyro's own examples with only the loop replaced
    python -m benchmarks.conditional_flow   conditional flows: a banana at three scales, and Pyro's notebook

Each prints its tables and writes them to ``benchmarks/results/``. Time is CPU time on one thread; numerical libraries
read their number of threads when they are loaded, so it is set here, before any of them.
"""

import os
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"):
    os.environ[_name] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import torch  # noqa: E402

torch.set_num_threads(1)

RESULTS = Path(__file__).parent / "results"
