"""The rows of a guide for local latents: its plates, and what encoder and masks say of the rows in them."""

from typing import Any

import pyro
from pyro.util import ignore_jit_warnings
from torch import Tensor

from pyro_flowkit.guides.amortized_parts import AmortizedParts
from pyro_flowkit.guides.data_plate import PlateCall, encode, plate_call
from pyro_flowkit.guides.masked_rows import RowMasks


class DataRows(AmortizedParts):
    """The steps of a call that turn arguments into rows, after the guide's setup."""

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        if self.master is not None:
            return super()._create_plates(*args, **kwargs)
        plates: Any = () if self.create_plates is None else self.create_plates(*args, **kwargs)
        self.plates = {p.name: p for p in ([plates] if isinstance(plates, pyro.plate) else plates)}
        for name, frame in sorted(self._prototype_frames.items()):
            if name in self.plates:
                continue
            if name == self._plate:
                self.plates[name] = self._plate_call(args, kwargs).plate(name, self._dim)
            else:
                self.plates[name] = pyro.plate(name, frame.size, dim=frame.dim)
        return self.plates

    def _plate_call(self, args: tuple, kwargs: dict) -> PlateCall:
        model = self._plain_model[0]
        if model is not None:
            return plate_call(model, self._plate, self._first_values, args, kwargs)
        rows = len(self._encode(args, kwargs))  # unpickled, without its model: as in the prototype
        call = self._prototype_call
        return PlateCall(max(rows, call.size) if call.rows < call.size else rows, rows)

    def _encode(self, args: tuple, kwargs: dict) -> Tensor:
        """The encoder's features, shape ``(rows, context_dim)``."""
        encoder: Any = self._encoder_function[0] if self.encoder is None else self.encoder
        features = encode(encoder, args, kwargs, self.context_dim)
        return features.to(self.affine.weight)

    def _features_of(self, rows: Any, features: Tensor) -> Tensor:
        """The features of the rows of a plate, placed at its dim."""
        plate = self.plates[self._plate]
        with ignore_jit_warnings():
            count = int(features.shape[0])
            if count != plate.subsample_size:
                if count != plate.size:
                    sizes = f"{plate.subsample_size}" + (
                        f", or {plate.size} for all data"
                        if plate.size != plate.subsample_size
                        else ""
                    )
                    raise ValueError(
                        f"Expected the encoder to return a row for each datum of plate {self._plate!r}, {sizes}, got "
                        f"{count}."
                    )
                features = features.index_select(0, rows.to(features.device))
        return features.reshape(-1, *(1 for _ in range(-1 - self._dim)), self.context_dim)

    def _row_masks(self, rows: Any, args: tuple, kwargs: dict) -> RowMasks:
        """What the model keeps of these rows; to be asked outside of the plate, which the model enters."""
        if not self._masked.names:
            return RowMasks()
        return self._masked.read(
            self._plain_model[0],
            {**self._first_values, self._plate: rows},
            args,
            kwargs,
            reference=(self.masked_loc, self.init_scale),
            init_loc_fn=self.init_loc_fn,
        )
