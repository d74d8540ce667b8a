r"""A variational autoencoder with levels of latents, each of which is drawn given the one above by a spline flow.

    z3 ~ p(z3)                        SplineFlow
    z2 | z3 ~ p(z2 | z3)              SplineFlow with what is above as context
    z1 | z2 ~ p(z1 | z2)              likewise
    x | z1 ~ p(x | z1)                as in models.vae

The posterior is drawn from the top down, too, q(z3 | x) q(z2 | z3, x) q(z1 | z2, x): a deterministic encoder goes from
the data up, d1 = e1(x), d2 = e2(d1), ..., and the flow of each level sees its features d beside the message from above,
t1 = g2(z2), which is the one that the generative model's own flow p(z1 | z2) sees (Sonderby et al. 2016). Each flow
bends a Gaussian; location and raw scale of the posterior's are a sum of one part from below and one from above (Kingma
et al. 2016). At first no level listens to the one above, and every prior is a standard normal: a fresh hierarchical VAE
is a flat one, from which it learns to depart. The ELBO is

    log p(x) >= E_q[log p(x | z1)] - KL(q(z3 | x) || p(z3)) - E_q KL(q(z2 | z3, x) || p(z2 | z3)) - ...

A level whose KL is zero says nothing about the data. While training, the weight of the KL rises, so that the level next
to the data comes into use. That does not help an upper level: what it takes off the KL below counts as little as what
it costs itself. Free bits do: a floor for the KL of each level, below which it costs nothing more.

Diffusion models are a case of this chain. It is Markovian: p(x, z1, ..., zT) = p(zT) p(z_T-1 | zT) ... p(x | z1), and
they have hundreds of levels, all of the size of x, Gaussian conditionals with one network for all of them, told the
level, and an inference model without parameters, q(z_t | x) = N(a_t x, s_t^2 I), whose noise grows until nothing of x
is left in zT. The ELBO above is then the diffusion loss: every KL is one of two Gaussians of the same scale, a weighted
squared error of what the network says of x given z_t (Sohl-Dickstein et al. 2015; Ho, Jain and Abbeel 2020; Kingma,
Salimans, Poole and Ho 2021). What is fixed there is learned here: few levels, smaller ones, and flows between them.

    python -m models.hierarchical_vae --data mnist.npz --levels 2 --steps 3000 --seed 1 --compare-flat

In that one run, 829 thousand parameters, the ELBO of MNIST's test images is 0.76 (standard error over images 0.04) nats
above that of the flat VAE of the same size, -93.22 and -93.98; 10 of 16 directions of z2 and 28 of 32 of z1 are active.
With ``--seed 0 --no-path-gradient --kl-warm-up 0.5`` it is 0.09 (0.04) above: seeds and settings differ by more than
images do.

References:
    Casper Kaae Sonderby, Tapani Raiko, Lars Maaloe, Soren Kaae Sonderby, Ole Winther. Ladder Variational Autoencoders.
    NeurIPS 2016.

    Diederik P. Kingma et al. Improved Variational Inference with Inverse Autoregressive Flow. NeurIPS 2016.

    Jascha Sohl-Dickstein, Eric Weiss, Niru Maheswaranathan, Surya Ganguli. Deep Unsupervised Learning using
    Nonequilibrium Thermodynamics. ICML 2015.

    Jonathan Ho, Ajay Jain, Pieter Abbeel. Denoising Diffusion Probabilistic Models. NeurIPS 2020.

    Diederik P. Kingma, Tim Salimans, Ben Poole, Jonathan Ho. Variational Diffusion Models. NeurIPS 2021.
"""

from models.hierarchical_vae.model import HierarchicalVAE
from models.hierarchical_vae.program import main

__all__ = ["HierarchicalVAE", "main"]
