"""Optimizer wrappers and their constructors."""

from boltz_mm.engine.optimizers.finite_optim_wrapper import (
    FiniteAmpOptimWrapper,
    FiniteOptimWrapper,
    NonFiniteGradientError,
)
from boltz_mm.engine.optimizers.module_type_constructor import ModuleTypeOptimWrapperConstructor

__all__ = ['FiniteAmpOptimWrapper', 'FiniteOptimWrapper', 'ModuleTypeOptimWrapperConstructor', 'NonFiniteGradientError']
