"""The tools that write pictures."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from tools.analysis_tools import browse_dataset, plot_box_attention, plot_detections

from ..conftest import Tiny


def test_browse_dataset(tiny: Tiny, tmp_path: Path) -> None:
    browse_dataset.main([tiny.config, '--output-dir', str(tmp_path), '--not-show'])
    assert sorted(os.listdir(tmp_path)) == [f'{k:012d}.png' for k in (1, 2, 3)]
    picture = cv2.imread(str(tmp_path / '000000000002.png'))
    plain = cv2.imread(str(tiny.data / 'train/000000000002.png'))
    assert picture.shape[:2] == (384, 384), 'images of 128 pixels (the pipeline resizes) are shown threefold'
    shown = cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA).astype(int)
    flips = [np.flip(plain, axes) for axes in ((), 0, 1, (0, 1))]  # training flips
    agreement = max((np.abs(shown - flip).sum(-1) < 40).mean() for flip in flips)
    assert 0.5 < agreement < 0.999, 'the image, with annotations drawn over it'


def test_browse_dataset_phase_limit_and_equal_names(tiny: Tiny, tmp_path: Path) -> None:
    options = ['--phase', 'val', '--num-images', '2']
    browse_dataset.main([tiny.config, '--output-dir', str(tmp_path), '--not-show', *options])
    assert len(os.listdir(tmp_path)) == 2
    picture = cv2.imread(str(tmp_path / '000000000001.png'))
    plain = cv2.imread(str(tiny.data / 'val/000000000001.png'))
    assert picture.shape[:2] == (384, 384), 'the image on disk, sixfold'
    assert 0.5 < (np.abs(picture[3::6, 3::6].astype(int) - plain).sum(-1) < 9).mean() < 0.999
    used: set[str] = set()
    names = [browse_dataset.unused_name(tmp_path, name, used).name for name in ('a.png', 'a.png', 'b', 'a.png')]
    assert names == ['a.png', 'a_1.png', 'b.png', 'a_2.png']


def test_browse_dataset_refuses_to_do_nothing(tiny: Tiny) -> None:
    with pytest.raises(SystemExit, match='would do nothing'):
        browse_dataset.main([tiny.config, '--not-show'])


def test_plot_detections(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / 'new' / 'sheet.png'
    arguments = [tiny.config, tiny.checkpoint, '--out', str(out), '--device', 'cpu']
    plot_detections.main([*arguments, '--num-images', '9', '--start', '1', '--columns', '2', '--score-thr', '0.99'])
    sheet = cv2.imread(str(out))
    side = 64 * 6
    assert sheet.shape[:2] == (2 * (side + 12) + 12, 2 * (2 * side + 12) + 12), '3 images in 2 columns'
    image = cv2.resize(cv2.imread(str(tiny.data / 'val/000000000002.png')), None, fx=6, fy=6, interpolation=0)
    right = sheet[12 : 12 + side, 12 + side : 12 + 2 * side]
    np.testing.assert_array_equal(right, image, 'no detection above 0.99')
    assert (sheet[12 : 12 + side, 12 : 12 + side] != image).any(), 'truth on the left'
    with pytest.raises(SystemExit, match='no image 4'):
        plot_detections.main([*arguments, '--start', '4'])


def test_plot_box_attention(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / 'new' / 'attention.png'
    image = str(tiny.data / 'val/000000000001.png')
    arguments = [tiny.config, tiny.checkpoint, image, '--out', str(out), '--device', 'cpu']
    plot_box_attention.main([*arguments, '--num-queries', '2', '--dpi', '60'])
    picture = cv2.imread(str(out))
    assert picture.shape[0] == int((4.55 * 2 + 0.5) * 60)
    assert picture.std() > 10
    for wrong, named in (
        (['--queries', '99'], 'no query 99, the model has 20'),
        (['--decoder-layer', '1'], 'decoder has 1 layers'),
    ):
        with pytest.raises(SystemExit, match=named):
            plot_box_attention.main([*arguments, *wrong])


def test_weights_of_another_model_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    image = str(tiny.data / 'val/000000000001.png')
    options = ['--cfg-options', 'model.bbox_head.num_classes=7']
    with pytest.raises(SystemExit, match='set num_classes=3'):
        plot_box_attention.main([tiny.config, tiny.checkpoint, image, '--out', str(tmp_path / 'a.png'), *options])
    with pytest.raises(SystemExit, match='nothing.pth does not exist'):
        plot_detections.main([tiny.config, 'nothing.pth'])
    assert not os.listdir(tmp_path)
