"""Write a shapes set in COCO's own layout, all of it or nothing.

::

    <out>/shapes.json                                   arguments, version, counts and hash of the content
    <out>/{train,val}/000000000001.png                  images
    <out>/annotations/instances_{train,val}.json        COCO instances, RLE masks
    <out>/annotations/panoptic_{train,val}.json         COCO panoptic ...
    <out>/annotations/panoptic_{train,val}/*.png        ... and its PNGs (id = R + 256 G + 65536 B)
    <out>/annotations/phrases_{train,val}.json          phrases and the annotation ids that they mean
    <out>/semantic/{train,val}/*.png                    one label per pixel: shape classes, then textures
    <out>/classification/{train,val}/<class>/*.png      one object per image

Everything goes to a folder beside ``<out>`` first, which takes its place when it is complete.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from boltz_mm.datasets.shapes.classes import STUFF_CLASSES, THING_CLASSES
from boltz_mm.datasets.shapes.phrases import describe, make_phrases
from boltz_mm.datasets.shapes.scene import SPLITS, Scene, make_classification_scene, make_scene
from boltz_mm.datasets.shapes.spec import VERSION, ShapesSpec

MANIFEST = 'shapes.json'
_FORMAT = 'boltz_mm shapes'
_CHUNK = 16


def make_shapes(
    out: str | os.PathLike[str],
    counts: dict[str, int],
    spec: ShapesSpec | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> bool:
    """Make a shapes set unless it is already there.

    Args:
        out: Folder of the set.
        counts: Images of each split, such as ``{'train': 600, 'val': 200}``; the classification split gets as many.
        spec: What the images look like.
        workers: Processes. The result does not depend on it.
        overwrite: Replace a shapes set with other arguments (never anything else).
        progress: Show progress bars.

    Returns:
        True if the set was made, False if ``out`` already held the same one.

    Raises:
        ValueError: If an argument is out of its range.
        FileExistsError: If ``out`` holds something else, or a set with other arguments.
        OSError: If it cannot be written, such as when the disk is full.  Nothing is left behind.
    """
    spec = spec or ShapesSpec()
    _check_counts(counts, workers)
    out = Path(out).expanduser().resolve()  # a link stays a link, what it points to is made
    arguments = {'counts': {s: counts[s] for s in SPLITS if counts.get(s)}, **dataclasses.asdict(spec)}
    if _already_made(out, arguments, overwrite):
        return False
    with _partial_folder(out) as partial:
        hashes = {}
        with _mapper(workers) as mapper:
            for split, count in arguments['counts'].items():
                bar = functools.partial(tqdm, total=count, unit='image', disable=not progress)
                hashes[split] = _write_split(partial, spec, split, count, mapper, bar)
        manifest = {'format': _FORMAT, 'version': VERSION, 'arguments': arguments, 'sha256': hashes}
        _write_json(partial / MANIFEST, manifest)
        _take_place(partial, out, arguments, overwrite)
    return True


def _check_counts(counts: dict[str, int], workers: int) -> None:
    unknown = set(counts) - set(SPLITS)
    if unknown:
        raise ValueError(f'unknown split {sorted(unknown)[0]!r}, known are {list(SPLITS)}')
    if min(counts.values(), default=0) < 0 or not any(counts.values()):
        raise ValueError(f'the numbers of images must not be negative and not all be 0, got {counts}')
    if workers < 1:
        raise ValueError(f'workers must be at least 1, got {workers}')


# --------------------------------------------------------------------------------------------------------------------
# The folder as a whole
# --------------------------------------------------------------------------------------------------------------------


def read_manifest(out: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the manifest of a shapes set; None if the folder holds no shapes set."""
    try:
        manifest = json.loads((Path(out) / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get('format') == _FORMAT else None


def _already_made(out: Path, arguments: dict[str, Any], overwrite: bool) -> bool:
    """True if ``out`` holds this set; False if it may be written; an error in all other cases."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    manifest = read_manifest(out)
    if manifest is None:
        raise FileExistsError(f'{out} exists and is not a shapes dataset: choose another folder')
    held = {**manifest.get('arguments', {}), 'version': manifest.get('version')}
    wanted = {**arguments, 'version': VERSION}
    if held == wanted:
        missing = _first_missing(out, arguments['counts'])
        if missing is None:
            return True
        problem = f'is not complete ({missing})'
    else:
        keys = sorted(k for k in held.keys() | wanted.keys() if held.get(k) != wanted.get(k))
        problem = 'was made with other arguments (' + '; '.join(
            f'{k}: {held.get(k)} there, {wanted.get(k)} wanted' for k in keys
        ) + ')'  # fmt: skip
    if overwrite:
        return False
    raise FileExistsError(f'the shapes dataset in {out} {problem}: choose another folder, or overwrite it')


def _first_missing(out: Path, counts: dict[str, int]) -> str | None:
    """What is not there of a finished set, in words; None if all of it is."""
    for split, count in counts.items():
        for kind in ('instances', 'panoptic', 'phrases'):
            if not (out / 'annotations' / f'{kind}_{split}.json').is_file():
                return f'annotations/{kind}_{split}.json is missing'
        for folder, pattern in (
            (split, '*.png'), (f'semantic/{split}', '*.png'), (f'annotations/panoptic_{split}', '*.png'),
            (f'classification/{split}', '*/*.png'),
        ):  # fmt: skip
            found = sum(1 for _ in (out / folder).glob(pattern))
            if found != count:
                return f'{folder} has {found} of {count} images'
    return None


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that is gone afterwards, whatever happens."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f'.{out.name}.partial-{socket.gethostname()}-'
    for stale in out.parent.glob(f'{prefix}*'):
        if not _is_alive(stale.name.removeprefix(prefix)):  # left by a killed process
            shutil.rmtree(stale, ignore_errors=True)
    partial = out.parent / f'{prefix}{os.getpid()}'
    try:
        partial.mkdir()
        yield partial
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f'the disk is full, nothing was written to {out}') from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _take_place(partial: Path, out: Path, arguments: dict[str, Any], overwrite: bool) -> None:
    """Rename the finished folder to ``out``."""
    retired = partial.with_name(partial.name + '-old')
    if overwrite and read_manifest(out) is not None:
        out.rename(retired)
    try:
        partial.rename(out)
    except OSError:
        if retired.exists():
            retired.rename(out)
        elif out.exists() and _already_made(out, arguments, overwrite=False):  # another process was faster
            return
        raise
    shutil.rmtree(retired, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------------
# One split
# --------------------------------------------------------------------------------------------------------------------

_Mapper = Callable[[Callable[[int], Any], Iterable[int]], Iterator[Any]]


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[_Mapper]:
    """A ``map`` that keeps the order, over processes if there is more than one worker."""
    if workers == 1:
        yield map
        return
    pool = ProcessPoolExecutor(workers, initializer=_leave_signals_to_parent)
    try:
        yield functools.partial(pool.map, chunksize=_CHUNK)
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_signals_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _write_split(
    root: Path, spec: ShapesSpec, split: str, count: int, mapper: _Mapper, bar: Callable[..., Iterable[Any]]
) -> str:
    """Write all files of one split; returns the hash of its content."""
    folders = [root / split, root / 'semantic' / split, root / 'annotations' / f'panoptic_{split}']
    folders += [root / 'classification' / split / name for name in THING_CLASSES[: spec.num_classes]]
    for folder in folders:
        folder.mkdir(parents=True)
    digest = hashlib.sha256()
    records = []
    for record in bar(mapper(functools.partial(_write_scene, root, spec, split), range(count)), desc=f'shapes {split}'):
        digest.update(bytes.fromhex(record.pop('sha256')))
        records.append(record)
    single = functools.partial(_write_classification, root, spec, split)
    for one in bar(mapper(single, range(count)), desc=f'classification {split}'):
        digest.update(bytes.fromhex(one))
    for kind, content in _annotation_files(records, spec, split).items():
        _write_json(root / 'annotations' / f'{kind}_{split}.json', content)
    return digest.hexdigest()


def _write_scene(root: Path, spec: ShapesSpec, split: str, index: int) -> dict[str, Any]:
    """Write the PNGs of one image; returns its annotations without the ids that depend on other images."""
    scene = make_scene(spec, split, index)
    name = f'{index + 1:012d}.png'
    panoptic, semantic = label_maps(scene, spec)
    record = annotate(scene, panoptic, spec, split, index)
    _write_png(root / split / name, scene.image[..., ::-1])
    _write_png(root / 'semantic' / split / name, semantic)
    blue_green_red = np.stack([panoptic >> 16, (panoptic >> 8) & 255, panoptic & 255], axis=-1).astype(np.uint8)
    _write_png(root / 'annotations' / f'panoptic_{split}' / name, blue_green_red)
    digest = hashlib.sha256(scene.image.tobytes() + panoptic.tobytes() + semantic.tobytes())
    digest.update(json.dumps(record, sort_keys=True).encode())
    return {'file_name': name, 'id': index + 1, 'sha256': digest.hexdigest(), **record}


def _write_classification(root: Path, spec: ShapesSpec, split: str, index: int) -> str:
    scene = make_classification_scene(spec, split, index)
    folder = root / 'classification' / split / THING_CLASSES[scene.instances[0].label]
    _write_png(folder / f'{index + 1:012d}.png', scene.image[..., ::-1])
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


def label_maps(scene: Scene, spec: ShapesSpec) -> tuple[np.ndarray, np.ndarray]:
    """Panoptic ids and semantic labels of every pixel.

    Args:
        scene: An image with its ground truth.
        spec: The set that it belongs to.

    Returns:
        Panoptic ids, int32 [H, W]: k + 1 for instance k, then one id for each background texture.  Semantic labels,
        uint8 [H, W]: shape classes, then background textures.
    """
    semantic = scene.stuff + np.uint8(spec.num_classes)
    panoptic = len(scene.instances) + 1 + scene.stuff.astype(np.int32)
    for k, instance in enumerate(scene.instances):
        semantic[instance.mask] = instance.label
        panoptic[instance.mask] = k + 1
    return panoptic, semantic


def annotate(scene: Scene, panoptic: np.ndarray, spec: ShapesSpec, split: str, index: int) -> dict[str, Any]:
    """Annotations of one image.

    Args:
        scene: The image with its ground truth.
        panoptic: Its panoptic ids [H, W], see :func:`label_maps`.
        spec: The set that it belongs to.
        split: Its split.
        index: Its number in the split, from 0.

    Returns:
        ``annotations`` (COCO instances without ids), ``segments_info`` (COCO panoptic) and ``phrases``.
    """
    annotations: list[dict[str, Any]] = []
    for instance in scene.instances:
        rle = coco_mask.encode(np.asfortranarray(instance.mask.astype(np.uint8)))
        box = coco_mask.toBbox(rle).tolist()
        annotations.append(
            {
                'category_id': instance.label + 1,
                'bbox': box,
                'area': int(coco_mask.area(rle)),
                'iscrowd': 0,
                'segmentation': {'size': list(rle['size']), 'counts': rle['counts'].decode()},
                'attributes': describe(box, instance.label, instance.color, instance.pattern, spec.size),
            }
        )
    things = [
        {'id': k + 1, **{key: a[key] for key in ('category_id', 'bbox', 'area', 'iscrowd')}}
        for k, a in enumerate(annotations)
    ]
    phrases = make_phrases([a['attributes'] for a in annotations], spec.seed, SPLITS.index(split), index)
    return {
        'annotations': annotations,
        'segments_info': things + _stuff_segments(panoptic, len(things) + 1, spec),
        'phrases': phrases,
    }


def _stuff_segments(panoptic: np.ndarray, first: int, spec: ShapesSpec) -> list[dict[str, Any]]:
    """Segments of the background textures, whose ids begin at ``first``."""
    segments = []
    for kind in range(len(STUFF_CLASSES)):
        rle = coco_mask.encode(np.asfortranarray((panoptic == first + kind).astype(np.uint8)))
        area = int(coco_mask.area(rle))
        if area:
            segments.append(
                {
                    'id': first + kind,
                    'category_id': spec.num_classes + 1 + kind,
                    'bbox': coco_mask.toBbox(rle).tolist(),
                    'area': area,
                    'iscrowd': 0,
                }
            )
    return segments


def _annotation_files(records: list[dict[str, Any]], spec: ShapesSpec, split: str) -> dict[str, dict[str, Any]]:
    """Content of the three JSON files; instance ids are counted from 1 over the split."""
    info = {'description': f'boltz_mm shapes {split}', 'version': str(VERSION), 'seed': spec.seed}
    images = [{'id': r['id'], 'file_name': r['file_name'], 'height': spec.size, 'width': spec.size} for r in records]
    things = [
        {'id': i + 1, 'name': name, 'supercategory': 'shape'}
        for i, name in enumerate(THING_CLASSES[: spec.num_classes])
    ]
    stuff = [
        {'id': spec.num_classes + 1 + i, 'name': name, 'supercategory': 'background', 'isthing': 0}
        for i, name in enumerate(STUFF_CLASSES)
    ]
    instances: list[dict[str, Any]] = []
    panoptic, phrases = [], []
    for record in records:
        first = len(instances) + 1
        for k, annotation in enumerate(record['annotations']):
            instances.append({'id': first + k, 'image_id': record['id'], **annotation})
        panoptic.append({
            'image_id': record['id'], 'file_name': record['file_name'], 'segments_info': record['segments_info'],
        })  # fmt: skip
        phrases.append(
            {
                'image_id': record['id'],
                'phrases': [
                    {'phrase': p['phrase'], 'annotation_ids': [first + k for k in p['objects']]}
                    for p in record['phrases']
                ],
            }
        )
    return {
        'instances': {'info': info, 'images': images, 'categories': things, 'annotations': instances},
        'panoptic': {
            'info': info, 'images': images, 'categories': [{**c, 'isthing': 1} for c in things] + stuff,
            'annotations': panoptic,
        },
        'phrases': {'info': info, 'images': images, 'annotations': phrases},
    }  # fmt: skip


def _write_png(path: Path, pixels: np.ndarray) -> None:
    done, encoded = cv2.imencode('.png', np.ascontiguousarray(pixels))
    if not done:
        raise ValueError(f'cannot encode {path.name}')
    path.write_bytes(encoded.tobytes())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))
