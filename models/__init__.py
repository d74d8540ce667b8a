"""Complete Pyro programs: model, guide, data and a ``main``; see ``python -m models.NAME --help``."""
