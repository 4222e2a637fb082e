"""The version of this package; it is written here and nowhere else."""

__version__ = "0.2.0"
