"""Stochastic depth whose draws can be replayed."""

from collections.abc import Callable

from torch import Tensor, nn

KeepDraw = Callable[[Tensor, float], Tensor]


def draw_keep(x: Tensor, keep: float) -> Tensor:
    """Draw for each sample whether its branch is kept.

    Args:
        x: Float tensor ``[B, ...]``; its batch, dtype and device count.
        keep: Chance of 1.

    Returns:
        ``[B]`` of zeros and ones.
    """
    return x.new_empty(x.shape[0]).bernoulli_(keep)


class DropPath(nn.Module):
    """Drop the branch of whole samples in training and scale the others up.

    mmcv's layer of this name, with two differences: samples are drawn by a Bernoulli generator, as in the official
    code of AutoFocusFormer, and the draws come from an attribute that can be replaced.

    Args:
        drop_prob: Chance that a sample's branch is dropped, in [0, 1).

    Attributes:
        draw: Takes the branch and the chance to keep, gives ``[B]`` zeros and ones; see :func:`draw_keep`.

    Raises:
        ValueError: The chance is not in [0, 1).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f'drop_prob must be in [0, 1), got {drop_prob}')
        self.drop_prob = drop_prob
        self.draw: KeepDraw = draw_keep

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of a branch ``[B, ...]``; in evaluation, or with chance 0, it passes as it is."""
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        factors = self.draw(x, keep).to(x) / keep
        return x * factors.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        """What is printed in the parentheses."""
        return f'drop_prob={self.drop_prob:.4g}'
