"""Build a model from its config and weights, for scripts and inferencers.

mmdet's ``init_detector`` takes what fits of a checkpoint and warns about the rest; here weights that do not fit are an
error that says why, and the file is read by the restricted reader.
"""

import copy
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import init_default_scope

from boltz_mm.registry import DATASETS, MODELS
from boltz_mm.utils.checkpoint import load_state_dict_strict, state_dict_of
from boltz_mm.utils.restricted_loading import read_mmengine_checkpoint


def build_model(
    cfg: Config, checkpoint: str | None = None, device: str | torch.device | None = None
) -> tuple[BaseModel, dict[str, Any]]:
    """Build a model for inference.

    Args:
        cfg: Config with ``model``.
        checkpoint: Weights; None leaves the initial ones (``init_cfg`` of backbones is not fetched either way).
        device: Where the model goes; None takes an accelerator if there is one.

    Returns:
        The model in evaluation mode, and the ``dataset_meta`` (class names, palette) of the checkpoint or else of the
        config's test set; empty if neither tells.

    Raises:
        boltz_mm.utils.checkpoint.CheckpointError: If the file cannot be read or does not fit the model.
    """
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    model_cfg = copy.deepcopy(cfg.model)
    if model_cfg.get('backbone', {}).get('init_cfg') is not None:
        model_cfg.backbone.init_cfg = None
    model: BaseModel = revert_sync_batchnorm(MODELS.build(model_cfg))
    meta: dict[str, Any] = {}
    if checkpoint is not None:
        content = read_mmengine_checkpoint(checkpoint)
        load_state_dict_strict(model, state_dict_of(content, checkpoint), checkpoint)
        stored = content.get('meta')
        meta = dict(stored.get('dataset_meta') or {}) if isinstance(stored, dict) else {}
    meta = {**_dataset_meta(cfg), **{key.lower(): value for key, value in meta.items()}}
    return model.to(device or get_device()).eval(), meta


def _dataset_meta(cfg: Config) -> dict[str, Any]:
    """Class names and palette of the config's test set, without reading its files."""
    dataset = (cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}).get('dataset')
    if dataset is None:
        return {}
    dataset = copy.deepcopy(dataset)
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    dataset['lazy_init'] = True
    meta: dict[str, Any] = DATASETS.build(dataset).metainfo
    return meta
