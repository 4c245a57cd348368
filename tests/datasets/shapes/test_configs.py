"""The base configs of the shapes set fit what the generator makes."""

from pathlib import Path

import pytest
from mmengine.config import Config

from boltz_mm.datasets.shapes import ShapesSpec, instance_metainfo, make_shapes
from boltz_mm.registry import DATASETS

BASES = Path(__file__).parents[3] / 'configs/_base_/datasets'


@pytest.mark.parametrize(
    ('name', 'spec'), [('shapes_instance', ShapesSpec()), ('shapes_instance_hard', ShapesSpec.hard_set())]
)
def test_base_config_reads_a_set(tmp_path: Path, name: str, spec: ShapesSpec) -> None:
    cfg = Config.fromfile(BASES / f'{name}.py')
    root = tmp_path / 'shapes'
    make_shapes(root, {'train': 3, 'val': 2}, spec, progress=False)
    for part, count in (('train', 3), ('val', 2), ('test', 2)):
        dataset = cfg[f'{part}_dataloader'].dataset
        assert dict(dataset.metainfo) == instance_metainfo(spec.num_classes)
        dataset.data_root = str(root)
        built = DATASETS.build(dataset)
        assert len(built) == count
        sample = built[0]
        assert sample['inputs'].shape == (3, 128, 128)
        truth = sample['data_samples'].get('gt_instances')
        assert len(truth.masks) == len(truth.labels) > 0
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.ann_file == f'data/{"shapes_hard" if spec.hard else "shapes"}/annotations/instances_val.json'
