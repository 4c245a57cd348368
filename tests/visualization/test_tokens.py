"""What is drawn is what the backbone keeps; the measure counts tokens on objects."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import BaseDataElement, PixelData
from pycocotools import mask as coco_mask
from torch import nn

from boltz_mm.models.backbones.aff import AFF
from boltz_mm.visualization import tokens

ARCH = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), cluster_size=4, nbhd_size=12)


class Model(nn.Module):
    """A backbone that knows how to read an image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = AFF(ARCH)

    def data_preprocessor(self, batch: dict, training: bool) -> dict:
        return {'inputs': torch.stack(batch['inputs']).float() / 50 - 2, 'data_samples': batch['data_samples']}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model().eval()
    for stage in model.backbone.layers[:3]:
        nn.init.normal_(stage.prob_net.weight)
    return model


def test_view_follows_the_tokens(model: Model) -> None:
    images = torch.randn(2, 3, 64, 96)
    views = tokens.view_tokens(model, images)
    outputs, canvas = model.backbone.forward_stages(images)
    assert len(views) == 2
    for image, view in enumerate(views):
        assert view.canvas == canvas == (16, 24)
        assert [len(stage.pos) for stage in view.stages] == [384, 96, 24, 6]
        for stage, following in zip(view.stages[:-1], view.stages[1:], strict=True):
            going = {tuple(pos) for pos in stage.pos[stage.kept].tolist()}
            assert going == {tuple(pos) for pos in following.pos.tolist()}
            assert stage.importance.shape == (len(stage.pos),)
            assert stage.clusters.bincount().tolist() == [4] * (len(stage.pos) // 4)
        torch.testing.assert_close(view.stages[1].importance, outputs[1].importance[image])
        last = view.stages[-1]
        assert (last.importance, last.kept, last.clusters) == (None, None, None)
    assert not torch.equal(views[0].stages[1].pos, views[1].stages[1].pos), 'each image has its own'


def test_models_without_tokens_are_refused() -> None:
    with pytest.raises(TypeError, match='Linear'):
        tokens.view_tokens(nn.Linear(2, 2), torch.zeros(1, 3, 8, 8))


def test_picture_shows_tokens_scores_and_clusters(model: Model, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (62, 93, 3), dtype=np.uint8)  # the grid reaches over the border
    view = tokens.view_tokens(model, torch.randn(1, 3, 62, 93))[0]
    figure = tokens.draw_tokens(image, view, prediction=image, title='a cat')
    panels = figure.axes
    assert len(panels) == 15
    titles = [panel.get_title() for panel in panels]
    assert titles[1] == 'a cat'
    assert titles[3:6] == ['stage 1: 384 tokens', 'importance; 96 tokens go on', '96 clusters']
    assert panels[6].get_xlim() == (-0.5, 92.5)
    offsets = panels[6].collections[0].get_offsets()
    np.testing.assert_allclose(offsets, view.stages[1].pos.numpy() * 4 + 1.5)
    scores = panels[4].images[-1].get_array()
    y, x = int(view.stages[0].pos[7, 1]), int(view.stages[0].pos[7, 0])
    assert scores[y, x] == pytest.approx(float(view.stages[0].importance[7]))
    assert 'every token' in panels[14].texts[0].get_text()
    figure.savefig(tmp_path / 'picture.png', dpi=40)


def test_nearest_token() -> None:
    owner = tokens.nearest_token(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), (2, 4))
    assert owner.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_predictions_are_drawn() -> None:
    image = np.full((6, 8, 3), 100, np.uint8)
    classes = BaseDataElement(pred_score=torch.tensor([0.1, 0.7, 0.2]))
    picture, title = tokens.draw_prediction(classes, image, {'classes': ('a', 'b', 'c')})
    assert (picture == image).all()
    assert title == 'b 0.70, c 0.20'
    labels = torch.zeros(1, 6, 8, dtype=torch.int64)
    labels[:, 3:] = 1
    semantic = BaseDataElement(pred_sem_seg=PixelData(data=labels))
    meta = {'classes': ('sky', 'sea'), 'palette': [(255, 0, 0), (0, 0, 255)]}
    picture, title = tokens.draw_prediction(semantic, image, meta)
    assert title == 'prediction: sky, sea'
    assert picture[0, 0].tolist() == [185, 45, 45]
    assert picture[5, 7].tolist() == [45, 45, 185]


@pytest.mark.parametrize(('segments', 'title'), [([2], 'prediction: nothing'), ([2, 1001], 'prediction')])
def test_panoptic_predictions_are_drawn(segments: list[int], title: str) -> None:
    image = np.full((400, 600, 3), 100, np.uint8)
    ids = torch.tensor(segments).repeat_interleave(600 // len(segments)).expand(1, 400, 600)  # 2 is void
    sample = DetDataSample(pred_panoptic_seg=PixelData(sem_seg=ids.contiguous()))
    meta = {'classes': ('sky', 'sea'), 'palette': [(255, 0, 0), (0, 0, 255)]}
    picture, given = tokens.draw_prediction(sample, image, meta)
    assert given == title
    assert (picture == image).all() == (len(segments) == 1)


def test_share_inside_scales_to_the_file() -> None:
    objects = np.zeros((20, 40), bool)
    objects[:10, :20] = True  # the upper left quarter; the network saw the image at twice the size
    pos = torch.tensor([[0.0, 0.0], [9.0, 4.0], [10.0, 4.0], [9.0, 5.0], [30.0, 0.0]])
    assert tokens.share_inside(pos, objects, (40, 80)) == pytest.approx(2 / 4), 'the last lies on padding'


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, Config]:
    """Three images of 32 x 48: objects cover a quarter, half, nothing."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, columns in enumerate((12, 24, 0), 1):
        cv2.imwrite(str(tmp_path / f'{number}.png'), rng.integers(0, 255, (32, 48, 3), dtype=np.uint8))
        images.append(dict(id=number, file_name=f'{number}.png', height=32, width=48))
        if columns:
            mask = np.zeros((32, 48), np.uint8, order='F')
            mask[:, :columns] = 1
            encoded = coco_mask.encode(mask)
            encoded['counts'] = encoded['counts'].decode()
            annotations.append(
                dict(id=number, image_id=number, category_id=1, segmentation=encoded, bbox=[0, 0, columns, 32],
                     area=columns * 32, iscrowd=0)
            )  # fmt: skip
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='a')])
    (tmp_path / 'a.json').write_text(json.dumps(content))
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='mmdet.Resize', scale=(96, 64), keep_ratio=True),
        dict(type='mmdet.LoadAnnotations', with_mask=True),
        dict(type='mmdet.PackDetInputs'),
    ]
    return tmp_path, Config(dict(test_dataloader=dict(dataset=dict(type='any', pipeline=pipeline))))


def test_measure(model: Model, dataset: tuple[Path, Config]) -> None:
    folder, cfg = dataset
    focus = tokens.measure_focus(model, cfg, folder / 'a.json', folder)
    data, shown = tokens.load_image(model, cfg, folder / '1.png')
    assert shown.shape == (64, 96, 3)
    pos = tokens.view_tokens(model, data['inputs'])[0].stages[2].pos
    assert focus.images == 1
    assert focus.area == pytest.approx(0.25)
    assert focus.tokens == pytest.approx(float((pos[:, 0] < 6).float().mean()))
    assert focus.ratio == pytest.approx(focus.tokens * 4)
    assert tokens.measure_focus(model, cfg, folder / 'a.json', folder, most_covered=0.5).images == 2
    for options, named in ((dict(most_covered=0.1), 'at most 10%'), (dict(stage=4), 'stage 4')):
        with pytest.raises(ValueError, match=named):
            tokens.measure_focus(model, cfg, folder / 'a.json', folder, **options)
    cfg.test_dataloader.dataset.pipeline[1] = dict(type='mmdet.Resize', scale=(64, 64), keep_ratio=False)
    with pytest.raises(ValueError, match='squeezes'):
        tokens.measure_focus(model, cfg, folder / 'a.json', folder)
