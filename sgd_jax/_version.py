"""The version of the package, in its one home."""

__version__ = "0.1.0"
