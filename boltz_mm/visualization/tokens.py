"""Pictures of what AutoFocusFormer keeps: tokens, importance scores and clusters of every stage.

Positions of tokens are cells of the stride-4 grid: cell (x, y) covers the pixels 4x to 4x + 3 and 4y to 4y + 3 of the
image that the network sees.  Scores and clusters belong to tokens; in the pictures every cell has the colour of its
nearest token.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mmdet.evaluation.functional import INSTANCE_OFFSET
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from torch import Tensor, nn

from boltz_mm import ops
from boltz_mm.models.backbones.aff import AFF
from boltz_mm.visualization.panels import draw_panel, make_visualizer

CELL = 4
"""Pixels of a cell of the grid."""

_MOST_CELLS = 2.5  # of a token's square: the token is one cell, however far the others are
_STAGE_COLORS = ('#7f7f7f', '#3b4cc0', '#f39c12', '#b40426')


@dataclasses.dataclass(frozen=True)
class StageTokens:
    """Tokens of one image in one stage.

    Attributes:
        pos: Cells of the tokens that the stage works on, float32 [N, 2] (x, y).
        importance: Their scores in 0..1, [N]; None if the stage hands all tokens on.
        kept: Bool [N], which of them go on to the next stage; None if the stage hands all on.
        clusters: Number of each token's cluster, int64 [N]; None where every token sees all others.
    """

    pos: Tensor
    importance: Tensor | None
    kept: Tensor | None
    clusters: Tensor | None


@dataclasses.dataclass(frozen=True)
class TokenView:
    """All stages of one image.

    Attributes:
        stages: One entry for each stage.
        canvas: Rows and columns of the stride-4 grid.
    """

    stages: list[StageTokens]
    canvas: tuple[int, int]


def find_backbone(model: nn.Module) -> AFF:
    """The AutoFocusFormer of a model.

    Args:
        model: The backbone itself, a classifier, detector or segmentor.

    Returns:
        The backbone.

    Raises:
        TypeError: If the model has none.
    """
    for module in model.modules():
        if isinstance(module, AFF):
            return module
    raise TypeError(f'the tokens of a model with the backbone AFF can be drawn, got a {type(model).__name__} without')


@torch.no_grad()
def view_tokens(model: nn.Module, batch_inputs: Tensor) -> list[TokenView]:
    """Run the backbone and keep which tokens it works on.

    Args:
        model: See :func:`find_backbone`, in evaluation mode.
        batch_inputs: Images [B, 3, H, W] from the data preprocessor.

    Returns:
        One view for each image.
    """
    outputs, canvas = find_backbone(model).forward_stages(batch_inputs)
    views = []
    for image in range(len(batch_inputs)):
        stages = []
        for output in outputs:
            count = output.feat.shape[1]
            pos = output.neighborhood.pos.expand(len(batch_inputs), -1, -1)[image].float().cpu()
            kept = None
            if output.kept is not None:
                kept = torch.zeros(count, dtype=torch.bool)
                kept[output.kept[image].cpu()] = True
            clusters = None
            if output.neighborhood.nearest is not None:
                clusters = torch.arange(count) // output.neighborhood.cluster_size
            importance = None if output.importance is None else output.importance[image].float().cpu()
            stages.append(StageTokens(pos, importance, kept, clusters))
        views.append(TokenView(stages, canvas))
    return views


def load_image(model: nn.Module, cfg: Config, image: str | Path) -> tuple[dict[str, Any], np.ndarray]:
    """Bring an image to a model as its test pipeline does.

    Args:
        model: Detector, segmentor or classifier.
        cfg: Its config, with ``test_dataloader``.
        image: Image file.

    Returns:
        What the data preprocessor gives, for a batch of one, and the RGB picture, uint8 [h, w, 3], that the network
        sees, without padding.
    """
    from mmdet.utils import get_test_pipeline_cfg

    steps = [step for step in get_test_pipeline_cfg(cfg) if 'Annotations' not in str(step['type'])]
    packed = Compose(steps)({'img_path': str(image), 'img_id': 0})
    shown = packed['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
    data = model.data_preprocessor(pseudo_collate([packed]), False)  # type: ignore[operator]
    height, width = data['inputs'].shape[-2:]  # a preprocessor may resize, and pads at the lower right
    return data, np.ascontiguousarray(shown[:height, :width]).astype(np.uint8)


def draw_tokens(
    image: np.ndarray, view: TokenView, *, prediction: np.ndarray | None = None, title: str | None = None
) -> Figure:
    """Draw the tokens, scores and clusters of every stage over an image.

    Args:
        image: What the network sees, RGB, uint8 [h, w, 3], see :func:`load_image`.
        view: See :func:`view_tokens`.
        prediction: Picture of the prediction, RGB, uint8, of any size.
        title: What stands above the prediction.

    Returns:
        The figure, to be saved with its ``savefig``.
    """
    height, width = image.shape[:2]
    side = 3.4
    rows = len(view.stages) + 1
    figure = Figure(figsize=(3 * side + 0.6, (side * min(2.0, height / width) + 0.25) * rows))
    figure.set_layout_engine('constrained')
    panels = figure.subplots(rows, 3, squeeze=False)
    first = panels[0]
    _show(first[0], image, 'what the network sees')
    if prediction is None:
        first[1].axis('off')
    else:
        first[1].imshow(prediction)
        first[1].set(xticks=[], yticks=[])
        first[1].set_title('prediction' if title is None else title, fontsize=9)
    _draw_reach(first[2], image, view)
    for number, (row, stage) in enumerate(zip(panels[1:], view.stages, strict=True), 1):
        _draw_stage(figure, row, image, stage, number, view.canvas)
    return figure


def _draw_stage(
    figure: Figure, row: Sequence[Axes], image: np.ndarray, stage: StageTokens, number: int, canvas: tuple[int, int]
) -> None:
    """Tokens, scores and clusters of one stage."""
    tokens, scores, clusters = row
    count = len(stage.pos)
    _show(tokens, _pale(image), f'stage {number}: {count} tokens')
    _dots(tokens, stage.pos, image.shape, canvas, color='#b40426', share=0.45 if number == 1 else 0.75)
    nearest = nearest_token(stage.pos, canvas)
    if stage.importance is None or stage.kept is None:
        scores.axis('off')
        scores.text(0.5, 0.5, 'last stage: all tokens stay', ha='center', va='center', transform=scores.transAxes)
    else:
        low, high = float(stage.importance.min()), float(stage.importance.max())
        _show(scores, _pale(image), f'importance; {int(stage.kept.sum())} tokens go on')
        drawn = scores.imshow(
            stage.importance[nearest].numpy(), cmap='viridis', alpha=0.75, vmin=low, vmax=max(high, low + 1e-6),
            extent=_extent(canvas), interpolation='nearest',
        )  # fmt: skip
        _limit(scores, image.shape)
        figure.colorbar(drawn, cax=scores.inset_axes((1.02, 0, 0.035, 1))).ax.tick_params(labelsize=6)
    if stage.clusters is None:
        clusters.axis('off')
        clusters.text(0.5, 0.5, 'every token sees all others', ha='center', va='center', transform=clusters.transAxes)
        return
    total = int(stage.clusters.max()) + 1
    _show(clusters, _pale(image), f'{total} clusters')
    colors = cluster_colors(total)[stage.clusters[nearest].numpy()]
    clusters.imshow(colors, alpha=0.6, extent=_extent(canvas), interpolation='nearest')
    _limit(clusters, image.shape)


def _draw_reach(axes: Axes, image: np.ndarray, view: TokenView) -> None:
    """How far each token gets: those of later stages lie over those of earlier ones."""
    _show(axes, _pale(image), 'last stage that a token reaches')
    for number, stage in enumerate(view.stages[1:], 2):
        color = _STAGE_COLORS[min(number, len(_STAGE_COLORS)) - 1]
        _dots(axes, stage.pos, image.shape, view.canvas, color=color, share=0.3 + 0.1 * number)
    handles = [
        Line2D([], [], color=color, marker='s', linestyle='', markersize=4, label=f'stage {number}')
        for number, color in enumerate(_STAGE_COLORS[1 : len(view.stages)], 2)
    ]
    axes.legend(handles=handles, loc='upper right', fontsize=6, framealpha=0.8, handletextpad=0.1, borderpad=0.2)


def nearest_token(pos: Tensor, canvas: tuple[int, int]) -> Tensor:
    """The token nearest to each cell.

    Args:
        pos: Float32 [N, 2].
        canvas: Rows and columns.

    Returns:
        Int64 [rows, columns].
    """
    y, x = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in canvas), indexing='ij')
    cells = torch.stack([x, y], -1).view(1, -1, 2)
    index, _ = ops.knn_points(cells, pos[None], 1, return_distance=True, canvas=canvas)
    return index.view(canvas)


def cluster_colors(count: int) -> np.ndarray:
    """Colours [count, 3] in 0..1; those of clusters that follow each other differ."""
    hue = np.arange(count) * 0.618034 % 1
    value = np.where(np.arange(count) % 2 == 0, 1.0, 0.7)
    rgb = colormaps['hsv'](hue)[:, :3]
    return rgb * value[:, None]


def _pale(image: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].repeat(3, -1)
    return (grey * 0.6 + 100).clip(0, 255).astype(np.uint8)


def _show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image, interpolation='nearest')
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    _limit(axes, image.shape)


def _limit(axes: Axes, shape: tuple[int, ...]) -> None:
    """Show the image alone: the grid may reach over its border."""
    axes.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5))


def _extent(canvas: tuple[int, int]) -> tuple[float, float, float, float]:
    rows, columns = canvas
    return -0.5, CELL * columns - 0.5, CELL * rows - 0.5, -0.5


def _dots(
    axes: Axes, pos: Tensor, shape: tuple[int, ...], canvas: tuple[int, int], *, share: float, **style: Any
) -> None:
    """A square for each token, so large that few touch: a share of the usual distance between tokens."""
    usual = 1.0
    if len(pos) > 1:
        _, distance = ops.knn_points(pos[None], pos[None], 2, return_distance=True, canvas=canvas)
        usual = min(float(distance[0, :, 1].median()), _MOST_CELLS)
    points_per_pixel = 3.2 * 72 / shape[1]
    size = max(1.0, CELL * usual * share * points_per_pixel)
    centre = ((pos + 0.5) * CELL - 0.5).numpy()
    axes.scatter(centre[:, 0], centre[:, 1], s=size**2, marker='s', linewidths=0, **style)
    _limit(axes, shape)


def draw_prediction(
    sample: Any, image: np.ndarray, meta: dict[str, Any], score_thr: float = 0.3
) -> tuple[np.ndarray, str]:
    """Draw what a model predicts over an image.

    Args:
        sample: Result of a detector, segmentor or classifier (mmdet, mmseg or mmpretrain) for the image.
        image: The image file's pixels, RGB, uint8 [H, W, 3].
        meta: ``classes`` and ``palette``, as far as they are known.
        score_thr: Least score of a drawn instance.

    Returns:
        RGB picture, uint8, and its title.
    """
    classes = meta.get('classes')
    if 'pred_score' in sample:
        scores, labels = sample.pred_score.cpu().topk(min(2, len(sample.pred_score)))
        names = [
            f'{classes[label] if classes else f"class {label}"} {score:.2f}'
            for score, label in zip(scores.tolist(), labels.tolist(), strict=True)
        ]
        return image, ', '.join(names)
    if 'pred_sem_seg' in sample:
        labels = sample.pred_sem_seg.cpu().data.squeeze().numpy().astype(np.int64)
        palette = meta.get('palette')
        count = int(labels.max()) + 1
        known = np.asarray(palette) / 255 if palette is not None and len(palette) >= count else cluster_colors(count)
        blended = image * 0.45 + known[labels] * 255 * 0.55
        present = [str(classes[k]) if classes else str(k) for k in np.unique(labels)[:5]]
        return blended.clip(0, 255).astype(np.uint8), 'prediction: ' + ', '.join(present)
    panoptic = sample.get('pred_panoptic_seg')
    if panoptic is not None and bool((panoptic.sem_seg % INSTANCE_OFFSET >= len(classes or ())).all()):
        return image, 'prediction: nothing'  # mmdet's visualizer stops at a map without segments
    panel = draw_panel(make_visualizer(meta), image, sample.cpu(), draw_gt=False, score_thr=score_thr)
    return panel, 'prediction'


@dataclasses.dataclass(frozen=True)
class Focus:
    """Whether tokens lie on objects.

    Attributes:
        images: How many images were measured.
        tokens: Share of the surviving tokens that lie inside objects, mean over the images.
        area: Share of the image that objects cover, mean over the images.
    """

    images: int
    tokens: float
    area: float

    @property
    def ratio(self) -> float:
        """How many times more tokens lie inside objects than if they were spread evenly."""
        return self.tokens / self.area


def share_inside(pos: Tensor, objects: np.ndarray, size: tuple[int, int]) -> float:
    """Share of the tokens that lie inside objects.

    Args:
        pos: Cells, float32 [N, 2].
        objects: Bool [H, W], the union of all objects in the pixels of the image file.
        size: Height and width of the image that the network sees, without padding.

    Returns:
        The share, of the tokens that lie on the image and not on its padding.
    """
    scale = torch.tensor([objects.shape[1] / size[1], objects.shape[0] / size[0]])
    at = ((pos + 0.5) * CELL * scale).floor().long().numpy()  # the pixel that holds the middle of the cell
    on_image = (at[:, 0] < objects.shape[1]) & (at[:, 1] < objects.shape[0])
    return float(objects[at[on_image, 1], at[on_image, 0]].mean())


def measure_focus(
    model: nn.Module,
    cfg: Config,
    ann_file: str | Path,
    image_folder: str | Path,
    *,
    stage: int = 2,
    most_covered: float = 0.3,
    num_images: int | None = None,
) -> Focus:
    """Measure, over a dataset, whether the tokens that survive a stage lie on objects.

    Args:
        model: Trained model with an AutoFocusFormer, in evaluation mode.
        cfg: Its config; the test pipeline may resize images but not crop them.
        ann_file: COCO annotations with masks.
        image_folder: Where the images are.
        stage: The tokens that this stage hands on, counted from 1.
        most_covered: Images whose objects cover more than this share are left out, and those without objects.
        num_images: Most images.

    Returns:
        The measure.

    Raises:
        ValueError: If a stage hands nothing on, the pipeline crops, or no image is left.
    """
    tokens, areas = [], []
    for path, objects in _images_with_objects(ann_file, image_folder):
        area = float(objects.mean())
        if not 0 < area <= most_covered:
            continue
        data, shown = load_image(model, cfg, path)
        size = shown.shape[:2]
        if abs(size[0] * objects.shape[1] - size[1] * objects.shape[0]) > max(size) * max(objects.shape) * 0.02:
            raise ValueError(f'the test pipeline crops or squeezes {path} from {objects.shape} to {size}')
        stages = view_tokens(model, data['inputs'])[0].stages
        if not 1 <= stage < len(stages):
            raise ValueError(f'the stages 1 to {len(stages) - 1} hand tokens on, not stage {stage}')
        tokens.append(share_inside(stages[stage].pos, objects, size))
        areas.append(area)
        if num_images is not None and len(areas) >= num_images:
            break
    if not areas:
        raise ValueError(f'no image of {ann_file} has objects that cover at most {most_covered:.0%} of it')
    return Focus(len(areas), float(np.mean(tokens)), float(np.mean(areas)))


def _images_with_objects(ann_file: str | Path, image_folder: str | Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Each image file of a COCO dataset, and the union of its objects, bool [H, W]."""
    from mmdet.datasets.api_wrappers import COCO

    coco = COCO(str(ann_file))
    for image in coco.load_imgs(coco.get_img_ids()):
        objects = np.zeros((image['height'], image['width']), bool)
        for annotation in coco.load_anns(coco.get_ann_ids(img_ids=[image['id']])):
            objects |= coco.annToMask(annotation).astype(bool)
        yield Path(image_folder) / image['file_name'], objects
