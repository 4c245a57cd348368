"""AutoFocusFormer's backbone: attention, blocks, merging, stages, whole classifiers, levels for segmentation, keys."""

from collections.abc import Callable

import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn
from torch.nn import functional as F

import boltz_mm.models  # noqa: F401  registers
from boltz_mm.converters.aff import convert_aff, export_aff, our_classifier_key
from boltz_mm.models.backbones.aff import AFF
from boltz_mm.models.layers.cluster_attention import ClusterAttention, ClusterBlock, Neighborhood
from boltz_mm.models.layers.cluster_merging import ClusterMerging, grid_prior, is_multiple
from boltz_mm.models.layers.cluster_stage import ClusterStage, PatchEmbed, grid_positions
from boltz_mm.models.layers.drop_path import DropPath
from tests.parity.case import Case, Produced
from tests.parity.registry import handler


def _load(module: nn.Module, case: Case) -> nn.Module:
    """Weights of a part, whose parameters have the official names."""
    weights = case.weights()['model']
    module.to(next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point()))
    module.load_state_dict(weights)
    return module.train(case.meta.get('mode') == 'train')


def _gradients(module: nn.Module, rename: Callable[[str], str] = str) -> Produced:
    parameters = module.named_parameters()
    return {f'grad.param.{rename(name)}': p.grad for name, p in parameters if p.grad is not None}


def _neighborhood(case: Case) -> Neighborhood:
    """Clusters from the stored member lists, which name every slot; checked against the slots that we would read."""
    pos, size = case.inputs['pos'], case.kwargs['cluster_size']
    members = case.inputs.get('member_idx')
    if members is None or case.kwargs.get('global_attn'):
        return Neighborhood(pos)
    nearest = members[..., ::size] // size
    slots = (nearest.unsqueeze(-1) * size + torch.arange(size)).flatten(2)
    if not torch.equal(torch.where(slots < pos.shape[1], slots, 0), members.to(slots.dtype)):
        raise ValueError('the members of the case are not runs of consecutive tokens')
    return Neighborhood(pos, nearest, size)


def _sorted(pos: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Rows of ``[B, N, ...]`` by (y, x)."""
    order = (pos[..., 1] * (pos[..., 0].max() + 1) + pos[..., 0]).argsort(dim=1)
    return tuple(v.gather(1, order.unsqueeze(-1).expand(-1, -1, v.shape[-1])) for v in (pos, *values))


@handler('aff', 'cluster_attention', 'block')
def attention(case: Case) -> Produced:
    kwargs = case.kwargs
    if case.kind == 'block':
        module: nn.Module = ClusterBlock(kwargs['dim'], kwargs['num_heads'], kwargs['mlp_ratio'], kwargs['layer_scale'])
    else:
        module = ClusterAttention(kwargs['dim'], kwargs['num_heads'])
    _load(module, case)
    feat = case.inputs['feat'].clone().requires_grad_()
    out = module(feat, _neighborhood(case))
    out.backward(case.inputs['cotangent_out'])
    return {'out.out': out, 'grad.feat': feat.grad} | _gradients(module)


@handler('aff', 'merging')
def merging(case: Case) -> Produced:
    kwargs, inputs = case.kwargs, case.inputs
    module = ClusterMerging(
        kwargs['dim'], kwargs['out_dim'], kwargs['ds_rate'], kwargs['alpha'], reserve=kwargs['reserve_on']
    )
    _load(module, case)
    feat, pos, stride = inputs['feat'].clone().requires_grad_(), inputs['pos'], kwargs['stride']
    canvas = kwargs['h'], kwargs['w']
    learned = inputs['learned_prob'].clone().requires_grad_() if 'learned_prob' in inputs else None
    importance = None if learned is None else learned.squeeze(-1)
    kept = module.select(pos, importance, canvas, stride)
    new_pos, out = _sorted(*module(feat, _neighborhood(case), kept, importance))
    out.backward(inputs['cotangent_out'])
    reserved = is_multiple(pos, 2 * stride) if kwargs['reserve_on'] else None
    score = module.score(grid_prior(pos, stride, canvas), importance, reserved)
    produced = {'out.pos': new_pos, 'out.feat': out, 'out.score': score, 'grad.feat': feat.grad}
    if learned is not None:
        produced['grad.learned_prob'] = learned.grad
    return produced | _gradients(module)


@handler('aff', 'stage')
def stage(case: Case) -> Produced:
    kwargs = case.kwargs
    module = ClusterStage(
        kwargs['dim'],
        kwargs['depth'],
        kwargs['num_heads'],
        cluster_size=kwargs['cluster_size'],
        nbhd_size=kwargs['nbhd_size'],
        mlp_ratio=kwargs['mlp_ratio'],
        layer_scale=kwargs['layer_scale'],
        out_channels=kwargs['out_dim'] if kwargs['downsample'] else None,
        ds_rate=kwargs['ds_rate'],
        **{name: kwargs[name] for name in ('alpha',) if name in kwargs},
    )
    _load(module, case)
    feat = case.inputs['feat'].clone().requires_grad_()
    out = module(case.inputs['pos'], feat, (kwargs['h'], kwargs['w']), kwargs['stride'])
    pos, features = _sorted(out.next_pos, out.next_feat)
    features.backward(case.inputs['cotangent_out'])
    return {'out.pos': pos, 'out.feat': features, 'grad.feat': feat.grad} | _gradients(module)


@handler('aff', 'patch_embed_cls', 'patch_embed_seg')
def patch_embed(case: Case) -> Produced:
    kwargs = case.kwargs
    module = PatchEmbed(
        kwargs['in_chans'], kwargs['embed_dim'], kwargs['patch_norm'], pad_to_stride=case.kind == 'patch_embed_seg'
    )
    _load(module, case)
    image = case.inputs['img'].clone().requires_grad_()
    out = module(image)
    out.backward(case.inputs['cotangent_out'])
    shape = module.grid_shape(image)
    return {
        'out.pos': grid_positions(shape).expand(len(image), -1, -1),
        'out.feat': out,
        'out.hw': torch.tensor(shape),
        'out.bn_running_mean': module.bn.running_mean,
        'out.bn_running_var': module.bn.running_var,
        'grad.img': image.grad,
    } | _gradients(module)


def backbone_config(kwargs: dict, out_type: str) -> dict:
    """Our backbone for the arguments of the official one."""
    return {
        'type': 'boltz_mm.AFF',
        'out_type': out_type,
        'arch': {
            'embed_dims': kwargs['embed_dim'],
            'depths': kwargs['depths'],
            'num_heads': kwargs['num_heads'],
            'mlp_ratio': kwargs['mlp_ratio'],
        },
        **{name: kwargs[name] for name in ('cluster_size', 'nbhd_size', 'ds_rate', 'layer_scale', 'alpha')},
        'drop_path_rate': kwargs['drop_path_rate'],
        'reserve': kwargs.get('reserve_on', True),
        'patch_norm': kwargs.get('patch_norm', True),
    }


def _classifier(kwargs: dict) -> nn.Module:
    return MMENGINE_MODELS.build({
        'type': 'mmpretrain.ImageClassifier',
        'backbone': backbone_config(kwargs, 'avg'),
        'head': {
            'type': 'mmpretrain.LinearClsHead',
            'num_classes': kwargs['num_classes'],
            'in_channels': kwargs['embed_dim'][-1],
        },
    })  # fmt: skip


def _loaded_classifier(case: Case) -> nn.Module:
    model = _classifier(case.kwargs)
    state, report = convert_aff(case.weights(), model)
    if not report.complete:
        raise ValueError(str(report))
    model.load_state_dict(state)
    return model.to(case.inputs['img'].dtype).train(case.meta.get('mode') == 'train')


@handler('aff', 'classifier_eval')
@torch.no_grad()
def classifier_eval(case: Case) -> Produced:
    model = _loaded_classifier(case)
    produced = {'out.logits': model(case.inputs['img'])}
    for i, out in enumerate(model.backbone.forward_stages(case.inputs['img'])[0], 1):
        produced[f'out.stage{i}_pos'], produced[f'out.stage{i}_feat'] = _sorted(out.next_pos, out.next_feat)
    return produced


@handler('aff', 'classifier_train')
def classifier_train(case: Case) -> Produced:
    model = _loaded_classifier(case)
    draws = iter(case.rand.values())
    for module in model.modules():
        if isinstance(module, DropPath):
            module.draw = lambda x, keep: next(draws)
    logits = model(case.inputs['img'])
    if (left := sum(1 for _ in draws)) > 0:
        raise ValueError(f'{left} of the recorded draws were not taken')
    loss = F.cross_entropy(logits, case.inputs['target'], label_smoothing=0.1)
    loss.backward()
    names = {our_classifier_key(name): name for name in case.weights()['model']}
    norm = model.backbone.patch_embed.bn
    return {
        'out.logits': logits,
        'out.loss': loss,
        'out.bn_running_mean': norm.running_mean,
        'out.bn_running_var': norm.running_var,
    } | _gradients(model, names.__getitem__)


@handler('aff', 'seg_backbone')
def seg_backbone(case: Case) -> Produced:
    model = AFF(**{k: v for k, v in backbone_config(case.kwargs, 'points').items() if k != 'type'})
    _load(model, case)
    levels = model(case.inputs['img'])
    produced, total = {}, torch.zeros(())
    for i, level in enumerate(levels, 2):
        pos, feat = _sorted(level.pos, level.feat)
        produced |= {f'out.res{i}_pos': pos, f'out.res{i}': feat, 'out.spatial_shape': torch.tensor(level.shape)}
        total = total + (feat * case.inputs[f'cotangent_res{i}']).sum()
    total.backward()
    return produced | _gradients(model)


@handler('aff', 'keys_cls')
def keys_cls(case: Case) -> Produced:
    """Every key in its order with its shape, both ways; and the number of trainable parameters."""
    shapes = {key: tuple(shape) for key, shape in case.meta['state_dict'].items()}
    with torch.device('meta'):
        model = _classifier(case.kwargs)
        official = {key: torch.empty(shape) for key, shape in shapes.items()}
    report = convert_aff({'model': official}, model)[1]
    if not report.complete:
        raise ValueError(str(report))
    exported = {key: tuple(value.shape) for key, value in export_aff(model.state_dict()).items()}
    if list(exported.items()) != list(shapes.items()):
        raise ValueError('the way back does not give the official keys in their order')
    return {'out.num_parameters': sum(p.numel() for p in model.parameters() if p.requires_grad)}
