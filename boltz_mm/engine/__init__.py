"""Hooks, loops, schedulers and optimizer constructors."""

from boltz_mm.engine import hooks, optimizers  # noqa: F401
