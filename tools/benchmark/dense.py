"""The dense layers of a model alone: what no faster operator can take away.

A run of the model is recorded below autograd; its matrix products with weights, convolutions, norms and activations
are then run again on tensors of the same shapes and strides, and nothing else.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_DENSE = (
    'addmm', 'mm', 'linear', 'convolution', 'convolution_backward', 'mkldnn_convolution', 'native_layer_norm',
    'native_layer_norm_backward', 'native_batch_norm', 'native_batch_norm_backward',
    '_native_batch_norm_legit_no_training', '_native_batch_norm_legit', '_batch_norm_with_update',
    '_batch_norm_no_update', 'batch_norm_backward', 'gelu', 'gelu_backward', 'relu',
)  # fmt: skip


_OFFSET_FEATURES, _INNER_CHANNELS = 5, 4


def _of_operators(tensors: list[Tensor]) -> bool:
    """Whether a call belongs to the PyTorch reference of our operators, which has linear maps and norms inside.

    They are those of the features of offsets, and of the few inner channels of a merge; the native kernels call none.
    """
    return any(_OFFSET_FEATURES in tensor.shape[-2:] for tensor in tensors) or tensors[0].shape[-1] == _INNER_CHANNELS


class DenseLayers(TorchDispatchMode):
    """Records dense layers while it is entered; :meth:`run` repeats them.

    Activations of one shape share a tensor, so that they are found in the cache as they are in the model; weights are
    the model's own.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._weights = {parameter.data_ptr() for parameter in model.parameters()}
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        # An activation in place would act on its own result when it is run again.
        again = torch.ops.aten.gelu.default if func is torch.ops.aten.gelu_.default else func
        if again._schema.name.removeprefix('aten::') in _DENSE and not _of_operators(tensors):
            self.calls.append((again, *tree_map_only(Tensor, self._stand_in, (args, kwargs))))
        return func(*args, **kwargs)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if tensor.data_ptr() in self._weights:
            return tensor.detach()
        key = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._buffers:
            self._buffers[key] = tensor.detach().clone(memory_format=torch.preserve_format)
        return self._buffers[key]

    @torch.no_grad()
    def run(self) -> None:
        """Repeat what was recorded."""
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)
