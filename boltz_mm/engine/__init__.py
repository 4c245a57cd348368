"""Hooks, optimizer wrappers, schedulers, and what they need: atomic files, seeds of samples."""

from boltz_mm.engine import hooks, optimizers, schedulers  # noqa: F401
from boltz_mm.utils.restricted_loading import use_restricted_loading

# Whoever trains or tests with a part of this package gets the checkpoint reader that runs nothing.
use_restricted_loading()
