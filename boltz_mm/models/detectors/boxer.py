"""BoxeR-2D: detection and instance segmentation with box attention.

Paper: "BoxeR: Box-Attention for 2D and 3D Transformers" (CVPR 2022, arXiv 2111.13087).  Official code:
kienduynguyen/BoxeR, ``e2edet/model/boxer2d.py``.

Deviations, none of them in value: masks are computed for the queries that a loss or a result needs (see the head); a
batch without padding is computed without a mask, as the official code does for a single image.

Held by the golden cases ``boxer2d_*``.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmdet.models.detectors import DetectionTransformer
from mmdet.structures import OptSampleList, SampleList
from torch import Tensor

from boltz_mm.models.heads.boxer_head import FirstStage
from boltz_mm.models.layers.box_position import valid_ratios
from boltz_mm.models.layers.box_transformer import RoIState
from boltz_mm.registry import MODELS


class BoxeROutputs(NamedTuple):
    """Everything BoxeR predicts, of all layers, queries and tokens.

    Attributes:
        cls_scores: Class logits ``[layers, B, Q, K]``.
        bbox_preds: Boxes ``[layers, B, Q, 4]`` (cx, cy, w, h) in 0..1 of the unpadded image.
        mask_logits: ``[layers, B, Q, 28, 28]`` on the grid of the box, of each query's own best class; ``None``
            without masks.
        enc_cls_scores: Ratings ``[B, S, 1]`` of the encoder's tokens.
        enc_bbox_preds: Their boxes ``[B, S, 4]``.
        topk_indexes: The tokens ``[B, Q]`` that became queries.
        memory: Encoder output ``[B, S, C]``.
        hidden_states: Decoder outputs ``[layers, B, Q, C]``.
        references: Windows of the queries ``[B, Q, 4]``.
    """

    cls_scores: Tensor
    bbox_preds: Tensor
    mask_logits: Tensor | None
    enc_cls_scores: Tensor
    enc_bbox_preds: Tensor
    topk_indexes: Tensor
    memory: Tensor
    hidden_states: Tensor
    references: Tensor


@MODELS.register_module()
class BoxeR(DetectionTransformer):
    """Backbone, projections, box-attention encoder, query selection, box- or instance-attention decoder, head.

    Masks are predicted if the head is built with ``with_mask``; the decoder's layers then need ``with_mask`` too.

    Args:
        backbone: Config of the backbone.
        neck: Config of the projections to one width, see :class:`boltz_mm.models.necks.BoxeRNeck`.
        encoder: Config of :class:`boltz_mm.models.layers.BoxTransformerEncoder` without type.
        decoder: Config of :class:`boltz_mm.models.layers.BoxTransformerDecoder` without type.
        bbox_head: Config of the head.
        positional_encoding: Config of :class:`boltz_mm.models.layers.BoxPositionalEncoding` without type, that is
            ``embed_dims`` and ``ref_size`` (width of a token's window in cells).
        num_queries: Tokens that become queries, Q.
        train_cfg: See the head.
        test_cfg: See the head.
        data_preprocessor: Config of the data preprocessor.
        init_cfg: See mmengine's ``BaseModule``.

    Raises:
        ValueError: The head predicts masks and the decoder has no features for them.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict | None = None,
        encoder: dict | None = None,
        decoder: dict | None = None,
        bbox_head: dict | None = None,
        positional_encoding: dict | None = None,
        num_queries: int = 300,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            backbone=backbone,
            neck=neck,
            encoder=dict(encoder or {}),
            decoder=dict(decoder or {}),
            bbox_head=dict(bbox_head or {}),
            positional_encoding=dict(positional_encoding or {}),
            num_queries=num_queries,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )

    def _init_layers(self) -> None:
        """Build what is between neck and head from the configs that mmdet's base class keeps under these names."""
        parts = {
            'encoder': 'boltz_mm.BoxTransformerEncoder',
            'decoder': 'boltz_mm.BoxTransformerDecoder',
            'positional_encoding': 'boltz_mm.BoxPositionalEncoding',
        }
        for name, default_type in parts.items():
            setattr(self, name, MODELS.build({'type': default_type, **getattr(self, name)}))
        self.embed_dims = self.encoder.embed_dims
        layers_with_mask = all(layer.with_mask for layer in self.decoder.layers)
        if self.bbox_head.with_mask and not layers_with_mask:
            raise ValueError("bbox_head has with_mask=True, so decoder['layer_cfg'] needs with_mask=True")

    @property
    def with_mask(self) -> bool:
        """Whether masks are predicted."""
        return self.bbox_head.with_mask

    # ------------------------------------------------------------------------------------------------- interface

    def loss(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, num_boxes: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            batch_inputs: Images ``[B, 3, H, W]``, normalised, padded at the right and bottom.
            batch_data_samples: Ground truth and meta information of each image.
            num_boxes: Normaliser of the losses, by default the number of objects in the batch; see
                :meth:`BoxeRHead.loss_by_feat`.

        Returns:
            Weighted losses and the accuracy, see :meth:`BoxeRHead.loss_by_feat`.
        """
        head_inputs = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples)
        head_inputs.pop('topk_indexes')
        return self.bbox_head.loss(**head_inputs, batch_data_samples=batch_data_samples, num_boxes=num_boxes)

    def predict(self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True) -> SampleList:
        """Results of a batch.

        Args:
            batch_inputs: Images ``[B, 3, H, W]``.
            batch_data_samples: Meta information of each image.
            rescale: Give results in the original image instead of the resized one.

        Returns:
            The samples with ``pred_instances``, see :meth:`BoxeRHead.predict_by_feat`.
        """
        head_inputs = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples, self._last_layer)
        results = self.bbox_head.predict(**head_inputs, batch_data_samples=batch_data_samples, rescale=rescale)
        return self.add_pred_to_datasample(batch_data_samples, results)

    @property
    def _last_layer(self) -> tuple[int]:
        return (len(self.decoder.layers) - 1,)

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: OptSampleList = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Predictions of the last layer without post-processing.

        Args:
            batch_inputs: Images ``[B, 3, H, W]``.
            batch_data_samples: Meta information of each image; without, no image is padded.

        Returns:
            Class logits ``[B, Q, K]``, boxes ``[B, Q, 4]`` (cx, cy, w, h) in 0..1 and, with masks, mask logits
            ``[B, Q, 28, 28]``.
        """
        inputs = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples, self._last_layer)
        cls_scores, bbox_preds = self.bbox_head(inputs['hidden_states'][-1:], inputs['references'])
        if not self.with_mask:
            return cls_scores[0], bbox_preds[0]
        masks = self._all_masks(cls_scores, inputs['compute_rois'], self._last_layer)
        return cls_scores[0], bbox_preds[0], masks[0]

    def forward_all(self, batch_inputs: Tensor, batch_data_samples: OptSampleList = None) -> BoxeROutputs:
        """Predictions of all layers, masks of all queries, and the first stage.

        This is what the official model gives in evaluation mode.  It is for study: ``loss`` and ``predict`` reach their
        results with a fraction of it.

        Args:
            batch_inputs: Images ``[B, 3, H, W]``.
            batch_data_samples: Meta information of each image; without, no image is padded.

        Returns:
            See :class:`BoxeROutputs`.
        """
        inputs = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples)
        hidden_states, references = inputs['hidden_states'], inputs['references']
        tokens = inputs['first_stage']
        cls_scores, bbox_preds = self.bbox_head(hidden_states, references)
        masks = None
        if self.with_mask:
            masks = self._all_masks(cls_scores, inputs['compute_rois'], range(len(hidden_states)))
        return BoxeROutputs(
            cls_scores=cls_scores,
            bbox_preds=bbox_preds,
            mask_logits=masks,
            enc_cls_scores=tokens.class_logits,
            enc_bbox_preds=self.bbox_head.forward_first_stage_boxes(tokens.memory, tokens.ref_windows, tokens.usable),
            topk_indexes=inputs['topk_indexes'],
            memory=tokens.memory,
            hidden_states=hidden_states,
            references=references,
        )

    def _all_masks(
        self, cls_scores: Tensor, compute_rois: Callable[[int, list[Tensor]], Tensor], layers: Sequence[int]
    ) -> Tensor:
        """Masks ``[layers, B, Q, m, m]`` of all queries of ``layers`` with class logits ``[layers, B, Q, K]``."""
        batch, num_queries = cls_scores.shape[1:3]
        rows = [torch.arange(num_queries, device=cls_scores.device)] * batch
        masks = [
            self.bbox_head.forward_masks(compute_rois(layer, rows), scores.flatten(0, 1))
            for layer, scores in zip(layers, cls_scores, strict=True)
        ]
        return torch.stack(masks).unflatten(1, (batch, num_queries))

    # ------------------------------------------------------------------------------------------------- transformer

    def forward_transformer(
        self,
        img_feats: tuple[Tensor, ...],
        batch_data_samples: OptSampleList = None,
        roi_layers: Collection[int] | None = None,
    ) -> dict:
        """From features to the arguments of the head.

        Args:
            img_feats: Features ``[B, C, H_l, W_l]`` of all levels.
            batch_data_samples: Meta information of each image; without, no image is padded.
            roi_layers: Decoder layers whose masks may be asked for, by default all; the others' memory is freed.

        Returns:
            ``hidden_states`` ``[layers, B, Q, C]``, ``references`` ``[B, Q, 4]``, ``first_stage``, ``compute_rois``
            and ``topk_indexes`` ``[B, Q]``.
        """
        encoder_inputs, decoder_inputs = self.pre_transformer(img_feats, batch_data_samples)
        queries, head_inputs = self.pre_decoder(**self.forward_encoder(**encoder_inputs))
        return head_inputs | self.forward_decoder(**decoder_inputs, **queries, roi_layers=roi_layers)

    def pre_transformer(
        self, img_feats: tuple[Tensor, ...], batch_data_samples: OptSampleList = None
    ) -> tuple[dict, dict]:
        """Lay out the levels as tokens.

        Args:
            img_feats: Features ``[B, C, H_l, W_l]`` of all levels.
            batch_data_samples: Meta information of each image (``batch_input_shape``, ``img_shape``).

        Returns:
            The arguments of :meth:`forward_encoder` and those of them that :meth:`forward_decoder` takes too.
        """
        shapes = [(int(feat.shape[-2]), int(feat.shape[-1])) for feat in img_feats]
        masks = level_masks(shapes, batch_data_samples, img_feats[0].device)
        windows = self.positional_encoding.reference_windows(shapes, masks, img_feats[0].device)
        shared = {
            'spatial_shapes': shapes,
            'key_padding_mask': None if masks is None else torch.cat([m.flatten(1) for m in masks], dim=1),
            'valid_ratios': None if masks is None else valid_ratios(masks),
        }
        tokens = torch.cat([feat.flatten(2).transpose(1, 2) for feat in img_feats], dim=1)  # [B, S, C]
        windows = windows.to(tokens.dtype if tokens.dtype == torch.float64 else torch.float32)
        pos = self.positional_encoding(windows).expand_as(tokens)
        encoder_inputs = {'feat': tokens, 'feat_pos': pos, 'ref_windows': windows.expand(len(tokens), -1, -1), **shared}
        return encoder_inputs, shared

    def forward_encoder(
        self,
        feat: Tensor,
        feat_pos: Tensor,
        ref_windows: Tensor,
        spatial_shapes: list[tuple[int, int]],
        key_padding_mask: Tensor | None,
        valid_ratios: Tensor | None,
    ) -> dict:
        """Encode tokens ``[B, S, C]``; the result holds the arguments of :meth:`pre_decoder`."""
        memory = self.encoder(feat, feat_pos, spatial_shapes, ref_windows, key_padding_mask, valid_ratios)
        return {'memory': memory, 'ref_windows': ref_windows, 'key_padding_mask': key_padding_mask}

    def pre_decoder(self, memory: Tensor, ref_windows: Tensor, key_padding_mask: Tensor | None) -> tuple[dict, dict]:
        """Turn the best rated tokens into queries.

        Args:
            memory: ``[B, S, C]``.
            ref_windows: ``[B, S, 4]``.
            key_padding_mask: ``[B, S]`` bool or ``None``.

        Returns:
            The arguments of :meth:`forward_decoder` and those of the head.
        """
        head = self.bbox_head
        proposals = self.encoder.select_proposals(
            memory, ref_windows, key_padding_mask, head.enc_cls_branch, head.enc_reg_branch, self.num_queries
        )
        decoder_inputs = {
            'query': proposals.target,
            'query_pos': proposals.query_pos,
            'memory': memory,
            'ref_windows': proposals.ref_windows,
        }
        head_inputs = {
            'references': proposals.ref_windows,
            'first_stage': FirstStage(memory, ref_windows, proposals.class_logits, proposals.usable),
            'topk_indexes': proposals.topk_indexes,
        }
        return decoder_inputs, head_inputs

    def forward_decoder(
        self,
        query: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        ref_windows: Tensor,
        spatial_shapes: list[tuple[int, int]],
        key_padding_mask: Tensor | None,
        valid_ratios: Tensor | None,
        roi_layers: Collection[int] | None = None,
    ) -> dict:
        """Decode queries ``[B, Q, C]``; the result holds the head's ``hidden_states`` and ``compute_rois``."""
        output = self.decoder(
            query, query_pos, memory, spatial_shapes, ref_windows, key_padding_mask, valid_ratios, roi_layers
        )
        rois = partial(self._compute_rois, output.roi_states) if self.with_mask else None
        return {'hidden_states': output.hidden_states, 'compute_rois': rois}

    def _compute_rois(self, states: Sequence[RoIState], layer: int, rows: list[Tensor]) -> Tensor:
        return self.decoder.compute_rois(layer, states[layer], rows)


def level_masks(
    shapes: Sequence[tuple[int, int]], batch_data_samples: OptSampleList, device: torch.device
) -> list[Tensor] | None:
    """Padding of each level.

    Args:
        shapes: Height and width of each level.
        batch_data_samples: ``batch_input_shape`` and ``img_shape`` of each image; ``None`` if nothing is padded.
        device: Where to put the masks.

    Returns:
        ``[B, h, w]`` bool for each level, True at padding, by the nearest pixel of the input; ``None`` if no image is
        padded.
    """
    if batch_data_samples is None:
        return None
    metas = [sample.metainfo for sample in batch_data_samples]
    height, width = metas[0]['batch_input_shape'][:2]
    extents = [tuple(meta['img_shape'][:2]) for meta in metas]
    if all(extent == (height, width) for extent in extents):
        return None
    mask = torch.ones(len(metas), height, width, device=device)
    for image, (h, w) in enumerate(extents):
        mask[image, :h, :w] = 0
    return [F.interpolate(mask[None], size=shape)[0].bool() for shape in shapes]
