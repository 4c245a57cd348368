"""Images and masks of single scenes."""

import math

import numpy as np
import pytest

from boltz_mm.datasets.shapes import THING_CLASSES, ShapesSpec, make_classification_scene, make_scene
from boltz_mm.datasets.shapes.draws import Draws
from boltz_mm.datasets.shapes.geometry import outline, rasterize
from boltz_mm.datasets.shapes.textures import background, pattern


def _longer_side(mask: np.ndarray) -> int:
    rows, columns = np.nonzero(mask)
    return int(max(np.ptp(rows), np.ptp(columns))) + 1


@pytest.mark.parametrize('name', THING_CLASSES)
@pytest.mark.parametrize('angle', [0.0, 0.7, 2.9])
def test_outline_has_the_wanted_size(name: str, angle: float) -> None:
    corners = np.concatenate(outline(name, 20.0, 1.2, angle))
    extent = corners.max(axis=0) - corners.min(axis=0)
    assert extent.max() == pytest.approx(20.0)
    np.testing.assert_allclose(corners.max(axis=0), -corners.min(axis=0), atol=1e-9)


def test_rasterize_gives_the_area() -> None:
    circle = [c + 20 for c in outline('circle', 30.0, 1.0, 0.0)]
    assert rasterize(circle, 40, 40).sum() == pytest.approx(math.pi * 15**2, rel=0.01)
    ring = [c + 20 for c in outline('ring', 30.0, 1.0, 0.0)]
    assert rasterize(ring, 40, 40).sum() == pytest.approx(math.pi * 15**2 * (1 - 0.52**2), rel=0.01)
    assert rasterize(ring, 40, 40)[20, 20] == 0


def test_rasterize_is_exact_on_pixel_borders_and_clips() -> None:
    square = [np.array([(1.0, 2.0), (4.0, 2.0), (4.0, 9.0), (1.0, 9.0)])]
    expected = np.zeros((5, 6), np.float32)
    expected[2:, 1:4] = 1
    np.testing.assert_array_equal(rasterize(square, 6, 5), expected)


def test_rasterize_agrees_with_point_in_polygon() -> None:
    star = [c + 10 for c in outline('star', 17.0, 0.9, 0.4)]
    corners = star[0]
    points = (np.stack(np.meshgrid(np.arange(80), np.arange(80)), axis=-1) + 0.5) / 4
    turns = np.zeros((80, 80))  # winding number by the sum of angles, a different method
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        va, vb = a - points, b - points
        turns += np.arctan2(va[..., 0] * vb[..., 1] - va[..., 1] * vb[..., 0], (va * vb).sum(-1))
    inside = np.abs(turns) > math.pi
    np.testing.assert_allclose(rasterize(star, 20, 20), inside.reshape(20, 4, 20, 4).mean(axis=(1, 3)), atol=1e-6)


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match='blob'):
        outline('blob', 5, 1, 0)
    with pytest.raises(ValueError, match='plaid'):
        pattern('plaid', 4, 4, 2.0, 0.0)
    with pytest.raises(ValueError, match='sky'):
        background('sky', Draws(0), 32)


def test_scene_depends_on_seed_split_and_index_alone() -> None:
    spec = ShapesSpec(size=64)
    image = make_scene(spec, 'train', 3).image
    make_scene(spec, 'val', 9)
    np.testing.assert_array_equal(image, make_scene(spec, 'train', 3).image)
    others = [
        make_scene(spec, 'train', 4),
        make_scene(spec, 'val', 3),
        make_scene(ShapesSpec(size=64, seed=1), 'train', 3),
        make_classification_scene(spec, 'train', 3),
    ]
    assert all((image != other.image).mean() > 0.5 for other in others)


@pytest.mark.parametrize('spec', [ShapesSpec(), ShapesSpec.hard_set(), ShapesSpec(size=48, max_objects=30)])
def test_rules_of_visibility(spec: ShapesSpec) -> None:
    for index in range(60):
        scene = make_scene(spec, 'train', index)
        assert 1 <= len(scene.instances) <= spec.max_objects
        assert sum(i.mask.astype(int) for i in scene.instances).max() == 1, 'masks overlap'
        for instance in scene.instances:
            assert 0 <= instance.label < spec.num_classes
            assert _longer_side(instance.mask) >= spec.min_size


def test_sizes_are_many_small_ones() -> None:
    spec = ShapesSpec()
    sizes = np.array([
        _longer_side(i.mask) for index in range(250) for i in make_scene(spec, 'train', index).instances
    ])  # fmt: skip
    middle = math.sqrt(spec.min_size * spec.largest)  # a log-uniform size is below it half of the time
    assert sizes.min() == spec.min_size
    assert sizes.max() > 0.9 * spec.largest
    assert 0.45 < (sizes <= middle).mean() < 0.65
    assert 0.15 < (sizes < 10).mean() < 0.4


def test_objects_differ_from_the_ground_around_them() -> None:
    spec = ShapesSpec(size=96)
    contrasts = []
    for index in range(60):
        scene = make_scene(spec, 'train', index)
        free = ~np.any([i.mask for i in scene.instances], axis=0)
        for instance in scene.instances:
            ground = scene.image[free].mean(axis=0)
            contrasts.append(np.abs(scene.image[instance.mask].mean(axis=0) - ground).sum())
    assert np.quantile(contrasts, 0.05) > 40


def test_empty_images_only_if_asked() -> None:
    counts = [len(make_scene(ShapesSpec(size=48, empty=0.5), 'train', i).instances) for i in range(60)]
    assert 15 <= sum(c == 0 for c in counts) <= 45
    assert all(make_scene(ShapesSpec(size=48), 'train', i).instances for i in range(60))


def test_classification_scene_has_one_larger_object_of_its_class() -> None:
    spec = ShapesSpec(size=96, num_classes=5)
    for index in range(20):
        scene = make_classification_scene(spec, 'val', index)
        assert [i.label for i in scene.instances] == [index % 5]
        assert _longer_side(scene.instances[0].mask) >= 12


@pytest.mark.parametrize(
    ('kwargs', 'named'),
    [
        ({'size': 8}, '8'),
        ({'num_classes': 0}, '0'),
        ({'num_classes': 11}, '11'),
        ({'min_size': 2}, '2'),
        ({'min_size': 40, 'max_size': 20}, '40'),
        ({'max_size': 129}, '129'),
        ({'min_objects': 0}, '0'),
        ({'min_objects': 4, 'max_objects': 3}, '4'),
        ({'min_visible': 1.5}, '1.5'),
        ({'empty': -0.1}, '-0.1'),
        ({'seed': -1}, '-1'),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ShapesSpec(**kwargs)
