"""One small shapes set, shared by the tests that only read it."""

from pathlib import Path

import pytest

from boltz_mm.datasets.shapes import ShapesSpec, make_shapes

COUNTS = {'train': 24, 'val': 12}


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 24 + 12 images of 64 pixels with 4 classes."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    assert make_shapes(root, COUNTS, ShapesSpec(size=64, num_classes=4), progress=False)
    return root
