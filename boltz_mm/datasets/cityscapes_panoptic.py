"""Cityscapes panoptic, from the files that ``cityscapesscripts`` writes (``csCreatePanopticImgs``).

Those list the images by a name that no file has (``aachen_000000_000019_gtFine_leftImg8bit.png``); the image lies in
the folder of its city.  Classes are in the order of the official training ids, things after stuff.
"""

from boltz_mm.datasets.coco_panoptic import CheckedCocoPanopticDataset
from boltz_mm.registry import DATASETS

_THINGS = ('person', 'rider', 'car', 'truck', 'bus', 'train', 'motorcycle', 'bicycle')
_STUFF = (
    'road', 'sidewalk', 'building', 'wall', 'fence', 'pole', 'traffic light', 'traffic sign', 'vegetation', 'terrain',
    'sky',
)  # fmt: skip


@DATASETS.register_module()
class CityscapesPanopticDataset(CheckedCocoPanopticDataset):
    """Cityscapes with panoptic annotations.

    ::

        dict(
            type='boltz_mm.CityscapesPanopticDataset', data_root='data/cityscapes/',
            ann_file='gtFine/cityscapes_panoptic_train.json',
            data_prefix=dict(img='leftImg8bit/train/', seg='gtFine/cityscapes_panoptic_train/'), ...)

    Raises:
        DatasetError: As :class:`CheckedCocoPanopticDataset`.
    """

    METAINFO = {
        'classes': _STUFF + _THINGS,
        'thing_classes': _THINGS,
        'stuff_classes': _STUFF,
        'palette': [
            (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
            (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
            (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
        ],
    }  # fmt: skip

    def image_file(self, image: dict) -> str:
        """``aachen/aachen_000000_000019_leftImg8bit.png`` for the image ``aachen_000000_000019``."""
        number = str(image['img_id'])
        return f'{number.split("_")[0]}/{number}_leftImg8bit.png'
