r"""Conditional flows: how near they come to a posterior of any scale, and to that of Pyro's notebook.

The banana's posterior is exact, for a context of one standard normal number c:

.. math:: z_1 \sim N(s c, s^2), \qquad z_2 \sim N(z_1^2 / s, s^2 / 4)

at scales s of 1, .25 and .05: the KL divergence from it is minus the ELBO. A `SplineFlow` and an `AmortizedSplineFlow`
learn it by `fit`, 64 contexts a step, with its recipe. The second table is the program of
`models.pyro_notebooks.flow_guide` with the flows of this project and zuko's neural spline flow: the KL divergence per
datum after 200 steps, by the exact posterior's log evidence, which 20,000 weighted draws of the best flow estimate.

    python -m benchmarks.conditional_flow
"""
