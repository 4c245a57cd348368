"""Optimizer wrappers, constructors and parameter schedulers."""

from boltz_mm.engine.optimizers.finite_optim_wrapper import FiniteAmpOptimWrapper, FiniteOptimWrapper  # noqa: F401
