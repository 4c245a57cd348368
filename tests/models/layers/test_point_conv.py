"""The point convolution by hand."""

import torch
import torch.nn.functional as F

from boltz_mm.models.layers.point_conv import PointConv
from boltz_mm.ops import offset_features


def test_one_token_by_hand() -> None:
    torch.manual_seed(0)
    conv = PointConv(6, 5).double()
    pos = torch.randint(0, 1200, (1, 8, 2)).double()  # offsets beyond the clamp of 511 among them
    feat, index = torch.randn(1, 8, 6, dtype=torch.float64), torch.randint(0, 8, (1, 8, 3))
    assert ((pos[0, :, None] - pos[0, index[0]]).abs() > 511).any()
    with torch.no_grad():
        out = conv(feat, pos, index)
        for i in range(8):
            near = index[0, i]
            offset = (pos[0, i] - pos[0, near]).clamp(-511, 511)  # query minus neighbour
            weights = F.gelu(conv.weight_net[1](conv.weight_net[0](offset_features(offset))))
            merged = torch.einsum('ki,kc->ic', weights, feat[0, near]).flatten()
            torch.testing.assert_close(out[0, i], conv.linear(conv.norm(merged)))
