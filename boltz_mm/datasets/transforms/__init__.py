"""Data transforms."""

from boltz_mm.datasets.transforms import boxer, draws  # noqa: F401
