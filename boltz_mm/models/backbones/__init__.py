"""Registered backbones."""

from boltz_mm.models.backbones.aff import AFF
from boltz_mm.models.backbones.pillar_net import PillarNet

__all__ = ['AFF', 'PillarNet']
