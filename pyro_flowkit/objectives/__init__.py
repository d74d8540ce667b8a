r"""Objectives that Pyro lacks, for its ``SVI`` as for :func:`pyro_flowkit.fit`; losses in nats.

With draws ``z ~ q`` and ``log w = log p(x, z) - log q(z)``:

    objective               the gradient drives q                 what q becomes
    Trace_ELBO (Pyro's)     down KL(q || p(z | x))                mode-seeking
    ImportanceWeightedELBO  up E log (1/K) sum_k w_k              a proposal for K draws: wider with K
    AlphaDivergence         down Renyi's D_alpha(q || p(z | x))   mode-seeking from alpha = 1 on, wider towards 0
    ForwardKL               down KL(p(z | x) || q)                mass-covering

The path-gradient ELBO (Roeder et al. 2017) needs no objective of its own. ``FlowDistribution(path_gradient=True)``,
``flow(context, path_gradient=True)`` and ``AutoSplineFlow(model, path_gradient=True)`` hand the entropy term with its
parameters held fixed to Pyro through ``score_parts``, and the unmodified ``Trace_ELBO``, ``JitTrace_ELBO`` and
``TraceGraph_ELBO`` use it. For a guide of other distributions ``AlphaDivergence(1.0)`` is that ELBO.

The objectives here make gradients of their own, so a guide's ``path_gradient`` changes nothing under them
(``own_gradient = True`` says so to whoever asks). Parameters of the model get the gradient of the importance-weighted
bound of the same weights.

**One weight per datum.** Where all sites of model and guide lie in a plate, as in a VAE, the evidence is a product over
that plate and so every datum has weights of its own: ``log w_i`` is summed over whatever lies inside of the plate for
datum i, the particles of each datum are combined, and then the plate is summed, times its scale where it is
subsampled. Otherwise a particle has one weight, the sum over all sites; that is correct too, but with many latents one
particle soon carries all of it, and in a subsampled plate it is refused (see :mod:`pyro_flowkit.objectives.weights`).
"""

from pyro_flowkit.objectives.bounds import AlphaDivergence, ImportanceWeightedELBO
from pyro_flowkit.objectives.forward_kl import ForwardKL

__all__ = ["AlphaDivergence", "ForwardKL", "ImportanceWeightedELBO"]
