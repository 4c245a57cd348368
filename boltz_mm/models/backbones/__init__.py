"""Registered backbones."""

from boltz_mm.models.backbones.pillar_net import PillarNet

__all__ = ['PillarNet']
