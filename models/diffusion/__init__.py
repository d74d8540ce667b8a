r"""A variance-preserving diffusion, whose one network is a hierarchical VAE with a bound, and a flow with a density.

Data x (standardised) and noise e are mixed along a quarter of a circle; the network learns the derivative v:

    z = cos(a) x + sin(a) e        v = cos(a) e - sin(a) x        0 <= a <= pi/2
    x = cos(a) z - sin(a) v        e = sin(a) z + cos(a) v        so that v says x, e and the score, -e / sin(a)

**The hierarchical VAE.** Levels z1 (hardly any noise) to zT (hardly any signal), SNR = cot^2(a) their ratio of signal
and noise. The inference model only adds noise. The generative model puts what the network expects of x in the place of
x:

    p(zT) = N(0, I)        p(z_s | z_t) = q(z_s | z_t, x = x^(z_t))        p(x | z1) = N(x^(z1), sin^2(a_1) I)

    log p(x) >= E log p(x | z1) - sum_t KL(q(z_s | z_t, x) || p(z_s | z_t)) - KL(q(zT | x) || p(zT))

    KL of a step = (SNR_s - SNR_t) / 2 * |x - x^(z_t)|^2        of the limit = E int cot(a) |v - v^(z, a)|^2 da

With few levels x is not known that well, and steps as narrow as that are too sure of themselves. ``fit_scales`` gives
them the variance that fits best. The limit is the same.

**The flow.** Draws of the noise that follow ``dz/da = v^(z, a)`` from pi/2 to 0 have at every angle the distribution
of z, if v^ is exact. This is a :class:`pyro_flowkit.ContinuousFlow`, whose log-density is exact whatever v^ is.

The ELBO is a bound of log p(x) of the hierarchical VAE. The flow is another model, unless v^ is exact: there is no
theorem that its log p(x) is above the ELBO. The table says by how much it is.

    python -m models.diffusion
    python -m models.diffusion two-moons --figure two_moons.png

References:
    Jascha Sohl-Dickstein, Eric Weiss, Niru Maheswaranathan, Surya Ganguli. Deep Unsupervised Learning using
    Nonequilibrium Thermodynamics. ICML 2015.

    Yang Song et al. Score-Based Generative Modeling through Stochastic Differential Equations. ICLR 2021 (the flow).

    Diederik P. Kingma, Tim Salimans, Ben Poole, Jonathan Ho. Variational Diffusion Models. NeurIPS 2021 (the ELBO).

    Yang Song, Conor Durkan, Iain Murray, Stefano Ermon. Maximum Likelihood Training of Score-Based Diffusion Models.
    NeurIPS 2021 (what the limit is a bound of).

    Fan Bao, Chongxuan Li, Jun Zhu, Bo Zhang. Analytic-DPM. ICLR 2022 (the scales).

    Tim Salimans, Jonathan Ho. Progressive Distillation for Fast Sampling of Diffusion Models. ICLR 2022 (v).
"""

from models.diffusion.model import AngleField, Diffusion
from models.diffusion.program import main

__all__ = ["AngleField", "Diffusion", "main"]
