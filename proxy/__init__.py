"""Breakwater: a resilient agent runtime in the network path."""

__version__ = "0.1.0"
