"""VAEs in files, and what one VAE takes over from another.

A file holds the arguments of the VAE, how its data were presented, and plain tensors; nothing in it can be executed.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

from models.vae.model import VAE
from pyro_flowkit.files import read_file, write_file

KIND = "VAE"


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        settings: arguments of the VAE, ``input_dim`` and ``data_size`` among them.
        data: how its data were presented: name, key, binarisation.
        state: its ``state_dict``.
    """

    settings: dict[str, Any]
    data: dict[str, Any]
    state: dict[str, torch.Tensor]

    def build(self, name: str = "vae") -> VAE:
        """The VAE itself, under a name of its own in Pyro's store."""
        vae = VAE(**{**self.settings, "name": name})
        vae.load_state_dict(self.state)
        return vae.eval()


def save(
    path: str | os.PathLike[str], vae: VAE, settings: dict[str, Any], data: dict[str, Any]
) -> None:
    """Writes a VAE; ``settings`` are the arguments that it was built by."""
    state = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    write_file(path, KIND, {"settings": settings, "data": data, "state": state})


def load(path: str | os.PathLike[str]) -> Stored:
    """Reads what :func:`save` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or something else.
    """
    content = read_file(path, KIND)
    settings = dict(content["settings"])
    if settings.get("image_shape") is not None:
        settings["image_shape"] = tuple(settings["image_shape"])
    return Stored(settings, dict(content["data"]), content["state"])


@torch.no_grad()
def start_from(vae: VAE, other: VAE) -> None:
    """Takes over networks, scales and flows of a trained VAE.

    A flow that the trained one has not stays the identity that a fresh one is, around the standard normal as prior and
    the encoder's normal as posterior: the two VAEs have the same bound.

    Raises:
        ValueError: if the two differ in more than their flows.
    """
    own, given = vae.state_dict(), other.state_dict()
    flows = ("prior.", "posterior.")
    for name in sorted(n for n in own.keys() | given.keys() if not n.startswith(flows)):
        shapes = [tuple(state[name].shape) if name in state else None for state in (given, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Expected a VAE with the same networks to start from: {name} has shape {shapes[0]} there and "
                f"{shapes[1]} here"
            )
    for prefix in flows:
        is_flow_there, is_flow_here = (
            any(name.startswith(prefix) for name in state) for state in (given, own)
        )
        if is_flow_there and not is_flow_here:
            raise ValueError(
                f"Expected a VAE without a flow as its {prefix.rstrip('.')} to start from, got one"
            )
    taken = {name: value for name, value in given.items() if name in own}
    vae.load_state_dict({**own, **taken})
