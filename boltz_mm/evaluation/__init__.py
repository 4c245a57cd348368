"""Evaluation."""

from boltz_mm.evaluation import metrics  # noqa: F401
