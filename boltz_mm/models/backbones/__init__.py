"""Registered backbones."""

from boltz_mm.models.backbones import pillar_net  # noqa: F401
