"""Datasets and their transforms."""

from boltz_mm.datasets import transforms  # noqa: F401
