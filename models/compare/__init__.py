r"""The main job: what do flows buy in a VAE? Four VAEs over several seeds, with the reasons, on real images.

A standard or a flow prior, a normal or a flow posterior, the rest the same: every VAE has the ELBO and IWAE-1000 of the
same test images, and what one has over the plain one is paired over images and seeds, with an error over both. Of the
plain VAE it is measured why: how far its codes are from the prior that it was given, and how much of its gap is the
normal family's. On the digits a full-covariance Gaussian and a spline flow stand beside them, whose log p is exact.

    python -m models.compare                     1,797 digits of scikit-learn, 8x8 pixels
    python -m models.compare --data PATH         MNIST or Fashion-MNIST: an npz file, an idx file or a folder of them

prints a table and what it says, and saves a figure and a netCDF file that ArviZ opens.

The rooms: ``recipes``, what is trained and for how long; ``jobs``, one model in one process; ``statistics``, errors
over seeds and images; ``report``, table and text; ``figure``; ``program``.
"""
