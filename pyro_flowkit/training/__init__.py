"""Training: one `fit` for densities, variational guides, VAEs and plain Pyro models."""

from pyro_flowkit.training.callbacks import Callback, FitState
from pyro_flowkit.training.fit import fit
from pyro_flowkit.training.result import FitResult

__all__ = ["Callback", "FitResult", "FitState", "fit"]
