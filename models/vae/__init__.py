r"""A variational autoencoder whose prior and posterior can each be a normalizing flow.

    z ~ p(z)                          standard normal, or a SplineFlow
    x | z ~ p(x | decoder(z))         Bernoulli for binary pixels, a discretised logistic for grey ones, or a normal
    z | x ~ q(z | encoder(x))         diagonal normal, or a conditional SplineFlow

The likelihood of a datum, log p(x) = log E_p(z)[p(x | z)], is out of reach; training maximises the
ELBO, E_q[log p(x, z) - log q(z | x)], which is log p(x) minus KL(q(z | x) || p(z | x)). A flow as the
posterior shrinks that gap. A flow as the prior lets p(z) follow where the encoder puts the data.

    python -m models.vae --prior flow --posterior flow --gaps 50
    python -m models.vae --data mnist.npz --prior flow --save flow.pt --pictures flow
    python -m models.vae --evaluate flow.pt --data mnist.npz --eval-rows 2000

The rooms: ``networks``, ``likelihoods`` and ``posterior``; ``model``, the VAE itself; ``data``, from a name to batches;
``training``; ``storage``, VAEs in files and what one takes over from another; ``program`` and ``options``; ``report``.

References:
    Diederik P. Kingma, Max Welling. Auto-Encoding Variational Bayes. ICLR 2014.

    Danilo Rezende, Shakir Mohamed. Variational Inference with Normalizing Flows. ICML 2015.

    Xi Chen et al. Variational Lossy Autoencoder. ICLR 2017 (a flow as the prior).
"""

from models.vae.model import LIKELIHOODS, NETWORKS, POSTERIORS, PRIORS, VAE
from models.vae.program import main
from models.vae.training import refine_encoder, train, train_prior

__all__ = [
    "LIKELIHOODS",
    "NETWORKS",
    "POSTERIORS",
    "PRIORS",
    "VAE",
    "main",
    "refine_encoder",
    "train",
    "train_prior",
]
