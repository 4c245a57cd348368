"""AutoFocusFormer: classifiers and segmentors against two forms in plain PyTorch, and how their parts grow.

Baselines: ``gather`` is the official arrangement of work on the operators of the official tests
(:mod:`tools.benchmark.baselines.aff`); its exhaustive search for neighbours is timed apart and not counted, except in
the lines that say so.  ``best PyTorch`` is our model on the reference operators, which are the fastest exact forms in
PyTorch that we found for each direction, with the search for neighbours left native.  The lines of ``dense layers
alone`` have in ``ratio`` the share of our time that the linear maps, convolutions, norms and activations take by
themselves.
"""

import contextlib
import ctypes
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boltz_mm import ops
from boltz_mm.converters.aff import convert_aff
from boltz_mm.models.backbones.aff import AFF, ARCHS
from boltz_mm.models.heads.point_pixel_decoder import PointPixelDecoder
from boltz_mm.models.layers.point_masked_decoder import PointMaskedDecoder
from boltz_mm.ops import neighbors
from tools.benchmark import aff_attention
from tools.benchmark.baselines.aff import OfficialAFF
from tools.benchmark.baselines.aff_head import OfficialSegmentor
from tools.benchmark.baselines.bag_attention import bag_attention
from tools.benchmark.baselines.cluster_attention import KNN_TIME
from tools.benchmark.dense import DenseLayers
from tools.benchmark.timing import Record, Work, extra_bytes, medians

SEGMENTATION = {
    'pixel_decoder': dict(
        conv_dim=256, mask_dim=256, transformer_nheads=8, transformer_dim_feedforward=1024, transformer_enc_layers=6,
        shepard_power=3.0, shepard_power_learnable=True,
    ),
    'transformer_decoder': dict(
        hidden_dim=256, num_queries=100, nheads=8, dim_feedforward=2048, dec_layers=9, mask_dim=256
    ),
}  # fmt: skip
QUICK = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), mlp_ratio=2.0, nbhd_size=16)


def official_kwargs(arch: dict[str, Any], segmentation: bool) -> dict[str, Any]:
    """Arguments of the official model for one of our variants."""
    kwargs = {'cluster_size': 8, 'nbhd_size': (48, 48, 48, 49), 'ds_rate': 0.25, 'layer_scale': 0.0, **arch}
    kwargs['embed_dim'] = kwargs.pop('embed_dims')
    if isinstance(kwargs['nbhd_size'], int) or segmentation:
        size = kwargs['nbhd_size']
        kwargs['nbhd_size'] = (size if isinstance(size, int) else size[0],) * 4
    return {**kwargs, 'alpha': 4.0}


class Classifier(nn.Module):
    """Our backbone and a linear head, as mmpretrain's classifier has them."""

    def __init__(self, arch: dict[str, Any], num_classes: int) -> None:
        super().__init__()
        self.backbone = AFF(arch, out_type='avg')
        self.head = nn.ModuleDict({'fc': nn.Linear(arch['embed_dims'][-1], num_classes)})

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        return self.head['fc'](self.backbone(image)[0])


class Segmentor(nn.Module):
    """Our backbone, pixel decoder and transformer decoder, as they run in inference: the last prediction counts."""

    def __init__(self, arch: dict[str, Any], num_classes: int, pixel_decoder: dict, transformer_decoder: dict) -> None:
        super().__init__()
        self.backbone = AFF(arch, out_type='points', nbhd_size=official_kwargs(arch, True)['nbhd_size'])
        self.pixel_decoder = PointPixelDecoder(
            arch['embed_dims'],
            feat_channels=pixel_decoder['conv_dim'],
            out_channels=pixel_decoder['mask_dim'],
            num_heads=pixel_decoder['transformer_nheads'],
            num_layers=pixel_decoder['transformer_enc_layers'],
            feedforward_channels=pixel_decoder['transformer_dim_feedforward'],
        )
        self.predictor = PointMaskedDecoder(
            num_classes,
            in_channels=pixel_decoder['conv_dim'],
            embed_dims=transformer_decoder['hidden_dim'],
            out_channels=transformer_decoder['mask_dim'],
            num_queries=transformer_decoder['num_queries'],
            num_layers=transformer_decoder['dec_layers'],
            num_heads=transformer_decoder['nheads'],
            feedforward_channels=transformer_decoder['dim_feedforward'],
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and masks of the last prediction."""
        mask_features, memory, canvas = self.pixel_decoder(self.backbone(image))
        classes, masks = self.predictor(memory, mask_features, canvas, last_only=True)
        return classes[-1], masks[-1]


def classifiers(arch: dict[str, Any], img_size: int, num_classes: int) -> tuple[Classifier, OfficialAFF]:
    """Ours and the baseline, of the same random weights."""
    torch.manual_seed(0)
    official = OfficialAFF(**official_kwargs(arch, False), img_size=img_size, num_classes=num_classes)
    model = Classifier(arch, num_classes)
    model.load_state_dict(convert_aff({'model': official.state_dict()})[0])
    return model, official


def segmentors(arch: dict[str, Any], num_classes: int, settings: dict[str, Any]) -> tuple[Segmentor, OfficialSegmentor]:
    """Ours and the baseline, of the same random weights."""
    torch.manual_seed(0)
    official = OfficialSegmentor(official_kwargs(arch, True), num_classes=num_classes, **settings)
    model = Segmentor(arch, num_classes, **settings)
    model.load_state_dict({key.removeprefix('sem_seg_head.'): value for key, value in official.state_dict().items()})
    return model.eval(), official.eval()


@contextlib.contextmanager
def best_torch() -> Iterator[None]:
    """Reference operators, but for the search for neighbours, which would compare all pairs."""
    search = neighbors._nearest

    @functools.wraps(search)
    def native(*args: Any, **kwargs: Any) -> Any:
        with ops.use_backend('native' if 'native' in ops.available_backends() else 'reference'):
            return search(*args, **kwargs)

    neighbors._nearest = native
    try:
        with ops.use_backend('reference'), bag_attention():
            yield
    finally:
        neighbors._nearest = search


class Gather:
    """A baseline that notes how long it searched for neighbours."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.searched: list[float] = []

    def __call__(self) -> object:
        """Run, and note."""
        before = KNN_TIME.seconds
        result = self.work()
        self.searched.append((KNN_TIME.seconds - before) * 1000)
        return result


def against(
    name: str, case: str, direction: str, ours: Work, gather: Work, model: nn.Module, device: str, repeats: int
) -> Iterator[Record]:
    """One line against each baseline and one for the dense layers, all sides timed in turn."""
    watched = Gather(gather)

    def plain() -> object:
        with best_torch():
            return ours()

    with DenseLayers(model) as dense:
        ours()
    ms, gather_ms, plain_ms, dense_ms = medians([ours, watched, plain, dense.run], device, repeats)
    searched = statistics.median(watched.searched[-repeats:])
    memory, gather_memory, plain_memory = (extra_bytes(work, device) for work in (ours, gather, plain))

    def record(baseline: str, baseline_ms: float, baseline_bytes: int | None) -> Record:
        return Record(
            name, case, device, 'float32', direction, ms, baseline, baseline_ms, memory,
            baseline_extra_bytes=baseline_bytes,
        )  # fmt: skip

    yield record(f'gather, {searched:.0f} ms of kNN not counted', gather_ms - searched, gather_memory)
    yield record('gather with its kNN', gather_ms, gather_memory)
    yield record('best PyTorch', plain_ms, plain_memory)
    yield record('dense layers alone: ratio is their share', dense_ms, None)


def inference(model: nn.Module, image: Tensor) -> Work:
    """A forward pass."""

    def work() -> object:
        with torch.no_grad():
            return model(image)

    return work


def training_step(model: nn.Module, image: Tensor, target: Tensor) -> Work:
    """Forward and backward of a classification loss."""

    def work() -> None:
        F.cross_entropy(model(image), target).backward()
        model.zero_grad(set_to_none=True)  # at the end, so that gradients count as memory of the step

    return work


def classification(variant: str, device: str, quick: bool, repeats: int) -> Iterator[Record]:
    """A classifier: inference, and for the variants of 224 pixels a training step."""
    size = 96 if quick else 384 if variant == 'base_384' else 224
    arch = QUICK if quick else ARCHS[variant]
    model, official = (part.to(device) for part in classifiers(arch, size, 1000))
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    name, case = f'aff_{variant}', f'1x{size}x{size}'
    model.eval(), official.eval()
    yield from against(name, case, 'fwd', inference(model, image), inference(official, image), model, device, repeats)
    if variant == 'base_384':
        return
    target = torch.tensor([3], device=device)
    steps = (training_step(part.train(), image, target) for part in (model, official))
    yield from against(name, case, 'fwdbwd', *steps, model, device, repeats)


def segmentation(variant: str, device: str, quick: bool, repeats: int) -> Iterator[Record]:
    """A segmentor of 150 classes: inference at 512 x 512."""
    size = 96 if quick else 512
    arch = QUICK if quick else ARCHS[variant]
    model, official = (part.to(device) for part in segmentors(arch, 150, SEGMENTATION))
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    works = inference(model, image), inference(official, image)
    yield from against(f'aff_{variant}_seg', f'1x{size}x{size}', 'fwd', *works, model, device, repeats)


def keep_memory() -> None:
    """Let the process keep the memory that it frees: fresh pages would cost more than small results do (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 0)  # M_MMAP_MAX: all from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


@torch.no_grad()
def growth(variant: str, device: str, quick: bool, repeats: int) -> Iterator[Record]:
    """Parts of the first stage and the whole backbone at 512, 1024 and 2048 pixels.

    The baseline of a part is its time at the smallest size times the number of tokens, that of the backbone its time at
    the smallest size times the growth of its dense layers: 1 / ratio is the growth beyond that.
    """
    keep_memory()
    sizes = (64, 128) if quick else (512, 1024, 2048)
    arch = QUICK if quick else ARCHS[variant]
    torch.manual_seed(0)
    model = AFF(arch, out_type='points').eval().to(device)
    first: dict[str, float] = {}
    for size in sizes:
        image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
        works = parts_of_first_stage(model, image)
        works['backbone'] = inference(model, image)
        with DenseLayers(model) as dense:
            works['backbone']()
        works['dense'] = dense.run
        times = dict(zip(works, medians(list(works.values()), device, repeats), strict=True))
        first = first or times
        for part, work in works.items():
            if part == 'dense':
                continue
            grown = times['dense'] / first['dense'] if part == 'backbone' else (size / sizes[0]) ** 2
            what = 'its dense layers' if part == 'backbone' else 'tokens'
            expected = first[part] * grown
            baseline = f'{sizes[0]} px grown as {what} ({grown:.1f}): growth {times[part] / expected:.2f}'
            yield Record(
                f'aff_{variant}_growth', f'{part} {size} px', device, 'float32', 'fwd', times[part], baseline, expected,
                extra_bytes(work, device),
            )  # fmt: skip


def parts_of_first_stage(model: AFF, image: Tensor) -> dict[str, Work]:
    """Clustering, search for neighbours, attention and merging of the first stage of an image, each alone."""
    outputs, canvas = model.forward_stages(image)
    stage, output = model.layers[0], outputs[0]
    pos, nearest, cluster_size = output.neighborhood
    kept, importance = output.kept, output.importance
    shuffled = pos[:, torch.randperm(pos.shape[1], generator=torch.Generator().manual_seed(0))]
    means = ops.space_filling_clusters(pos, cluster_size, canvas).means
    block, merging = stage.blocks[0], stage.downsample
    normed = block.norm1(output.feat)
    works: dict[str, Callable[[], object]] = {
        'kNN': lambda: ops.nearest_clusters(pos, means, nearest.shape[-1], canvas=canvas),
        'kNN of adaptive tokens': lambda: ops.knn_points(pos, outputs[1].neighborhood.pos, 4, canvas=canvas),
        'clustering': lambda: ops.space_filling_clusters(shuffled, cluster_size, canvas),
    }
    attention = block.attn
    width, heads = normed.shape[-1], attention.num_heads
    query, key, value = (torch.randn(1, normed.shape[1], heads, width // heads, device=image.device) for _ in range(3))
    works['fused attention'] = lambda: ops.cluster_attention(
        query, key, value, query_pos=pos, key_pos=pos, nearest=nearest, cluster_size=cluster_size,
        bias_weight=attention.pos_embed.weight, bias=attention.pos_embed.bias,
        blank_key=attention.blank_k.view(heads, -1), blank_value=attention.blank_v.view(heads, -1),
    )  # fmt: skip
    linear, norm = merging.weight_net[:2]
    kept_pos = pos.gather(1, kept[..., None].expand(-1, -1, 2))
    kept_nearest = nearest.gather(1, kept[..., None].expand(-1, -1, nearest.shape[-1]))
    works['merge'] = lambda: ops.point_merge(
        output.feat, query_pos=kept_pos, key_pos=pos, nearest=kept_nearest, cluster_size=cluster_size,
        weight=linear.weight, bias=linear.bias, norm_weight=norm.weight, norm_bias=norm.bias, importance=importance,
    )  # fmt: skip
    return works


def models() -> dict[str, Callable[[str, bool, int], Iterator[Record]]]:
    """What can be timed, by name."""
    variants = ('mini', 'tiny', 'small', 'base_384')
    named = {f'aff_{variant}': functools.partial(classification, variant) for variant in variants}
    named |= {f'aff_{variant}_seg': functools.partial(segmentation, variant) for variant in variants[:3]}
    return {**named, 'aff_mini_growth': functools.partial(growth, 'mini'), 'aff_attention': aff_attention.forms}
