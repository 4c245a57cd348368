"""The panoptic metric on files: mmdet's ids in, percentages by things and stuff out, predictions in COCO's layout."""

import json

import mmcv
import numpy as np
import pytest
import torch
from mmengine.structures import PixelData

from boltz_mm.datasets.checked_coco import DatasetError
from boltz_mm.datasets.coco_panoptic import rgb2id
from boltz_mm.registry import METRICS
from tests.datasets.panoptic_files import CAT, CROWD, DOG, METAINFO, SKY, panoptic_content, panoptic_ids, write_panoptic

VOID = 3  # the number of classes


def _metric(folder, content=None, **kwargs):
    ann_file = str(write_panoptic(folder, content))
    config = dict(type='boltz_mm.CocoPanopticQualityMetric', ann_file=ann_file, seg_prefix=str(folder), **kwargs)
    metric = METRICS.build(config)
    metric.dataset_meta = METAINFO
    return metric


def _truth_as_prediction() -> torch.Tensor:
    """What a perfect model says: label + 1000 * instance."""
    ids = panoptic_ids()
    found = np.full(ids.shape, VOID)
    for number, value in ((CAT, 1000), (DOG, 2001), (SKY, 2), (CROWD, 3000)):
        found[ids == number] = value
    return torch.from_numpy(found)[None]


def _samples(*found: torch.Tensor, first: int = 1) -> list[dict]:
    return [
        {'img_id': number, 'pred_panoptic_seg': PixelData(sem_seg=one).to_dict()}
        for number, one in enumerate(found, start=first)
    ]


def test_perfect_and_missing_predictions(tmp_path):
    metric = _metric(tmp_path, classwise=True)
    metric.process({}, _samples(_truth_as_prediction()))
    nothing = torch.full((1, 20, 24), VOID)
    metric.process({}, _samples(nothing, first=2))
    with pytest.warns(UserWarning, match='lists 3 images, of which 2'):
        result = metric.evaluate(2)
    # One of two segments is found in every class; the prediction on the crowd is excused.
    assert result['coco_panoptic/PQ'] == pytest.approx(200 / 3)
    assert result['coco_panoptic/SQ_st'] == 100 and result['coco_panoptic/RQ_th'] == pytest.approx(200 / 3)


def test_ignore_index_is_void_too(tmp_path):
    sample = _samples(torch.full((1, 20, 24), 255))[0]
    sample['pred_panoptic_seg']['ignore_index'] = 255
    metric = _metric(tmp_path)
    metric.process({}, [sample])
    assert metric.results[0][1].sum(axis=0).tolist() == [0, 0, 0, 3]


def test_predictions_are_written(tmp_path):
    prefix = tmp_path / 'new' / 'out'
    metric = _metric(tmp_path, format_only=True, outfile_prefix=str(prefix))
    metric.process({}, _samples(_truth_as_prediction()))
    assert metric.evaluate(1) == {}
    rows = json.loads(prefix.with_name('out.panoptic.json').read_text())['annotations']
    ids = rgb2id(mmcv.imread(prefix.with_name('out.panoptic') / rows[0]['file_name'], channel_order='rgb'))
    assert rows[0]['image_id'] == 1
    truth = panoptic_ids()
    segments = sorted(rows[0]['segments_info'], key=lambda segment: segment['category_id'])
    assert [segment['category_id'] for segment in segments] == [2, 7, 7, 8]
    sky = segments[0]
    assert sky['area'] == (truth == SKY).sum()
    np.testing.assert_array_equal(ids == sky['id'], truth == SKY)


def test_broken_input_names_file_and_image(tmp_path):
    metric = _metric(tmp_path)
    with pytest.raises(DatasetError, match=r'panoptic.json: image 7 was evaluated but is not listed'):
        metric.process({}, _samples(_truth_as_prediction(), first=7))
    with pytest.raises(DatasetError, match='image 3 has no panoptic annotation'):
        metric.process({}, _samples(_truth_as_prediction(), first=3))
    with pytest.raises(DatasetError, match=r'image 1 of .*ids_1.png: truth is \[20, 24\].*prediction \[20, 20\]'):
        metric.process({}, _samples(_truth_as_prediction()[..., :20]))
    (tmp_path / 'ids_2.png').unlink()
    with pytest.raises(DatasetError, match='image 2 of .*ids_2.png: the picture of ids cannot be read'):
        metric.process({}, _samples(_truth_as_prediction(), first=2))
    with pytest.raises(ValueError, match='outfile_prefix'):
        _metric(tmp_path, format_only=True)
    other = panoptic_content()
    other['categories'][1]['name'] = 'lion'
    with pytest.raises(DatasetError, match="panoptic.json: no category of the file is named 'cat'"):
        _metric(tmp_path, other).process({}, _samples(_truth_as_prediction()))
