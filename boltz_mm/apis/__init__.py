"""What a user holds: models built from config and checkpoint, and measurements of them."""

from boltz_mm.apis.build import build_model

__all__ = ['build_model']
