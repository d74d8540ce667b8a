"""The programs of Pyro's notebooks on flows, retold: each runs with Pyro's constructors and with this package's."""
