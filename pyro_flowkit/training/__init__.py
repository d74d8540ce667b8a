"""Training: one ``fit`` for densities, variational guides, VAEs and plain Pyro models."""

from pyro_flowkit.files import DamagedFileError
from pyro_flowkit.training.callbacks import Callback, FitState
from pyro_flowkit.training.fit import fit
from pyro_flowkit.training.library_trackers import (
    MLflowTracker,
    TensorBoardTracker,
    WandbTracker,
)
from pyro_flowkit.training.ranks import LostRankError
from pyro_flowkit.training.result import FitResult
from pyro_flowkit.training.trackers import CsvTracker

__all__ = [
    "Callback",
    "CsvTracker",
    "DamagedFileError",
    "FitResult",
    "FitState",
    "LostRankError",
    "MLflowTracker",
    "TensorBoardTracker",
    "WandbTracker",
    "fit",
]
