"""The official way of running BoxeR-2D, as a baseline: all queries' masks, all classes' channels, full-image pasting.

Follows the work that the official code does (kienduynguyen/BoxeR: ``module/box_transformer.py``,
``module/predictor.py``, ``dataset/coco.py::format_for_evalai``), on the weights of one of our models, in plain PyTorch:

* ``evaluation``: what ``model.eval()`` computes, with which the official trainer validates.  Every decoder layer
  carries the mask features of all queries along, every layer's queries get classes, boxes and masks of all classes, and
  all encoder tokens are rated a second time and get boxes.
* ``inference``: what ``model.inference()`` computes.  Mask features, classes, boxes and masks of the last layer only.

Results are those of our ``predict``; ``tests/benchmark/test_boxer_baseline.py`` holds that, and the golden cases.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor, nn

from boltz_mm.models.detectors.boxer import BoxeR
from boltz_mm.models.layers.box_transformer import BoxTransformerDecoderLayer


class LayerPredictions(NamedTuple):
    """Class logits ``[B, Q, K]``, boxes ``[B, Q, 4]`` and mask logits ``[B, Q, 2m, 2m]`` (``None`` without masks)."""

    cls_scores: Tensor
    bbox_preds: Tensor
    mask_logits: Tensor | None


class OfficialBoxeR(nn.Module):
    """Run the weights of a :class:`BoxeR` with the official arrangement of work.

    Args:
        model: The model; shared, not copied.
        mode: ``'evaluation'`` or ``'inference'``.

    Raises:
        ValueError: Unknown ``mode``.
    """

    def __init__(self, model: BoxeR, mode: str = 'evaluation') -> None:
        super().__init__()
        if mode not in ('evaluation', 'inference'):
            raise ValueError(f"mode must be 'evaluation' or 'inference', got {mode!r}")
        self.model = model
        self.mode = mode

    @torch.no_grad()
    def predict(self, inputs: Tensor, samples: SampleList) -> list[InstanceData]:
        """Detections of a batch; arguments and results as in ``BoxeR.predict``, in no order of scores."""
        last = self.forward(inputs, samples)[-1]
        return [
            postprocess(
                last.cls_scores[i],
                last.bbox_preds[i],
                None if last.mask_logits is None else last.mask_logits[i],
                sample.ori_shape[:2],
            )
            for i, sample in enumerate(samples)
        ]

    def forward(self, inputs: Tensor, samples: SampleList) -> list[LayerPredictions]:
        """Predictions of every decoder layer (``evaluation``) or of the last one (``inference``)."""
        model = self.model
        encoder_inputs, shared = model.pre_transformer(model.extract_feat(inputs), samples)
        decoder_inputs, head_inputs = model.pre_decoder(**model.forward_encoder(**encoder_inputs))
        if self.mode == 'evaluation':
            tokens, head = head_inputs['first_stage'], model.bbox_head
            head.enc_cls_branch(tokens.memory)
            head.forward_first_stage_boxes(tokens.memory, tokens.ref_windows, tokens.usable)
        predictions = []
        layers = model.decoder.layers
        target = decoder_inputs.pop('query')
        references = head_inputs['references']
        for index, layer in enumerate(layers):
            wanted = self.mode == 'evaluation' or index == len(layers) - 1
            target, rois = decoder_layer(layer, target, **decoder_inputs, **shared, with_rois=wanted)
            if wanted:
                predictions.append(self._head(target, rois, references))
        return predictions

    def _head(self, hidden: Tensor, rois: Tensor | None, references: Tensor) -> LayerPredictions:
        head = self.model.bbox_head
        cls_scores, bbox_preds = (output[0] for output in head(hidden[None], references))
        if rois is None:
            return LayerPredictions(cls_scores, bbox_preds, None)
        masks = all_class_masks(head.mask_head, rois.flatten(0, 1))  # [B * Q, K, 2m, 2m]
        labels = cls_scores.flatten(0, 1).argmax(-1)
        masks = masks.gather(1, labels[:, None, None, None].expand(-1, 1, *masks.shape[-2:]))[:, 0]
        return LayerPredictions(cls_scores, bbox_preds, masks.view(*hidden.shape[:2], *masks.shape[-2:]))


def decoder_layer(
    layer: BoxTransformerDecoderLayer,
    target: Tensor,
    query_pos: Tensor,
    memory: Tensor,
    ref_windows: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    key_padding_mask: Tensor | None,
    valid_ratios: Tensor | None,
    with_rois: bool,
) -> tuple[Tensor, Tensor | None]:
    """A decoder layer that carries the mask features ``[B, Q, m, m, C]`` of all queries along."""
    query = target + query_pos
    target = layer.norm1(target + layer.self_attn(query, query, target, need_weights=False)[0])
    attention = layer.multihead_attn
    arguments = (target + query_pos, memory, spatial_shapes, ref_windows, key_padding_mask, valid_ratios)
    if not (layer.with_mask and with_rois):
        arguments += (False,) if layer.with_mask else ()
        target = layer.norm2(target + attention(*arguments))
        return layer.norm3(_feed_forward(layer, target)), None
    attended, rois = attention(*arguments, True)
    target = layer.norm2(target + attended)
    rois = layer.norm2(target[:, :, None, None] + rois)
    target = layer.norm3(_feed_forward(layer, target))
    if layer.residual_mode == 'v1':
        return target, layer.norm3(_feed_forward(layer, rois))
    return target, layer.norm3(target[:, :, None, None] + rois)


def _feed_forward(layer: BoxTransformerDecoderLayer, x: Tensor) -> Tensor:
    return x + layer.linear2(F.relu(layer.linear1(x)))


def all_class_masks(mask_head: nn.Module, rois: Tensor) -> Tensor:
    """Mask logits ``[R, K, 2m, 2m]`` of all classes from features ``[R, m, m, C]``, by convolutions."""
    x = mask_head.upsample(rois.permute(0, 3, 1, 2)).relu()
    return mask_head.conv_logits(mask_head.conv(x).relu())


def postprocess(
    cls_scores: Tensor, bbox_preds: Tensor, mask_logits: Tensor | None, size: tuple[int, int], count: int = 100
) -> InstanceData:
    """The best pairs of query and class of one image, masks pasted over full-image sampling grids.

    Args:
        cls_scores: ``[Q, K]`` logits.
        bbox_preds: ``[Q, 4]`` (cx, cy, w, h) in 0..1.
        mask_logits: ``[Q, m, m]`` or ``None``.
        size: Height and width of the image.
        count: Number of results.

    Returns:
        ``bboxes``, ``scores``, ``labels``, ``query_inds`` and, with masks, ``masks``.
    """
    height, width = size
    num_classes = cls_scores.shape[-1]
    scores, indexes = cls_scores.sigmoid().flatten().topk(min(count, cls_scores.numel()), sorted=False)
    queries = indexes // num_classes
    boxes = bbox_cxcywh_to_xyxy(bbox_preds)[queries] * bbox_preds.new_tensor([width, height, width, height])
    result = InstanceData(bboxes=boxes, scores=scores, labels=indexes % num_classes, query_inds=queries)
    if mask_logits is not None:
        probs = paste_full_image(mask_logits[queries].sigmoid(), boxes, size)
        result.masks = probs >= 0.5
        area = result.masks.flatten(1).sum(-1)
        quality = (probs * result.masks).flatten(1).sum(-1) / area
        result.scores = scores * torch.where(area > 0, quality, quality.new_zeros(()))
    return result


def paste_full_image(probs: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste ``[n, m, m]`` masks into ``[n, H, W]`` images: one sampling grid of the whole image for each."""
    height, width = size
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)  # each [n, 1]
    x = (torch.arange(width, dtype=probs.dtype, device=probs.device) + 0.5 - x1) / (x2 - x1) * 2 - 1  # [n, W]
    y = (torch.arange(height, dtype=probs.dtype, device=probs.device) + 0.5 - y1) / (y2 - y1) * 2 - 1  # [n, H]
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(probs[:, None], grid, mode='bilinear', padding_mode='zeros', align_corners=False)[:, 0]
