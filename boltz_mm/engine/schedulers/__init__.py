"""Parameter schedulers."""

from boltz_mm.engine.schedulers.warmup_cosine_lr import WarmupCosineLR

__all__ = ['WarmupCosineLR']
