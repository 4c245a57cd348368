"""Pictures of what BoxeR's queries look at: reference windows and attended boxes.

A query carries a reference window; every head and level moves and scales it to the box that it samples.  For each of a
few queries the picture shows the encoder token that it came from and the query itself in the decoder, with the window
dashed and the attended boxes coloured by head, the stronger the more weight they carry.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from mmdet.structures import SampleList
from torch import Tensor, nn

from boltz_mm.models.detectors.boxer import BoxeR
from boltz_mm.ops import box_attention_weights

_LEAST_REGION = 40.0  # pixels; a smaller part of an image could not be recognised


@dataclasses.dataclass(frozen=True)
class Attended:
    """What the tokens or queries of one image look at in one layer.

    Attributes:
        windows: Reference windows [Q, 4] (cx, cy, w, h) in 0..1 of the unpadded image.
        boxes: Attended boxes [Q, H, L, 4] in the same form.
        weights: Share of the attention that each box gets [Q, H, L]; for each head they add up to 1 over the levels.
    """

    windows: Tensor
    boxes: Tensor
    weights: Tensor


@dataclasses.dataclass(frozen=True)
class BoxAttentionView:
    """Everything needed to draw the attention of one image.

    Attributes:
        encoder: One entry for each encoder layer, Q = tokens.
        decoder: One entry for each decoder layer, Q = queries.
        tokens: The token that each query came from, int64 [Q].
        token_levels: Level of every token, int64 [S].
        scores: Best class score of each query, [Q].
        labels: Its class, int64 [Q].
        bboxes: Predicted boxes [Q, 4] (cx, cy, w, h) in 0..1.
    """

    encoder: list[Attended]
    decoder: list[Attended]
    tokens: Tensor
    token_levels: Tensor
    scores: Tensor
    labels: Tensor
    bboxes: Tensor


@contextlib.contextmanager
def record_attention(modules: Sequence[nn.Module]) -> Iterator[list[list[Attended]]]:
    """Record what window attentions attend to, without changing what they compute.

    Args:
        modules: Instances of ``BoxAttention`` or ``InstanceAttention``.

    Yields:
        One list for each module; each of its first calls within the context adds one entry for each image.
    """
    records: list[list[Attended]] = [[] for _ in modules]

    def wrap(module: Any, record: list[Attended]) -> None:
        attend = module.attend

        def recording(
            query: Tensor, projected: Tensor, spatial_shapes: Any, ref_windows: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if not record:  # a second call computes mask features of some of the queries
                boxes = module.predict_boxes(query, ref_windows)  # [B, Q, H, L, 4]
                weights = box_attention_weights(module.predict_logits(query)).sum(-1)  # [B, Q, H, L]
                windows = ref_windows.expand(len(query), *ref_windows.shape[1:])
                record.extend(
                    Attended(*(t.detach().float().cpu() for t in image))
                    for image in zip(windows, boxes, weights, strict=True)
                )
            return attend(query, projected, spatial_shapes, ref_windows, *args, **kwargs)

        module.attend = recording

    for module, record in zip(modules, records, strict=True):
        wrap(module, record)
    try:
        yield records
    finally:
        for module in modules:
            del module.attend  # the method of the class shows again


@torch.no_grad()
def view_attention(model: BoxeR, batch_inputs: Tensor, batch_data_samples: SampleList) -> list[BoxAttentionView]:
    """Run a model and record its attention.

    Args:
        model: A BoxeR in evaluation mode.
        batch_inputs: Images [B, 3, H, W] from the data preprocessor.
        batch_data_samples: Their meta information.

    Returns:
        One view for each image.

    Raises:
        TypeError: If the model is not a BoxeR.
    """
    if not isinstance(model, BoxeR):
        raise TypeError(f'the attended boxes of a BoxeR can be drawn, got a {type(model).__name__}')
    encoder = [layer.self_attn for layer in model.encoder.layers]
    decoder = [layer.multihead_attn for layer in model.decoder.layers]
    features = model.extract_feat(batch_inputs)
    with record_attention(encoder) as looked, record_attention(decoder) as asked:
        inputs = model.forward_transformer(features, batch_data_samples)
    cls_scores, bbox_preds = model.bbox_head(inputs['hidden_states'][-1:], inputs['references'])
    scores, labels = cls_scores[0].sigmoid().max(-1)
    sizes = [feature.shape[-2] * feature.shape[-1] for feature in features]
    levels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return [
        BoxAttentionView(
            encoder=[layer[image] for layer in looked],
            decoder=[layer[image] for layer in asked],
            tokens=inputs['topk_indexes'][image].cpu(),
            token_levels=levels,
            scores=scores[image].float().cpu(),
            labels=labels[image].cpu(),
            bboxes=bbox_preds[0, image].float().cpu(),
        )
        for image in range(len(batch_inputs))
    ]


def best_queries(view: BoxAttentionView, count: int, least_distance: float = 0.05) -> list[int]:
    """The best scored queries whose predicted centres are apart, so that not all show the same object.

    Args:
        view: See :func:`view_attention`.
        count: How many.
        least_distance: Least distance of two centres, as a share of the image's sides.

    Returns:
        Query indexes, best first; fewer than ``count`` if there are not so many.
    """
    chosen: list[int] = []
    for query in view.scores.argsort(descending=True, stable=True).tolist():
        offsets = (view.bboxes[chosen, :2] - view.bboxes[query, :2]).abs().amax(-1)
        if not (offsets < least_distance).any():
            chosen.append(query)
        if len(chosen) == count:
            break
    return chosen


def draw_box_attention(
    image: np.ndarray,
    view: BoxAttentionView,
    queries: Sequence[int],
    *,
    encoder_layer: int = -1,
    decoder_layer: int = -1,
    classes: Sequence[str] | None = None,
) -> Figure:
    """Draw one row for each query: where it is, the token that it came from, and the query in the decoder.

    Args:
        image: RGB, uint8 [H, W, 3], without padding.
        view: See :func:`view_attention`.
        queries: Which queries, see :func:`best_queries`.
        encoder_layer: Which encoder layer.
        decoder_layer: Which decoder layer.
        classes: Names of the classes.

    Returns:
        The figure, to be saved with its ``savefig``.

    Raises:
        ValueError: If there is nothing to draw or a layer does not exist.
    """
    if not queries:
        raise ValueError('no query to draw')
    encoder = _layer(view.encoder, encoder_layer, 'encoder')
    decoder = _layer(view.decoder, decoder_layer, 'decoder')
    height, width = image.shape[:2]
    side = 4.2
    figure = Figure(figsize=(3 * side, (side + 0.35) * len(queries) + 0.5))
    figure.set_layout_engine('constrained')
    panels = figure.subplots(len(queries), 3, squeeze=False)
    heads = decoder.boxes.shape[1]
    for (whole, left, right), query in zip(panels, queries, strict=True):
        label = int(view.labels[query])
        name = classes[label] if classes is not None and label < len(classes) else f'class {label}'
        token = int(view.tokens[query])
        region = _region([(encoder, token), (decoder, query)], width, height)
        _draw_whole(whole, image, region)
        _draw_attended(left, image, encoder, token, region)
        left.set_title(f'encoder: token of level {int(view.token_levels[token])}', fontsize=9)
        _draw_attended(right, image, decoder, query, region)
        _add_box(right, view.bboxes[query], width, height, edgecolor='white', linewidth=2.2)
        _add_box(right, view.bboxes[query], width, height, edgecolor='black', linewidth=0.8)
        right.set_title(f'decoder: query {query}, {name} {float(view.scores[query]):.2f}', fontsize=9)
    handles = [
        Line2D([], [], color='black', linestyle=(0, (3, 2)), label='reference window'),
        Line2D([], [], color='black', linewidth=2, label='predicted box'),
        *(Line2D([], [], color=_head_color(h, heads), label=f'head {h + 1}') for h in range(heads)),
    ]
    figure.legend(handles=handles, loc='outside lower center', ncols=min(len(handles), 6), frameon=False, fontsize=8)
    return figure


def _layer(layers: list[Attended], index: int, name: str) -> Attended:
    if not -len(layers) <= index < len(layers):
        raise ValueError(f'the {name} has {len(layers)} layers, there is no layer {index}')
    return layers[index]


def _head_color(head: int, heads: int) -> Any:
    return colormaps['turbo'](0.08 + 0.84 * head / max(1, heads - 1))


def _add_box(axes: Axes, box: Tensor, width: int, height: int, **style: Any) -> None:
    """Add an outline of a box (cx, cy, w, h) in 0..1."""
    cx, cy, w, h = box.tolist()
    axes.add_patch(
        Rectangle(((cx - w / 2) * width - 0.5, (cy - h / 2) * height - 0.5), w * width, h * height, fill=False, **style)
    )


def _region(looked: Sequence[tuple[Attended, int]], width: int, height: int) -> tuple[float, float, float]:
    """A square around the windows and boxes, half as large again: left, top and side in pixels."""
    boxes = torch.cat(
        [box.reshape(-1, 4) for attended, index in looked for box in (attended.windows[index], attended.boxes[index])]
    )
    scale = torch.tensor([width, height])
    half = boxes[:, 2:].clamp(min=0) / 2
    low = ((boxes[:, :2] - half).amin(0).clamp(0, 1) * scale).tolist()
    high = ((boxes[:, :2] + half).amax(0).clamp(0, 1) * scale).tolist()
    side = max(_LEAST_REGION, 1.5 * max(high[0] - low[0], high[1] - low[1]))
    side = min(side, float(max(width, height)))
    left, top = (
        min(max((a + b - side) / 2, 0.0), max(0.0, extent - side))
        for a, b, extent in zip(low, high, (width, height), strict=True)
    )
    return left, top, side


def _show(axes: Axes, image: np.ndarray, left: float, top: float, width: float, height: float) -> None:
    """Show part of the image, a little paler than it is."""
    axes.imshow((image * 0.75 + 64).clip(0, 255).astype(np.uint8), interpolation='nearest')
    axes.set(xticks=[], yticks=[], xlim=(left - 0.5, left + width - 0.5), ylim=(top + height - 0.5, top - 0.5))


def _draw_whole(axes: Axes, image: np.ndarray, region: tuple[float, float, float]) -> None:
    """Show the whole image and where the other panels lie in it."""
    height, width = image.shape[:2]
    _show(axes, image, 0, 0, width, height)
    left, top, side = region
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor='black', linewidth=1.2))
    axes.set_title('image', fontsize=9)


def _draw_attended(
    axes: Axes, image: np.ndarray, attended: Attended, index: int, region: tuple[float, float, float]
) -> None:
    """Draw image, reference window and attended boxes of one token or query."""
    height, width = image.shape[:2]
    left, top, side = region
    _show(axes, image, left, top, side, side)
    boxes, weights = attended.boxes[index], attended.weights[index]  # [H, L, 4], [H, L]
    heads, levels = weights.shape
    for head, level in sorted(np.ndindex(heads, levels), key=lambda at: float(weights[at])):
        share = float(weights[head, level])
        sizes = boxes[head, level, 2:].clamp(min=0)
        style = {'alpha': min(1.0, 0.15 + 0.85 * share), 'linewidth': 0.5 + 2.0 * share}
        box = torch.cat([boxes[head, level, :2], sizes])
        _add_box(axes, box, width, height, edgecolor=_head_color(head, heads), **style)
    window = attended.windows[index]
    for single in window.reshape(-1, 4):
        _add_box(axes, single, width, height, edgecolor='white', linewidth=1.8)
        _add_box(axes, single, width, height, edgecolor='black', linewidth=1.4, linestyle=(0, (3, 2)))
