"""The mask head against plain convolutions."""

import pytest
import torch
import torch.nn.functional as F

from boltz_mm.models.heads.boxer_mask_head import BoxeRMaskHead


def plain(head, rois, labels):
    """All channels by convolutions, of which one is kept."""
    x = rois.permute(0, 3, 1, 2)
    x = F.conv_transpose2d(x, head.upsample.weight, head.upsample.bias, stride=2).relu()
    x = F.conv2d(x, head.conv.weight, head.conv.bias).relu()
    x = F.conv2d(x, head.conv_logits.weight, head.conv_logits.bias)
    return x[torch.arange(len(labels)), labels]


@pytest.mark.parametrize('num_rois', [0, 1, 5])
@pytest.mark.parametrize('size', [14, 3])
def test_equals_convolutions_with_gradients(num_rois, size):
    torch.manual_seed(0)
    head = BoxeRMaskHead(num_classes=7, embed_dims=12).double()
    rois = torch.randn(num_rois, size, size, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (num_rois,))
    leaves = [rois, *head.parameters()]
    cotangent = torch.randn(num_rois, 2 * size, 2 * size, dtype=torch.float64)
    ours = head(rois, labels)
    assert ours.shape == (num_rois, 2 * size, 2 * size)
    gradients = torch.autograd.grad((ours * cotangent).sum(), leaves)
    if num_rois == 0:  # plain convolutions refuse an empty batch of some sizes; the gradients must exist and be zero
        assert not any(g.any() for g in gradients)
        return
    wanted = plain(head, rois, labels)
    torch.testing.assert_close(ours, wanted)
    for got, expected in zip(gradients, torch.autograd.grad((wanted * cotangent).sum(), leaves), strict=True):
        torch.testing.assert_close(got, expected)


def test_logits_are_float32_under_autocast():
    head = BoxeRMaskHead(num_classes=3, embed_dims=8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert head(torch.randn(2, 14, 14, 8), torch.tensor([0, 2])).dtype == torch.float32
