"""BoxeR-2D as an mmdet detector, on tiny models."""

import copy

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

import boltz_mm.models.detectors.boxer as boxer_module
from boltz_mm.models.detectors.boxer import level_masks
from boltz_mm.registry import MODELS

LAYER = dict(embed_dims=32, num_heads=4, num_levels=4, feedforward_channels=48)
VARIANTS = {'boxes': (False, 'v1'), 'masks-v1': (True, 'v1'), 'masks-v2': (True, 'v2')}


def tiny_config(with_mask=True, residual_mode='v1', num_queries=12, num_classes=5, layers=2):
    return dict(
        type='boltz_mm.BoxeR',
        num_queries=num_queries,
        data_preprocessor=dict(type='mmdet.DetDataPreprocessor', mean=[0, 0, 0], std=[1, 1, 1]),
        backbone=dict(
            type='mmdet.ResNet',
            depth=18,
            base_channels=8,
            stem_channels=8,
            out_indices=(1, 2, 3),
            norm_cfg=dict(type='BN', requires_grad=False),
            norm_eval=True,
        ),
        neck=dict(type='boltz_mm.BoxeRNeck', in_channels=[16, 32, 64], out_channels=32, num_outs=4),
        positional_encoding=dict(embed_dims=32, ref_size=4),
        encoder=dict(num_layers=1, layer_cfg=LAYER),
        decoder=dict(num_layers=layers, layer_cfg=dict(LAYER, with_mask=with_mask, residual_mode=residual_mode)),
        bbox_head=dict(type='boltz_mm.BoxeRHead', num_classes=num_classes, embed_dims=32, with_mask=with_mask),
    )


def build(variant='masks-v1', **kwargs):
    """A tiny model with nothing left at its initial 0 or 1."""
    torch.manual_seed(0)
    model = MODELS.build(tiny_config(*VARIANTS[variant], **kwargs))
    model.init_weights()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith('backbone'):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def make_batch(sizes=((64, 96), (64, 96)), num_objects=(3, 2), num_classes=5, with_masks=True):
    generator = torch.Generator().manual_seed(2)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    images = torch.zeros(len(sizes), 3, height, width)
    samples = []
    for image, (h, w), count in zip(images, sizes, num_objects, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w, generator=generator)
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
        gt = InstanceData(labels=torch.randint(num_classes, (count,), generator=generator))
        gt.bboxes = corners * torch.tensor([w, h, w, h])
        if with_masks:
            gt.masks = torch.rand(count, height, width, generator=generator) > 0.5
        meta = dict(
            batch_input_shape=(height, width), img_shape=(h, w), ori_shape=(h * 2, w * 2), scale_factor=(0.5, 0.5)
        )
        samples.append(DetDataSample(metainfo=meta, gt_instances=gt))
    return images, samples


def total(losses):
    return sum(value for name, value in losses.items() if 'loss' in name)


# ----------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize('num_objects', [(3, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_parameter_gets_a_finite_gradient(variant, num_objects):
    """Also without any object, so that distributed training needs no search for unused parameters."""
    model = build(variant).train()
    images, samples = make_batch(num_objects=num_objects)
    losses = model(images, samples, mode='loss')
    total(losses).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('sizes', [((64, 96), (64, 96)), ((64, 96), (50, 70))])
@pytest.mark.parametrize('variant', ['masks-v1', 'masks-v2'])
def test_masks_of_matched_queries_give_the_losses_and_gradients_of_all_masks(variant, sizes):
    model = build(variant).double().train()
    images, samples = make_batch(sizes)
    images = images.double()

    ours = model.loss(images, samples)
    total(ours).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    model.zero_grad()
    outs = model.forward_all(images, samples)  # the official way: all masks of all layers, all boxes of all tokens
    joint = model.bbox_head.loss_by_feat(
        outs.cls_scores,
        outs.bbox_preds,
        outs.enc_cls_scores,
        outs.enc_bbox_preds,
        [s.gt_instances for s in samples],
        [s.metainfo for s in samples],
        mask_logits=lambda layer, rows: torch.cat([outs.mask_logits[layer, b, r] for b, r in enumerate(rows)]),
    )
    total(joint).backward()
    torch.testing.assert_close(ours, joint)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_num_boxes_over_accumulated_batches():
    model = build().double().train()
    images, samples = make_batch(num_objects=(3, 1))
    images = images.double()
    whole = total(model.loss(images, samples))
    parts = sum(total(model.loss(images[b : b + 1], samples[b : b + 1], num_boxes=4.0)) for b in range(2))
    torch.testing.assert_close(parts, whole)


def test_bfloat16_autocast():
    model = build().train()
    images, samples = make_batch()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model.loss(images, samples)
    total(losses).backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    # Autocast keeps casted weights: one cast without gradients, for the first stage, must not be used for the loss.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(p.grad.any() for p in model.bbox_head.enc_reg_branch.parameters())
    model.eval()
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        result = model.predict(images, samples)[0].pred_instances
    assert result.scores.isfinite().all()


def test_train_step_of_mmengine():
    from mmengine.optim import OptimWrapper

    model = build().train()
    images, samples = make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = {'inputs': list(images), 'data_samples': samples}
    logged = [model.train_step(copy.deepcopy(data), OptimWrapper(optimizer)) for _ in range(8)]
    assert logged[-1]['loss'] < logged[0]['loss']
    assert 0 <= logged[0]['accuracy'] <= 100


# ---------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize('variant', VARIANTS)
def test_predict_equals_results_from_all_outputs(variant):
    model = build(variant).eval()
    images, samples = make_batch(((64, 96), (50, 70)))
    with torch.no_grad():
        outs = model.forward_all(images, samples)
        masks = outs.mask_logits
        wanted = model.bbox_head.predict_by_feat(
            outs.cls_scores[-1],
            outs.bbox_preds[-1],
            [s.metainfo for s in samples],
            mask_logits=(lambda _, rows: torch.cat([masks[-1, b, r] for b, r in enumerate(rows)]))
            if model.with_mask
            else None,
            rescale=True,
        )
        results = model(images, samples, mode='predict')
    for sample, expected in zip(results, wanted, strict=True):
        result = sample.pred_instances
        assert len(result) == 12 * 5
        assert ('masks' in result) == model.with_mask
        torch.testing.assert_close(result.scores, expected.scores)
        torch.testing.assert_close(result.bboxes, expected.bboxes)
        assert torch.equal(result.labels, expected.labels)
        if model.with_mask:
            assert result.masks.shape == (60, *sample.ori_shape)
            assert (result.masks != expected.masks).float().mean() < 1e-4


def test_an_image_alone_gives_the_results_of_the_batch_without_padding():
    model = build().eval()
    images, samples = make_batch()
    with torch.no_grad():
        together = model.predict(images, copy.deepcopy(samples))[1].pred_instances
        alone = model.predict(images[1:], samples[1:])[0].pred_instances
    torch.testing.assert_close(alone.scores, together.scores)
    torch.testing.assert_close(alone.bboxes, together.bboxes, rtol=1e-4, atol=1e-3)


def test_without_padding_no_mask_is_built_and_the_numbers_are_those_with_one(monkeypatch):
    model = build().eval()
    images, samples = make_batch()
    shapes = [(8, 12), (4, 6), (2, 3), (1, 2)]
    assert level_masks(shapes, samples, images.device) is None
    with torch.no_grad():
        without = model.forward_all(images, samples)
        masks = [torch.zeros(2, *shape, dtype=torch.bool) for shape in shapes]
        monkeypatch.setattr(boxer_module, 'level_masks', lambda *args: masks)
        with_masks = model.forward_all(images, samples)
        none = model.forward_all(images)
    for ours, wanted, other in zip(without, with_masks, none, strict=True):
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(ours, other)


def test_level_masks_follow_the_nearest_input_pixel():
    _, samples = make_batch(((64, 96), (33, 70)))
    fine, coarse = level_masks([(8, 12), (2, 3)], samples, torch.device('cpu'))
    assert not fine[0].any()
    assert (~fine[1]).any(dim=0).sum() == 9  # pixel columns 0, 8, .., 64 of 70
    assert (~fine[1]).any(dim=1).sum() == 5  # pixel rows 0, 8, .., 32 of 33
    assert coarse[1].tolist() == [[False, False, False], [False, False, False]]


def test_padding_content_does_not_reach_the_results():
    model = build().eval()
    _, samples = make_batch(((64, 96), (50, 70)))
    feats = [torch.randn(2, 32, h, w) for h, w in ((8, 12), (4, 6), (2, 3), (1, 2))]
    masks = level_masks([tuple(f.shape[-2:]) for f in feats], samples, torch.device('cpu'))
    changed = [f + 100 * m[:, None] for f, m in zip(feats, masks, strict=True)]
    with torch.no_grad():
        first = model.forward_transformer(tuple(feats), samples)['hidden_states']
        second = model.forward_transformer(tuple(changed), samples)['hidden_states']
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize('variant', VARIANTS)
def test_tensor_mode_gives_the_last_layer(variant):
    model = build(variant).eval()
    images, samples = make_batch()
    with torch.no_grad():
        raw = model(images, samples)
        outs = model.forward_all(images, samples)
    wanted = [outs.cls_scores[-1], outs.bbox_preds[-1]] + ([outs.mask_logits[-1]] if model.with_mask else [])
    assert len(raw) == len(wanted)
    for got, expected in zip(raw, wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_fewer_tokens_than_queries():
    model = build(num_queries=500).eval()
    images, samples = make_batch()
    with torch.no_grad():
        assert model.forward_all(images, samples).topk_indexes.shape == (2, 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2)


# -------------------------------------------------------------------------------------------------- construction


def test_head_and_decoder_must_agree_on_masks():
    config = tiny_config()
    config['decoder']['layer_cfg'] = dict(LAYER)
    with pytest.raises(ValueError, match='needs with_mask=True'):
        MODELS.build(config)


def test_building_leaves_the_config_as_it_is():
    config = tiny_config()
    before = copy.deepcopy(config)
    MODELS.build(config)
    assert config == before


def test_initial_weights():
    torch.manual_seed(0)
    model = MODELS.build(tiny_config())
    model.init_weights()
    attention = model.decoder.layers[0].multihead_attn
    assert not attention.linear_box_weight.any()
    assert not attention.linear_attn_weight.any()
    assert ((attention.linear_box_bias >= 0) & (attention.linear_box_bias < 1)).all()
    assert attention.linear_box_bias.std() > 0.1
    for conv in (model.neck.convs[0].conv, model.neck.extra_convs[0].conv):
        bound = (6 / (conv.weight[0].numel() + conv.weight[:, 0].numel())) ** 0.5  # Xavier uniform
        assert conv.weight.abs().max() <= bound
        assert conv.weight.abs().max() > 0.9 * bound
        assert not conv.bias.any()


PARAMETERS = {
    'boxer_r50': 39_718_948,
    'boxer_r101': 58_658_852,
    'boxer_r50_mask': 40_070_527,
    'boxer_r101_mask': 59_010_431,
}


@pytest.mark.parametrize(('name', 'count'), PARAMETERS.items())
def test_number_of_parameters(name, count):
    """As counted on the official model with 91 classes, whose frozen norms hold no parameters."""
    depth, with_mask = (101 if '101' in name else 50), 'mask' in name
    layer = dict(embed_dims=256, num_heads=8, num_levels=4, feedforward_channels=1024)
    config = tiny_config(with_mask, num_queries=300, num_classes=91)
    config['backbone'] = dict(
        type='mmdet.ResNet',
        depth=depth,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
    )
    config['neck'] = dict(type='boltz_mm.BoxeRNeck', in_channels=[512, 1024, 2048], out_channels=256, num_outs=4)
    config['positional_encoding'] = dict(embed_dims=256)
    config['encoder'] = dict(num_layers=6, layer_cfg=layer)
    config['decoder'] = dict(num_layers=6, layer_cfg=dict(layer, with_mask=with_mask))
    config['bbox_head'] = dict(type='boltz_mm.BoxeRHead', num_classes=91, embed_dims=256, with_mask=with_mask)
    with torch.device('meta'):
        model = MODELS.build(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_five_levels():
    config = tiny_config()
    config['neck']['num_outs'] = 5
    for part in ('encoder', 'decoder'):
        config[part]['layer_cfg'] = dict(config[part]['layer_cfg'], num_levels=5)
    model = MODELS.build(config)
    images, samples = make_batch()
    features = model.backbone(images)
    levels = model.neck(features)
    assert [tuple(level.shape[-2:]) for level in levels] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    extra = model.neck.extra_convs
    torch.testing.assert_close(levels[3], extra[0](features[-1]))
    torch.testing.assert_close(levels[4], extra[1](levels[3].relu()))
    assert total(model.loss(images, samples)).isfinite()


def test_neck_names_a_wrong_number_of_features():
    model = build()
    with pytest.raises(ValueError, match='expected 3 features, got 1'):
        model.neck((torch.zeros(1, 16, 4, 4),))


def test_builds_from_a_config_of_another_scope():
    """With mmdet as default scope, types of mmdet need no prefix."""
    config = Config(tiny_config())
    config.backbone.type, config.data_preprocessor.type = 'ResNet', 'DetDataPreprocessor'
    config.bbox_head.loss_bbox = dict(type='L1Loss', loss_weight=5.0)
    config.train_cfg = dict(
        assigner=dict(type='boltz_mm.ReducedHungarianAssigner', match_costs=[dict(type='FocalLossCost', weight=2.0)])
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config)
    assert len(model.bbox_head.assigner.match_costs) == 1
