"""Posterior collapse in words: which latents say nothing about the data."""

import xarray as xr

from pyro_flowkit.diagnostics.verdict import Verdict

_NO_KL = 0.1  # nats


def collapse_verdict(usage: xr.Dataset) -> Verdict:
    """Names posterior collapse in words.

    Args:
        usage: the result of ``latent_usage``.

    Returns:
        "good" where every direction of every site is active, "bad" where none is, otherwise
        "usable".
    """
    active, sizes = (usage[n].to_numpy() for n in ("active_directions", "num_directions"))
    sites, kl = usage["site"].to_numpy(), usage["site_kl"].to_numpy()
    counts = ", ".join(
        f"{count} of {size} directions of {site}"
        + (f" (KL {nats:.2f} nats per datum)" if len(sites) > 1 and nats == nats else "")
        for site, count, size, nats in zip(sites, active, sizes, kl, strict=True)
    )
    used = (
        f"the posterior means vary with the data along {counts}, by more than "
        f"{usage.attrs['active_threshold']:g} of the variance "
        f"(the KL of all latents is {float(usage['kl_total'].mean()):.2f} nats per datum)"
    )
    following = _following(usage)
    if following:
        used += f"; {', '.join(following)} only follows the other latents (KL below {_NO_KL} nats)"
    if (active == sizes).all() and not following:
        return Verdict("good", f"no posterior collapse: {used}", "Nothing to do.")
    coordinates = usage["active"].to_numpy().astype(bool)
    if coordinates.sum() > active.sum():
        used += (
            f"; {int(coordinates.sum())} of {len(coordinates)} coordinates vary, as a few directions "
            "make many coordinates vary"
        )
    idle = int((usage["kl"].to_numpy()[~coordinates] > _NO_KL).sum())
    if idle:
        used += f"; the KL of {idle} coordinates that do not vary is above {_NO_KL} nats"
    if not active.any():
        return Verdict(
            "bad",
            f"posterior collapse: {used}",
            "The decoder does without the latents: raise the weight of the KL slowly while training, "
            "give the decoder less to work with, or train longer.",
        )
    return Verdict(
        "usable",
        f"posterior collapse in part: {used}",
        f"The number of directions in use is {active.sum()}: that many latents suffice, or raise the "
        "weight of the KL slowly while training, so that more are found.",
    )


def _following(usage: xr.Dataset) -> list[str]:
    """Sites that vary with the data as their prior does, given other latents.

    A site with a prior of its own has a KL of at least its information.
    """
    information = usage["direction_information"].groupby(usage["direction_site"]).sum()
    return [
        str(site)
        for site, kl in zip(usage["site"].to_numpy(), usage["site_kl"].to_numpy(), strict=True)
        if kl < _NO_KL and float(information.sel(direction_site=site)) > 2 * _NO_KL
    ]
