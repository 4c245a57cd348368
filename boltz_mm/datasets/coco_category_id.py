"""COCO with raw category ids as labels, as the official BoxeR trains and predicts (``e2edet/dataset/coco.py``).

The network has one output for every number up to the largest category id (91 for COCO: 0 and ten gaps are never an
object), so that official weights keep their rows.  Crowd regions are dropped, boxes are clipped to the image and kept
if they have an area then, images without objects stay.
"""

from mmdet.datasets import CocoDataset

from boltz_mm.datasets.checked_coco import CheckedCocoDataset, DatasetError
from boltz_mm.registry import DATASETS

# Category ids below 91 that COCO 2017 does not use.
_UNUSED = frozenset({0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def _metainfo() -> dict[str, tuple | list]:
    names, colors = iter(CocoDataset.METAINFO['classes']), iter(CocoDataset.METAINFO['palette'])
    rows = [(f'unused {i}', (128, 128, 128)) if i in _UNUSED else (next(names), next(colors)) for i in range(91)]
    # a list: mmdet takes a tuple for one colour of all classes
    return {'classes': tuple(name for name, _ in rows), 'palette': [color for _, color in rows]}


@DATASETS.register_module()
class CocoCategoryIdDataset(CheckedCocoDataset):
    """COCO dataset whose labels are the category ids of the annotation file.

    ``metainfo['classes'][i]`` is the name of category id ``i``; its length is the number of outputs of the network.
    For a dataset of your own give ``metainfo=dict(classes=(...))`` with a name at every id, or number the labels
    contiguously and take :class:`CheckedCocoDataset`.

    Raises:
        DatasetError: As :class:`CheckedCocoDataset`; also for a category whose id has no place in ``classes`` or
            another name there.
    """

    METAINFO = _metainfo()

    def _labels(self, categories: list[dict]) -> dict[int, int]:
        classes = self.metainfo['classes']
        for category in categories:
            number, name = category['id'], category['name']
            if not 0 <= number < len(classes):
                raise DatasetError(f'category {number} ({name!r}) is beyond the {len(classes)} classes of metainfo')
            if classes[number] != name:
                raise DatasetError(f'category {number} is {name!r} in the file and {classes[number]!r} in metainfo')
        return {category['id']: category['id'] for category in categories}
