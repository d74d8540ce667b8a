"""What is known about running a model and a guide: their sites and plates, and the model as a function of its latents.

A model with data is a function u -> log p(x, u). :class:`~pyro_flowkit.programs.vectorized.Vectorized` runs it for many
particles at a time, whatever its style, and says where that cannot be done.
"""
