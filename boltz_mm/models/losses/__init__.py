"""Registered losses."""

from boltz_mm.models.losses.box3d_giou_loss import Box3dGIoULoss

__all__ = ['Box3dGIoULoss']
