"""Optimizer wrappers."""

from boltz_mm.engine.optimizers.finite_optim_wrapper import (
    FiniteAmpOptimWrapper,
    FiniteOptimWrapper,
    NonFiniteGradientError,
)

__all__ = ['FiniteAmpOptimWrapper', 'FiniteOptimWrapper', 'NonFiniteGradientError']
