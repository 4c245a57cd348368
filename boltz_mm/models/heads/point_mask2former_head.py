"""Mask2Former on token sets as a head of mmdet's ``Mask2Former`` detector.

Papers: "Masked-attention Mask Transformer for Universal Image Segmentation" (CVPR 2022, arXiv 2112.01527),
"AutoFocusFormer: Image Segmentation off the Grid" (CVPR 2023, arXiv 2304.12406).  Official code:
apple/ml-autofocusformer-segmentation, ``maskformer_model.py`` and ``meta_arch/mask_former_head.py``.

``loss`` and the interface are those of mmdet's ``MaskFormerHead``; what is computed is official, see
:class:`PointSampledSetLoss` for where that differs from mmdet.

Held by the golden cases ``seg_full_*`` and ``maskformer_e2e_*``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import MaskFormerHead
from mmdet.structures import SampleList
from mmengine.model import BaseModule
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from boltz_mm.models.losses.point_sampled_set_loss import PointSampledSetLoss
from boltz_mm.registry import MODELS
from boltz_mm.structures import PointFeature

# Cells of the canvas are this many pixels apart.
_STRIDE = 4


def upsample_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Bring masks of the stride-4 grid to the size of the images.

    Args:
        masks: Mask logits ``[B, Q, h, w]``.
        size: Height and width of the images; multiples of 4 in the official code (of 32, to be exact).  What the
            backbone has padded beyond them is cut off.

    Returns:
        ``[B, Q, H, W]``.

    Raises:
        ValueError: ``size`` is not one that gives such a grid.
    """
    canvas, (height, width) = tuple(masks.shape[-2:]), size[:2]
    if canvas != (-(-height // _STRIDE), -(-width // _STRIDE)):
        raise ValueError(f'images of {height} x {width} pixels do not give masks of {canvas[0]} x {canvas[1]} cells')
    full = (canvas[0] * _STRIDE, canvas[1] * _STRIDE)
    return F.interpolate(masks, size=full, mode='bilinear', align_corners=False)[..., :height, :width]


@MODELS.register_module()
class PointMask2FormerHead(MaskFormerHead):
    """Pixel decoder, masked transformer decoder and set loss on the levels of a point backbone.

    In a config::

        model = dict(
            type='mmdet.Mask2Former',
            backbone=dict(type='boltz_mm.AFF', arch='tiny', out_type='points'),
            panoptic_head=dict(
                type='boltz_mm.PointMask2FormerHead', in_channels=[64, 128, 256, 512],
                num_things_classes=80, num_stuff_classes=53),
            panoptic_fusion_head=dict(
                type='boltz_mm.PointMaskFusionHead', num_things_classes=80, num_stuff_classes=53),
            train_cfg=dict(num_points=12544),
            test_cfg=dict(panoptic_on=True, instance_on=True))

    Args:
        in_channels: Channels of each level, finest first.
        feat_channels: Channels ``d`` of both decoders.
        out_channels: Channels of the mask features.
        num_things_classes: Thing classes; they come first.
        num_stuff_classes: Stuff classes.
        num_queries: Queries ``Q``.
        pixel_decoder: Config of a :class:`PointPixelDecoder`; channels are filled in.
        transformer_decoder: Config of a :class:`PointMaskedDecoder`; classes, queries and channels are filled in.
        loss_cls: See :class:`PointSampledSetLoss`; the official one where ``None``.
        loss_mask: The same.
        loss_dice: The same.
        per_image: Embed the positions of each image on its own, so that a result does not depend on the other images
            of the batch; officially it does, see :class:`PointSineEncoding`.
        upsample: Predict masks in the size of the images, as mmdet's fusion heads expect.  ``False`` hands on those of
            the stride-4 grid; :class:`PointMaskFusionHead` then enlarges the few that it needs, which gives the same.
        train_cfg: May hold ``assigner``, ``num_points``, ``oversample_ratio``, ``importance_sample_ratio``.
        test_cfg: Kept for mmdet; the fusion head reads it.
        init_cfg: Initialisation of mmengine.  Without it parameters start as in the official code.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        feat_channels: int = 256,
        out_channels: int = 256,
        num_things_classes: int = 80,
        num_stuff_classes: int = 53,
        num_queries: int = 100,
        pixel_decoder: dict | None = None,
        transformer_decoder: dict | None = None,
        loss_cls: dict | None = None,
        loss_mask: dict | None = None,
        loss_dice: dict | None = None,
        per_image: bool = False,
        upsample: bool = True,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        # mmdet's own constructors build grid modules.
        BaseModule.__init__(self, init_cfg=init_cfg)
        self.num_things_classes = num_things_classes
        self.num_stuff_classes = num_stuff_classes
        self.num_classes = num_things_classes + num_stuff_classes
        self.num_queries = num_queries
        self.upsample = upsample
        self.train_cfg = train_cfg
        self.test_cfg = test_cfg
        self.pixel_decoder = MODELS.build(
            {
                'type': 'boltz_mm.PointPixelDecoder',
                **(pixel_decoder or {}),
                'in_channels': list(in_channels),
                'feat_channels': feat_channels,
                'out_channels': out_channels,
                'per_image': per_image,
            }
        )
        self.predictor = MODELS.build(
            {
                'type': 'boltz_mm.PointMaskedDecoder',
                'num_levels': len(in_channels) - 1,
                'embed_dims': feat_channels,
                **(transformer_decoder or {}),
                'num_classes': self.num_classes,
                'in_channels': feat_channels,
                'out_channels': out_channels,
                'num_queries': num_queries,
                'per_image': per_image,
            }
        )
        sampling = {
            key: value
            for key, value in (train_cfg or {}).items()
            if key in ('assigner', 'num_points', 'oversample_ratio', 'importance_sample_ratio')
        }
        self.criterion = PointSampledSetLoss(self.num_classes, loss_cls, loss_mask, loss_dice, **sampling)

    def init_weights(self) -> None:
        """Apply ``init_cfg``; the parts initialise themselves when they are built."""
        BaseModule.init_weights(self)

    def forward(
        self, x: Sequence[PointFeature], batch_data_samples: SampleList | None = None, last_only: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Predict classes and masks.

        Args:
            x: Levels of the backbone, finest first.
            batch_data_samples: Ignored, part of mmdet's interface.
            last_only: Make the last prediction only.

        Returns:
            Class logits ``[B, Q, K + 1]`` and mask logits ``[B, Q, h, w]`` of each prediction, the final one last.
        """
        decoded = self.pixel_decoder(x)
        return self.predictor(decoded.memory, decoded.mask_features, decoded.canvas, last_only)

    def preprocess_gt(
        self, batch_gt_instances: list[InstanceData], batch_gt_semantic_segs: list[PixelData | None]
    ) -> list[InstanceData]:
        """Labels and masks of the objects and, in ascending order, of the stuff classes of each image.

        Args:
            batch_gt_instances: ``labels`` ``[n]`` and ``masks`` (mmdet's masks or a tensor ``[n, H, W]``).
            batch_gt_semantic_segs: Semantic map with ``sem_seg`` ``[1, H, W]`` or ``None``.

        Returns:
            ``labels`` ``[m]`` and bool ``masks`` ``[m, H, W]`` of each image.
        """
        targets = []
        for instances, semantic in zip(batch_gt_instances, batch_gt_semantic_segs, strict=True):
            labels, masks = instances.labels, instances.masks
            if not isinstance(masks, Tensor):
                masks = masks.to_tensor(dtype=torch.bool, device=labels.device)
            masks = masks.bool()
            if semantic is not None:
                area = semantic.sem_seg.squeeze(0)
                present = area.unique()
                stuff = present[(present >= self.num_things_classes) & (present < self.num_classes)].to(labels)
                labels = torch.cat((labels, stuff))
                masks = torch.cat((masks, area == stuff[:, None, None]))
            targets.append(InstanceData(labels=labels, masks=masks))
        return targets

    def loss_by_feat(
        self,
        all_cls_scores: Sequence[Tensor],
        all_mask_preds: Sequence[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
    ) -> dict[str, Tensor]:
        """Losses of all predictions, see :class:`PointSampledSetLoss`.

        Args:
            all_cls_scores: Class logits of each prediction.
            all_mask_preds: Mask logits of each prediction.
            batch_gt_instances: What :meth:`preprocess_gt` gave.
            batch_img_metas: Not needed.

        Returns:
            Weighted losses by name.
        """
        return self.criterion(all_cls_scores, all_mask_preds, batch_gt_instances)

    def predict(self, x: Sequence[PointFeature], batch_data_samples: SampleList) -> tuple[Tensor, Tensor]:
        """The last prediction, its masks in the size of the padded images (unless ``upsample`` is off).

        Args:
            x: Levels of the backbone, finest first.
            batch_data_samples: Their ``batch_input_shape`` is read.

        Returns:
            Class logits ``[B, Q, K + 1]`` and mask logits ``[B, Q, H, W]``.
        """
        [classes], [masks] = self(x, batch_data_samples, last_only=True)
        if self.upsample:
            masks = upsample_masks(masks, batch_data_samples[0].metainfo['batch_input_shape'])
        return classes, masks
