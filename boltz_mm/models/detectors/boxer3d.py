"""BoxeR-3D: boxes in a point cloud from rotated box attention on its bird's-eye view.

Paper: "BoxeR: Box-Attention for 2D and 3D Transformers" (CVPR 2022, arXiv 2111.13087), section 3.4.  Official code:
kienduynguyen/BoxeR, ``e2edet/model/boxer3d.py``.

Point clouds become pillars and bird's-eye-view maps (:class:`~boltz_mm.models.backbones.pillar_net.PillarNet`), or the
maps come from elsewhere; the encoder attends along anchor angles, its best anchors become the decoder's queries.

Deviation: official whole models take points only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor

from boltz_mm.models.layers.box_transformer import Proposals
from boltz_mm.registry import MODELS


class TransformerOutput(NamedTuple):
    """What encoder and decoder give.

    Attributes:
        memory: ``[B, S, C]`` tokens after the encoder.
        ref_windows: ``[1, S, 8, 5]`` windows of the tokens.
        proposals: The queries and the rating of all anchors.
        hidden_states: ``[layers, B, Q, C]`` queries after each decoder layer.
    """

    memory: Tensor
    ref_windows: Tensor
    proposals: Proposals
    hidden_states: Tensor


@MODELS.register_module()
class BoxeR3D(BaseModel):
    """Point clouds or bird's-eye-view maps to boxes.

    Inputs are either a list of point clouds, one float tensor ``[N_i, in_channels]`` for each sample, or a list of
    bird's-eye-view maps of the whole batch, one float tensor ``[B, embed_dims, H_l, W_l]`` for each level; maps go
    straight to the transformer, past ``backbone`` and ``neck``.  Rows of a map lie along y, columns along x.

    Samples are any :class:`mmengine.structures.BaseDataElement`; objects are read from ``gt_instances_3d`` and
    detections written to ``pred_instances_3d``, both with ``bboxes_3d`` ``[n, 7]`` (centre x, y, z, length, width,
    height in metres, heading in radians) and ``labels_3d`` ``[n]``.

    Args:
        backbone: Config of the network from points to maps; ``None`` for a model that takes maps only.
        neck: Config of the projection of the backbone's maps to the transformer's channels, see
            :class:`boltz_mm.models.necks.BoxeRNeck` (published: 1 x 1 convolution with bias, group norm).
        encoder: Config of the encoder; the published one by default.
        decoder: Config of the decoder; the published one by default.
        bbox_head: Config of the head; the published one by default.
        num_queries: Anchors that become queries.
        train_cfg: Handed to the head.
        test_cfg: Handed to the head.
        data_preprocessor: Config of the data preprocessor; moving to the device alone by default.
        init_cfg: Config of the initialisation.

    Raises:
        ValueError: Backbone and head were given different point cloud ranges.
    """

    def __init__(
        self,
        backbone: dict | None = None,
        neck: dict | None = None,
        encoder: dict | None = None,
        decoder: dict | None = None,
        bbox_head: dict | None = None,
        num_queries: int = 300,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.num_queries = num_queries
        if backbone is not None:
            self.backbone = MODELS.build(backbone)
        if neck is not None:
            self.neck = MODELS.build(neck)
        self.encoder = MODELS.build({'type': 'boltz_mm.Box3dTransformerEncoder', **(encoder or {})})
        self.decoder = MODELS.build({'type': 'boltz_mm.Box3dTransformerDecoder', **(decoder or {})})
        head = {'type': 'boltz_mm.BoxeR3DHead', **(bbox_head or {})}
        head |= {k: v for k, v in dict(train_cfg=train_cfg, test_cfg=test_cfg).items() if v is not None}
        self.bbox_head = MODELS.build(head)
        self._check_ranges()

    def _check_ranges(self) -> None:
        points = getattr(getattr(self, 'backbone', None), 'point_cloud_range', None)
        boxes = self.bbox_head.bbox_coder.point_cloud_range
        if points is not None and tuple(points) != tuple(boxes):
            raise ValueError(f'point_cloud_range of the backbone is {points}, that of the bbox_coder is {boxes}')

    def extract_feat(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps for the transformer.

        Args:
            inputs: Point clouds or maps, see the class.

        Returns:
            One float tensor ``[B, C, H_l, W_l]`` for each level.

        Raises:
            TypeError: ``inputs`` is not a list of tensors.
            ValueError: The tensors are neither point clouds nor maps, or this model cannot take them.
        """
        if not isinstance(inputs, list | tuple) or not all(isinstance(x, Tensor) for x in inputs):
            raise TypeError(f'inputs must be a list of point clouds or of maps, got {type(inputs).__name__}')
        dims = {x.dim() for x in inputs}
        if dims == {2}:
            if not hasattr(self, 'backbone'):
                raise ValueError("this model has no backbone for point clouds; give it bird's-eye-view maps")
            feats = self.backbone(inputs)
            return tuple(self.neck(feats)) if hasattr(self, 'neck') else tuple(feats)
        if dims == {4}:
            shapes = [tuple(x.shape) for x in inputs]
            if {(b, c) for b, c, *_ in shapes} != {(shapes[0][0], self.encoder.embed_dims)}:
                raise ValueError(f'maps must be [B, {self.encoder.embed_dims}, H, W] with one B, got {shapes}')
            return tuple(inputs)
        raise ValueError(
            'inputs must be point clouds [N, D] or maps [B, C, H, W], not a mixture and not empty, '
            f'got shapes {[tuple(x.shape) for x in inputs]}'
        )

    def forward_transformer(self, feats: Sequence[Tensor]) -> TransformerOutput:
        """Run encoder and decoder.

        Args:
            feats: One float tensor ``[B, C, H_l, W_l]`` for each level.
        """
        shapes = [(int(x.shape[2]), int(x.shape[3])) for x in feats]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in feats], dim=1)
        windows = self.encoder.reference_windows(shapes, tokens.device)
        memory = self.encoder(tokens, self.encoder.position_embedding(shapes, tokens.device), shapes, windows)
        proposals = self.encoder.select_proposals(
            memory, windows, self.bbox_head.enc_cls_branch, self.bbox_head.enc_reg_branch, self.num_queries
        )
        decoded = self.decoder(proposals.target, proposals.query_pos, memory, shapes, proposals.ref_windows)
        return TransformerOutput(memory, windows, proposals, decoded.hidden_states)

    def forward(
        self, inputs: Sequence[Tensor], data_samples: Sequence[BaseDataElement] | None = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | list[BaseDataElement] | tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            inputs: Point clouds or maps, see the class.
            data_samples: One for each sample of the batch; required to compute losses.
            mode: 'loss', 'predict' or 'tensor'.

        Returns:
            Losses, samples with detections, or the raw predictions of :meth:`_forward`.

        Raises:
            ValueError: Unknown mode.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        if mode == 'tensor':
            return self._forward(inputs)
        raise ValueError(f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[BaseDataElement] | None) -> dict[str, Tensor]:
        """Losses of a batch; arguments as in :meth:`forward`.

        Returns:
            Weighted losses, see :meth:`~boltz_mm.models.heads.boxer3d_head.BoxeR3DHead.loss_by_feat`.

        Raises:
            ValueError: There is not one data sample for each sample of the batch.
        """
        feats = self.extract_feat(inputs)
        self._check_samples(data_samples or (), feats)
        out = self.forward_transformer(feats)
        return self.bbox_head.loss(out.hidden_states, out.proposals, out.memory, out.ref_windows, data_samples)

    def predict(
        self, inputs: Sequence[Tensor], data_samples: Sequence[BaseDataElement] | None = None
    ) -> list[BaseDataElement]:
        """Detections of a batch; arguments as in :meth:`forward`.

        Returns:
            The data samples (new ones if none were given) with ``pred_instances_3d``: ``bboxes_3d``, ``scores_3d`` and
            ``labels_3d`` by falling score.

        Raises:
            ValueError: Data samples were given, but not one for each sample of the batch.
        """
        feats = self.extract_feat(inputs)
        if data_samples is None:
            data_samples = [BaseDataElement() for _ in range(len(feats[0]))]
        self._check_samples(data_samples, feats)
        out = self.forward_transformer(feats)
        results: list[InstanceData] = self.bbox_head.predict(out.hidden_states, out.proposals.ref_windows)
        for sample, detections in zip(data_samples, results, strict=True):
            sample.pred_instances_3d = detections
        return list(data_samples)

    def _forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits ``[layers, B, Q, K]`` and box codes ``[layers, B, Q, 7]`` of all decoder layers."""
        out = self.forward_transformer(self.extract_feat(inputs))
        return self.bbox_head(out.hidden_states, out.proposals.ref_windows)

    @staticmethod
    def _check_samples(data_samples: Sequence[BaseDataElement], feats: Sequence[Tensor]) -> None:
        if len(data_samples) != len(feats[0]):
            raise ValueError(f'a batch of {len(feats[0])} needs as many data samples, got {len(data_samples)}')
