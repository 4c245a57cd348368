"""Panels show truth beside detections, enlarged."""

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData

from boltz_mm.visualization.panels import draw_panel, drawing_scale, enlarge, make_sheet, make_visualizer

META = {'classes': ('circle', 'square'), 'palette': [(255, 0, 0), (0, 0, 255)]}


def _sample(scores: tuple[float, ...] = (0.9, 0.1)) -> DetDataSample:
    boxes = torch.tensor([[4.0, 4, 16, 12], [20, 10, 28, 22]])
    masks = np.zeros((2, 24, 32), np.uint8)
    masks[0, 4:12, 4:16] = masks[1, 10:22, 20:28] = 1
    sample = DetDataSample(metainfo={'img_shape': (24, 32)})
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(boxes), labels=torch.tensor([0, 1]), masks=BitmapMasks(masks, 24, 32)
    )
    sample.pred_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([0, 1]), scores=torch.tensor(scores), masks=torch.from_numpy(masks).bool()
    )
    return sample


def test_drawing_scale_is_whole_and_at_least_one() -> None:
    assert drawing_scale(np.zeros((128, 200, 3))) == 3
    assert drawing_scale(np.zeros((900, 1300, 3))) == 1


@pytest.mark.parametrize('scale', [1, 3])
def test_enlarge_moves_boxes_and_masks(scale: int) -> None:
    image = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    sample = _sample()
    sample.gt_sem_seg = PixelData(sem_seg=torch.arange(24 * 32).reshape(1, 24, 32))
    large, result = enlarge(image, sample, scale)
    assert large.shape == (24 * scale, 32 * scale, 3)
    np.testing.assert_array_equal(large[::scale, ::scale], image)
    for instances in (result.gt_instances, result.pred_instances):
        torch.testing.assert_close(instances.bboxes, sample.pred_instances.bboxes * scale)
        assert instances.masks.shape == (2, 24 * scale, 32 * scale)
        assert torch.equal(instances.masks[:, ::scale, ::scale], sample.pred_instances.masks)
        assert instances.masks.sum() == sample.pred_instances.masks.sum() * scale**2
    assert torch.equal(result.gt_sem_seg.sem_seg[:, ::scale, ::scale], sample.gt_sem_seg.sem_seg)
    assert isinstance(sample.gt_instances.bboxes, HorizontalBoxes), 'the given sample is left as it is'


def test_panel_has_truth_left_and_confident_detections_right() -> None:
    image = np.full((24, 32, 3), 128, np.uint8)
    picture = draw_panel(make_visualizer(META), image, _sample(), least_side=240)
    assert picture.shape == (240, 640, 3)
    left, right = picture[:, :320], picture[:, 320:]
    changed = [np.abs(half.astype(int) - 128).sum(-1) > 30 for half in (left, right)]
    first, second = (slice(60, 100), slice(80, 140)), (slice(140, 200), slice(220, 260))
    assert changed[0][first].mean() > 0.5
    assert changed[0][second].mean() > 0.5
    assert changed[1][first].mean() > 0.5
    assert not changed[1][second].any(), 'score 0.1 is below the threshold'


def test_boxes_that_leave_the_image_do_not_shrink_it() -> None:
    sample = _sample()
    sample.pred_instances.bboxes[0] = torch.tensor([-20.0, -5, 60, 12])
    picture = draw_panel(make_visualizer(META), np.full((24, 32, 3), 128, np.uint8), sample, least_side=240)
    assert (picture[180:, 400:] == 128).all(), 'the rest of the image is where it was, without white margins'


def test_panel_without_detections() -> None:
    image = np.full((24, 32, 3), 128, np.uint8)
    picture = draw_panel(make_visualizer(META), image, _sample(scores=(0.1, 0.1)), draw_gt=False, least_side=48)
    np.testing.assert_array_equal(picture, np.full((48, 64, 3), 128, np.uint8))


def test_sheet_lays_out_rows() -> None:
    pictures = [np.full((4, 6, 3), k, np.uint8) for k in range(3)]
    sheet = make_sheet(pictures, columns=2, gap=1)
    assert sheet.shape == (2 * 5 + 1, 2 * 7 + 1, 3)
    assert (sheet[1:5, 1:7] == 0).all()
    assert (sheet[1:5, 8:14] == 1).all()
    assert (sheet[6:10, 1:7] == 2).all()
    assert (sheet[6:10, 8:14] == 255).all()
    with pytest.raises(ValueError, match='at least one'):
        make_sheet([])
