"""Mask2Former on token sets as a decode head of mmseg's ``EncoderDecoder``.

See :mod:`boltz_mm.models.heads.point_mask2former_head` for sources.  A target is one mask for each class that is
present; the class maps are made in the size of the padded image, then mmseg crops and resizes them, which is the
official order of purely semantic models.

Held by the golden case ``maskformer_e2e_eval`` (``sem_seg_after``).
"""

from collections.abc import Sequence

from mmengine.structures import InstanceData
from torch import Tensor

from boltz_mm.models.heads.point_fusion_head import semantic_inference
from boltz_mm.models.heads.point_mask2former_head import PointMask2FormerHead, upsample_masks
from boltz_mm.registry import MODELS
from boltz_mm.structures import PointFeature


@MODELS.register_module()
class PointMask2FormerSegHead(PointMask2FormerHead):
    """:class:`PointMask2FormerHead` for semantic segmentation.

    In a config::

        model = dict(
            type='mmseg.EncoderDecoder',
            backbone=dict(type='boltz_mm.AFF', arch='tiny', out_type='points'),
            decode_head=dict(
                type='boltz_mm.PointMask2FormerSegHead', in_channels=[64, 128, 256, 512], num_classes=150),
            train_cfg=dict(), test_cfg=dict(mode='whole'))

    Args:
        num_classes: Classes ``K``, at least 2.
        ignore_index: Label of pixels that belong to no target.
        align_corners: For mmseg's resizing of the class maps; the official code has False.
        **kwargs: Of :class:`PointMask2FormerHead`; ``train_cfg`` is that of the head.

    Raises:
        ValueError: There is one class only.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, align_corners: bool = False, **kwargs) -> None:
        if num_classes < 2:
            raise ValueError(f'num_classes must be at least 2 (the background counts), got {num_classes}')
        super().__init__(num_things_classes=num_classes, num_stuff_classes=0, **kwargs)
        self.out_channels = num_classes
        self.ignore_index = ignore_index
        self.align_corners = align_corners

    def make_targets(self, batch_data_samples: Sequence) -> list[InstanceData]:
        """One mask for each class that is present in an image.

        Args:
            batch_data_samples: mmseg's samples with ``gt_sem_seg`` ``[1, H, W]``.

        Returns:
            ``labels`` ``[n]``, ascending, and bool ``masks`` ``[n, H, W]`` of each image.
        """
        targets = []
        for sample in batch_data_samples:
            area = sample.gt_sem_seg.data.squeeze(0)
            labels = area.unique()
            labels = labels[labels != self.ignore_index].long()
            targets.append(InstanceData(labels=labels, masks=area == labels[:, None, None]))
        return targets

    def loss(
        self, x: Sequence[PointFeature], batch_data_samples: Sequence, train_cfg: dict | None = None
    ) -> dict[str, Tensor]:
        """Losses of all predictions.

        Args:
            x: Levels of the backbone, finest first.
            batch_data_samples: mmseg's samples with ``gt_sem_seg``.
            train_cfg: Of the segmentor; not used.

        Returns:
            Weighted losses by name.
        """
        classes, masks = self(x)
        return self.criterion(classes, masks, self.make_targets(batch_data_samples))

    def predict(self, x: Sequence[PointFeature], batch_img_metas: list[dict], test_cfg: dict | None = None) -> Tensor:
        """Class maps in the size of the padded images.

        Args:
            x: Levels of the backbone, finest first.
            batch_img_metas: ``pad_shape`` or ``img_shape`` is read, whichever the features stand for.
            test_cfg: Of the segmentor; not used.

        Returns:
            ``[B, K, H, W]``, not normalised over classes.
        """
        [classes], [masks] = self(x, last_only=True)
        # Of the crops of a sliding window mmseg writes the size to img_shape and leaves pad_shape alone.
        meta = batch_img_metas[0]
        sizes = [meta[key] for key in ('pad_shape', 'img_shape') if key in meta]
        fitting = [size for size in sizes if tuple(-(-n // 4) for n in size[:2]) == tuple(masks.shape[-2:])]
        return semantic_inference(classes, upsample_masks(masks, (fitting or sizes)[0]))
