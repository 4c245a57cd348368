"""The metrics give pycocotools' own numbers: with crowds, ties, empty results, and labels that are category ids."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from boltz_mm.datasets.checked_coco import DatasetError
from boltz_mm.registry import METRICS
from tests.datasets.coco_files import SIZE, coco_content, polygon, write_coco

NAMES, IDS = ('person', 'bicycle', 'airplane'), (1, 2, 5)
CLASSES = tuple(f'class {i}' for i in range(91))
ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


@pytest.fixture
def ann_file(tmp_path: Path) -> str:
    content = coco_content(NAMES, IDS)
    for annotation in content['annotations']:
        if annotation['id'] in (107, 108):  # without a usable polygon, which pycocotools does not take
            annotation['segmentation'] = polygon(*annotation['bbox'])
    return str(write_coco(tmp_path, content))


def _detections(ann_file: str, seed: int = 0) -> dict[int, dict[str, torch.Tensor]]:
    """Boxes near the truth, wrong ones, wrong classes, one id that is no category, and many equal scores."""
    generator = np.random.default_rng(seed)
    content = json.loads(Path(ann_file).read_text())
    found = {}
    for image in content['images']:
        truth = [a for a in content['annotations'] if a['image_id'] == image['id']]
        boxes, labels = [[0.0, 0, 5, 5], [10.0, 10, 30, 25]], [1, 12]
        for annotation in truth:
            x, y, width, height = annotation['bbox']
            for jitter in (0.3, 1.0):
                moved = np.array([x, y, x + width, y + height]) + generator.normal(0, jitter, 4)
                boxes.append(moved.tolist())
                labels.append(int(generator.choice([annotation['category_id']] * 4 + [1])))
        scores = generator.choice([0.25, 0.5, 0.5, 0.75], len(boxes))
        found[image['id']] = {
            'bboxes': torch.tensor(boxes, dtype=torch.float32),
            'labels': torch.tensor(labels),
            'scores': torch.tensor(scores, dtype=torch.float32),
            'masks': torch.from_numpy(np.stack([_mask(box) for box in boxes])),
        }
    return found


def _mask(box: list[float]) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    x1, y1, x2, y2 = (max(round(value), 0) for value in box)
    mask[y1:y2, x1:x2] = True
    return mask


def _evaluate(metric_type: str, ann_file: str, found: dict, **options) -> dict[str, float]:
    metric = METRICS.build(dict(type=metric_type, ann_file=ann_file, metric=['bbox', 'segm'], **options))
    metric.dataset_meta = {'classes': CLASSES if 'Id' in metric_type else NAMES}
    for image_id, prediction in found.items():
        metric.process({}, [{'img_id': image_id, 'ori_shape': SIZE, 'pred_instances': prediction}])
    with contextlib.redirect_stdout(io.StringIO()):
        return metric.evaluate(size=len(found))


def _pycocotools(ann_file: str, found: dict, kind: str) -> list[float]:
    """What pycocotools itself says about the same detections."""
    rows = []
    for image_id, prediction in found.items():
        for box, label, score, mask in zip(
            *(prediction[k] for k in ('bboxes', 'labels', 'scores', 'masks')), strict=True
        ):
            row = {'image_id': image_id, 'category_id': int(label), 'score': float(score)}
            x1, y1, x2, y2 = box.tolist()
            if kind == 'bbox':
                row['bbox'] = [x1, y1, x2 - x1, y2 - y1]
            else:
                encoded = mask_utils.encode(np.asfortranarray(mask.numpy()))
                row['segmentation'] = {**encoded, 'counts': encoded['counts'].decode()}
            rows.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(ann_file)
        evaluation = COCOeval(truth, truth.loadRes(rows), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()


@pytest.mark.parametrize('seed', range(4))
def test_numbers_are_those_of_pycocotools(ann_file, seed):
    found = _detections(ann_file, seed)
    ours = _evaluate('boltz_mm.CocoCategoryIdMetric', ann_file, found)
    for kind in ('bbox', 'segm'):
        expected = _pycocotools(ann_file, found, kind)
        assert [ours[f'coco/{kind}_{item}'] for item in ITEMS] == pytest.approx(expected, abs=5.1e-4)
        assert 0.05 < expected[0] < 0.99  # the detections are neither perfect nor useless


def test_contiguous_labels_give_the_same_numbers(ann_file):
    found = _detections(ann_file)
    position = {number: index for index, number in enumerate(IDS)}
    contiguous = {}
    for image_id, prediction in found.items():
        keep = torch.tensor([int(label) in position for label in prediction['labels']])
        contiguous[image_id] = {key: value[keep] for key, value in prediction.items()}
        labels = [position[int(label)] for label in contiguous[image_id]['labels']]
        contiguous[image_id]['labels'] = torch.tensor(labels)
    assert _evaluate('boltz_mm.CheckedCocoMetric', ann_file, contiguous) == _evaluate(
        'boltz_mm.CocoCategoryIdMetric', ann_file, found
    )


@pytest.mark.parametrize('metric', ['boltz_mm.CocoCategoryIdMetric', 'boltz_mm.CheckedCocoMetric'])
def test_no_detection_at_all_is_an_ap_of_zero(ann_file, metric):
    nothing = {
        'bboxes': torch.zeros(0, 4),
        'labels': torch.zeros(0, dtype=torch.long),
        'scores': torch.zeros(0),
        'masks': torch.zeros(0, *SIZE, dtype=torch.bool),
    }
    results = _evaluate(metric, ann_file, dict.fromkeys(range(1, 6), nothing))
    assert results['coco/bbox_mAP'] == results['coco/segm_mAP'] == 0
    assert results['coco/bbox_mAP_l'] == -1  # there is no large object


def test_only_ids_that_are_not_evaluated_count_as_nothing(ann_file):
    found = _detections(ann_file)
    for prediction in found.values():
        prediction['labels'][:] = 12
    assert _evaluate('boltz_mm.CocoCategoryIdMetric', ann_file, found)['coco/bbox_mAP'] == 0


def test_chosen_ids_and_table_by_class(ann_file):
    found = _detections(ann_file)
    results = _evaluate('boltz_mm.CocoCategoryIdMetric', ann_file, found, category_ids=[5, 1], classwise=True)
    assert [key for key in results if 'precision' in key] == ['coco/person_precision', 'coco/airplane_precision']
    everything = _evaluate('boltz_mm.CocoCategoryIdMetric', ann_file, found, classwise=True)
    assert results['coco/airplane_precision'] == everything['coco/airplane_precision']


def test_order_of_categories_in_the_file_does_not_matter(ann_file, tmp_path):
    found = _detections(ann_file)
    content = json.loads(Path(ann_file).read_text())
    content['categories'].reverse()
    (tmp_path / 'reversed.json').write_text(json.dumps(content))
    for prediction in found.values():
        prediction['labels'] = torch.tensor([IDS.index(int(i)) if int(i) in IDS else 0 for i in prediction['labels']])
    tables = [
        _evaluate('boltz_mm.CheckedCocoMetric', str(tmp_path / name), found, classwise=True)
        for name in ('instances.json', 'reversed.json')
    ]
    assert tables[0] == tables[1]


def test_written_results_have_category_ids_and_xywh_boxes(ann_file, tmp_path):
    found = _detections(ann_file)
    options = dict(format_only=True, outfile_prefix=str(tmp_path / 'out'))
    assert _evaluate('boltz_mm.CocoCategoryIdMetric', ann_file, found, **options) == {}
    rows = json.loads((tmp_path / 'out.bbox.json').read_text())
    assert {row['category_id'] for row in rows} == set(IDS)
    x1, y1, x2, y2 = found[1]['bboxes'][0].tolist()
    assert rows[0]['bbox'] == [x1, y1, x2 - x1, y2 - y1]
    assert set(json.loads((tmp_path / 'out.segm.json').read_text())[0]['segmentation']) == {'size', 'counts'}


def test_unknown_ids_are_refused(ann_file):
    with pytest.raises(DatasetError, match='no category has the id 7'):
        METRICS.build(dict(type='boltz_mm.CocoCategoryIdMetric', ann_file=ann_file, category_ids=[1, 7]))


def test_detections_of_an_unlisted_image_are_refused(ann_file):
    with pytest.raises(DatasetError, match=r'instances\.json: image 99 was evaluated'):
        _evaluate('boltz_mm.CocoCategoryIdMetric', ann_file, {99: _detections(ann_file)[1]})


def test_broken_file_is_named(tmp_path):
    (tmp_path / 'broken.json').write_text('{')
    with pytest.raises(DatasetError, match=r'broken\.json'):
        METRICS.build(dict(type='boltz_mm.CocoCategoryIdMetric', ann_file=str(tmp_path / 'broken.json')))


def test_images_that_were_not_shown(ann_file, tmp_path):
    found = _detections(ann_file)
    shown = {image_id: found[image_id] for image_id in list(found)[:2]}
    content = json.loads(Path(ann_file).read_text())
    content['images'] = [image for image in content['images'] if image['id'] in shown]
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] in shown]
    alone = tmp_path / 'alone.json'
    alone.write_text(json.dumps(content))
    expected = _evaluate('boltz_mm.CocoCategoryIdMetric', str(alone), shown)
    assert _evaluate('boltz_mm.CocoCategoryIdMetric', ann_file, shown, seen_images_only=True) == expected
    with pytest.warns(UserWarning, match='lists 5 images, of which 2 were evaluated'):
        assert _evaluate('boltz_mm.CocoCategoryIdMetric', ann_file, shown)['coco/bbox_mAP'] < expected['coco/bbox_mAP']
