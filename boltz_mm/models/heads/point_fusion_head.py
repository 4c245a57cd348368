"""Post-processing of Mask2Former by the official rules.

Source: Mask2Former (CVPR 2022), official file ``maskformer_model.py`` as carried by
apple/ml-autofocusformer-segmentation.  mmdet's ``MaskFormerFusionHead`` is the interface; it differs in keeping a
panoptic segment whose confident part is empty, in the numbers of segments and in having no semantic result.

Deviations: boxes of instances are those of their masks (officially zeros); a number of instances larger than there are
candidates means all of them (officially an error).

Held by the golden cases ``inference_tasks`` and ``maskformer_e2e_eval``.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmdet.models.seg_heads import MaskFormerFusionHead
from mmdet.structures import INSTANCE_OFFSET, SampleList
from mmdet.structures.mask import mask2bbox
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from boltz_mm.models.heads.point_mask2former_head import upsample_masks
from boltz_mm.registry import MODELS


class Segment(NamedTuple):
    """A segment of a panoptic result: its number, class, and whether the class is a thing."""

    id: int
    category_id: int
    isthing: bool


def semantic_inference(mask_cls: Tensor, mask_pred: Tensor) -> Tensor:
    """Class maps: masks weighted by the class probabilities of their queries.

    Args:
        mask_cls: Class logits ``[..., Q, K + 1]``.
        mask_pred: Mask logits ``[..., Q, H, W]``.

    Returns:
        ``[..., K, H, W]``; not normalised over classes.
    """
    return torch.einsum('...qk,...qhw->...khw', mask_cls.softmax(dim=-1)[..., :-1], mask_pred.sigmoid())


def _kept_queries(mask_cls: Tensor, object_mask_thr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Score and class of each query, and whether a panoptic result looks at it; each ``[Q]``."""
    scores, classes = mask_cls.softmax(dim=-1).max(dim=-1)
    return scores, classes, (classes != mask_cls.shape[-1] - 1) & (scores > object_mask_thr)


def _best_pairs(mask_cls: Tensor, max_per_image: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probability, class and query of the best pairs of a query and a class, best first; each ``[n]``."""
    probabilities = mask_cls.softmax(dim=-1)[:, :-1]
    scores, best = probabilities.flatten().topk(min(max_per_image, probabilities.numel()))
    return scores, best % probabilities.shape[1], best // probabilities.shape[1]


def panoptic_inference(
    mask_cls: Tensor,
    mask_pred: Tensor,
    things: Collection[int],
    object_mask_thr: float = 0.8,
    overlap_thr: float = 0.8,
) -> tuple[Tensor, list[Segment]]:
    """Give each pixel to a segment or to none.

    Args:
        mask_cls: Class logits of one image ``[Q, K + 1]``.
        mask_pred: Mask logits ``[Q, H, W]``.
        things: Thing classes; segments of each other class share a number.
        object_mask_thr: Queries count with a larger score of a class only.
        overlap_thr: Share of a query's mask that it has to be left with.

    Returns:
        Numbers of segments int32 ``[H, W]``, 0 for none, and the segments in ascending order, counted from 1 in the
        order of their queries.
    """
    scores, classes, keep = _kept_queries(mask_cls, object_mask_thr)
    scores, classes, masks = scores[keep], classes[keep], mask_pred[keep].sigmoid()
    if not len(masks):
        return mask_pred.new_zeros(mask_pred.shape[-2:], dtype=torch.int32), []
    owner = (scores[:, None, None] * masks).argmax(dim=0)
    confident = masks >= 0.5
    inside = confident.gather(0, owner[None])[0]
    # Three areas of each query: pixels it owns, pixels of its mask, pixels that are both; one transfer for all.
    count = len(masks)
    areas = (
        owner.flatten().bincount(minlength=count),
        confident.flatten(1).sum(dim=1),
        owner[inside].bincount(minlength=count),
    )
    table = [0] * count
    segments: list[Segment] = []
    shared: dict[int, int] = {}
    for k, (label, owned, original, both) in enumerate(torch.stack((classes, *areas), dim=1).tolist()):
        if not (owned and original and both) or owned / original < overlap_thr:
            continue
        isthing = label in things
        if label in shared:
            table[k] = shared[label]
            continue
        table[k] = len(segments) + 1
        segments.append(Segment(table[k], label, isthing))
        if not isthing:
            shared[label] = table[k]
    numbers = torch.tensor(table, dtype=torch.int32, device=owner.device)
    return torch.where(inside, numbers[owner], 0), segments


def instance_inference(
    mask_cls: Tensor, mask_pred: Tensor, max_per_image: int = 100, things: Collection[int] | None = None
) -> InstanceData:
    """The best pairs of a query and a class.

    Args:
        mask_cls: Class logits of one image ``[Q, K + 1]``.
        mask_pred: Mask logits ``[Q, H, W]``.
        max_per_image: Pairs to take.
        things: Leave out pairs of any other class, after taking them.  ``None``: keep all.

    Returns:
        ``labels``, ``scores`` (class probability times mean mask probability inside the mask), bool ``masks``
        ``[n, H, W]`` and ``bboxes`` (x1, y1, x2, y2) around them, by descending class probability.
    """
    scores, labels, queries = _best_pairs(mask_cls, max_per_image)
    if things is not None:
        keep = torch.isin(labels, torch.tensor(sorted(things), device=labels.device, dtype=labels.dtype))
        scores, labels, queries = scores[keep], labels[keep], queries[keep]
    # Several classes may name one query: its mask is rated once.
    used, which = queries.unique(return_inverse=True)
    logits = mask_pred[used]
    masks = logits > 0
    quality = (logits.sigmoid() * masks).flatten(1).sum(dim=1) / (masks.flatten(1).sum(dim=1) + 1e-6)
    boxes = mask2bbox(masks)
    return InstanceData(labels=labels, scores=scores * quality[which], masks=masks[which], bboxes=boxes[which])


@MODELS.register_module()
class PointMaskFusionHead(MaskFormerFusionHead):
    """Panoptic, instance and semantic results from the last prediction.

    ``test_cfg`` may hold ``panoptic_on`` (default True), ``instance_on``, ``semantic_on`` (default False),
    ``object_mask_thr`` (0.8), ``iou_thr`` (0.8) and ``max_per_image`` (100), as for mmdet's head.  Where semantic
    results alone are on, class maps are made in the size of the padded image and resized then; otherwise masks are
    resized first.

    Args:
        num_things_classes: Thing classes; they come first.
        num_stuff_classes: Stuff classes.
        test_cfg: See above.
        thing_classes: The thing classes where they do not come first.
        **kwargs: Of mmdet's head.
    """

    def __init__(
        self,
        num_things_classes: int = 80,
        num_stuff_classes: int = 53,
        test_cfg: dict | None = None,
        thing_classes: Collection[int] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(num_things_classes, num_stuff_classes, test_cfg or {}, **kwargs)
        self.thing_classes = frozenset(range(num_things_classes) if thing_classes is None else thing_classes)

    def panoptic_postprocess(self, mask_cls: Tensor, mask_pred: Tensor) -> PixelData:
        """Panoptic result of one image in mmdet's coding.

        Args:
            mask_cls: Class logits ``[Q, K + 1]``.
            mask_pred: Mask logits ``[Q, H, W]``.

        Returns:
            ``sem_seg`` int32 ``[1, H, W]``: the class, for things plus ``INSTANCE_OFFSET`` times the number of the
            segment; ``num_classes`` where there is none.  ``segment_ids`` ``[1, H, W]``: the numbers of segments, 0
            where there is none; the meta information ``segments_info`` lists them.
        """
        ids, segments = panoptic_inference(
            mask_cls,
            mask_pred,
            self.thing_classes,
            self.test_cfg.get('object_mask_thr', 0.8),
            self.test_cfg.get('iou_thr', 0.8),
        )
        codes = [self.num_classes, *(s.category_id + s.isthing * s.id * INSTANCE_OFFSET for s in segments)]
        coded = torch.tensor(codes, dtype=torch.int32, device=ids.device)[ids.long()]
        info = [segment._asdict() for segment in segments]
        return PixelData(sem_seg=coded[None], segment_ids=ids[None], metainfo={'segments_info': info})

    def instance_postprocess(self, mask_cls: Tensor, mask_pred: Tensor) -> InstanceData:
        """Instances of one image; of thing classes only.

        Args:
            mask_cls: Class logits ``[Q, K + 1]``.
            mask_pred: Mask logits ``[Q, H, W]``.

        Returns:
            See :func:`instance_inference`.
        """
        things = None if len(self.thing_classes) == self.num_classes else self.thing_classes
        return instance_inference(mask_cls, mask_pred, self.test_cfg.get('max_per_image', 100), things)

    def semantic_postprocess(self, mask_cls: Tensor, mask_pred: Tensor) -> PixelData:
        """Semantic result of one image.

        Args:
            mask_cls: Class logits ``[Q, K + 1]``.
            mask_pred: Mask logits ``[Q, H, W]``.

        Returns:
            ``sem_seg`` ``[1, H, W]``, the best class of each pixel, and its ``logits`` ``[K, H, W]``.
        """
        return _semantic_data(semantic_inference(mask_cls, mask_pred))

    def predict(
        self,
        mask_cls_results: Tensor,
        mask_pred_results: Tensor,
        batch_data_samples: SampleList,
        rescale: bool = False,
        **kwargs,
    ) -> list[dict]:
        """Results of a batch.

        Args:
            mask_cls_results: Class logits ``[B, Q, K + 1]``.
            mask_pred_results: Mask logits ``[B, Q, H, W]`` in the size of the padded images or of the stride-4 grid.
            batch_data_samples: Their ``img_shape`` is read, and ``ori_shape`` and ``batch_input_shape`` where needed.
            rescale: Bring results to the original size.
            **kwargs: Ignored, part of mmdet's interface.

        Returns:
            For each image a dictionary with ``pan_results``, ``ins_results``, ``sem_results``, each if it is on.
        """
        tasks = {
            'pan_results': (self.test_cfg.get('panoptic_on', True), self.panoptic_postprocess),
            'ins_results': (self.test_cfg.get('instance_on', False), self.instance_postprocess),
            'sem_results': (self.test_cfg.get('semantic_on', False), self.semantic_postprocess),
        }
        results = []
        for classes, masks, sample in zip(mask_cls_results, mask_pred_results, batch_data_samples, strict=True):
            # The other queries cannot be part of a result: their masks need not be enlarged.
            rows = self.needed_queries(classes)
            classes, meta = classes[rows], sample.metainfo
            padded = _to_padded_size(masks[None, rows], meta)[0]
            if self.resize_first:
                masks = _to_final_size(padded, meta, rescale)
                results.append({name: task(classes, masks) for name, (on, task) in tasks.items() if on})
            else:
                maps = _to_final_size(semantic_inference(classes, padded), meta, rescale)
                results.append({'sem_results': _semantic_data(maps)})
        return results

    @property
    def resize_first(self) -> bool:
        """Whether masks are resized before results are made of them; officially so unless all but semantic is off."""
        instances = self.test_cfg.get('panoptic_on', True) or self.test_cfg.get('instance_on', False)
        return instances or not self.test_cfg.get('semantic_on', False)

    def needed_queries(self, mask_cls: Tensor) -> Tensor:
        """Queries whose masks the results that are on may look at.

        Args:
            mask_cls: Class logits of one image ``[Q, K + 1]``.

        Returns:
            Indexes, ascending, at least one.
        """
        needed = mask_cls.new_zeros(len(mask_cls), dtype=torch.bool)
        if self.test_cfg.get('semantic_on', False):
            needed[:] = True
        if self.test_cfg.get('panoptic_on', True):
            needed |= _kept_queries(mask_cls, self.test_cfg.get('object_mask_thr', 0.8))[2]
        if self.test_cfg.get('instance_on', False):
            needed[_best_pairs(mask_cls, self.test_cfg.get('max_per_image', 100))[2]] = True
        rows = needed.nonzero()[:, 0]
        return rows if len(rows) else rows.new_zeros(1)


def _semantic_data(maps: Tensor) -> PixelData:
    return PixelData(sem_seg=maps.argmax(dim=0, keepdim=True), logits=maps)


def _to_padded_size(masks: Tensor, meta: dict) -> Tensor:
    """Masks ``[B, Q, h, w]`` of the padded image, or of its stride-4 grid, in the size of the padded image."""
    size = tuple(meta.get('batch_input_shape', masks.shape[-2:]))
    return masks if tuple(masks.shape[-2:]) == size else upsample_masks(masks, size)


def _to_final_size(maps: Tensor, meta: dict, rescale: bool) -> Tensor:
    """Maps ``[C, H, W]`` of the padded image in the size of the image, or of the original one."""
    height, width = meta['img_shape'][:2]
    maps = maps[:, :height, :width]
    if rescale:
        size = tuple(meta['ori_shape'][:2])
        maps = F.interpolate(maps[None], size=size, mode='bilinear', align_corners=False)[0]
    return maps
