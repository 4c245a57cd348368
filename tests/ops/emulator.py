"""The CUDA kernels on the CPU (``cuda_emulator.cpp``), called with PyTorch tensors."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name('cuda_emulator.cpp')
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
MODES = {'points': 0, 'box': 1, 'instance': 2}
_INTEGERS_BEFORE_SHAPES = ('batch', 'cells', 'heads', 'depth', 'levels', 'queries', 'points', 'grid_size')
_STRIDES = ('value_batch_stride', 'value_cell_stride', 'value_head_stride')
_POINTERS = ('boxes', 'logits', 'grid', 'ratios', 'angles', 'locations', 'weights', 'output', 'mask_output')
_GRADIENTS = ('grad_output', 'grad_mask_output', 'grad_value', 'grad_boxes', 'grad_logits', 'grad_angles',
              'grad_locations', 'grad_weights')  # fmt: skip


class GridProblem(ctypes.Structure):
    """``boltz_mm::cuda::GridProblem`` of ``ops/cuda/grid_attention.h``, field by field."""

    _fields_ = [
        ('mode', ctypes.c_int),
        *((name, ctypes.c_int64) for name in _INTEGERS_BEFORE_SHAPES),
        ('shapes', ctypes.c_void_p),
        ('value', ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_GRADIENTS)),
    ]


@dataclass(frozen=True)
class Plan:
    vector: int
    lanes: int
    slices: int
    rows: int
    blocks: int


def compiler() -> list[str]:
    """The C++ compiler, as PyTorch chooses it for extensions."""
    return (os.environ.get('CXX') or shutil.which('g++') or 'c++').split()


def build(folder: Path) -> ctypes.CDLL:
    """Compile the emulator into ``folder`` with the C++ compiler."""
    library = folder / 'cuda_emulator.so'
    flags = ['-std=c++17', '-O2', '-Wall', '-Wextra', '-Werror', '-Wno-maybe-uninitialized', '-fPIC', '-shared']
    subprocess.run([*compiler(), *flags, str(SOURCE), '-o', str(library)], check=True)
    return ctypes.CDLL(str(library))


@dataclass
class Call:
    """Tensors of one operator call; those not used by its mode stay ``None``."""

    mode: str
    value: Tensor
    shapes: Sequence[tuple[int, int]]
    boxes: Tensor | None = None
    logits: Tensor | None = None
    grid: Tensor | None = None
    ratios: Tensor | None = None
    angles: Tensor | None = None
    locations: Tensor | None = None
    weights: Tensor | None = None

    def forward(self, library: ctypes.CDLL, *, mask: bool = False, slices: int = 0) -> tuple[Tensor, Tensor, Plan]:
        batch, _, heads, depth = self.value.shape
        queries, points = self._queries(), self._points()
        # NaN where a kernel should have written shows in every comparison.
        output = self.value.new_full((batch, queries, heads * depth), float('nan'))
        masks = self.value.new_full((batch, queries, points if mask else 0, heads * depth), float('nan'))
        outputs = {'output': output} | ({'mask_output': masks} if mask else {})
        plan = self._run(library, outputs, backward=False, slices=slices)
        return output, masks, plan

    def backward(
        self,
        library: ctypes.CDLL,
        grad: Tensor,
        mask_grad: Tensor | None = None,
        *,
        slices: int = 0,
        value: bool = True,
    ) -> tuple[dict[str, Tensor], Plan]:
        compute = torch.float64 if self.value.dtype == torch.float64 else torch.float32
        inputs = {name: getattr(self, name) for name in ('boxes', 'logits', 'angles', 'locations', 'weights')}
        grads = {name: torch.full_like(x, float('nan')) for name, x in inputs.items() if x is not None}
        if value:
            grads['value'] = torch.zeros(self.value.shape, dtype=compute)
        outputs = {f'grad_{name}': x for name, x in grads.items()} | {'grad_output': grad.contiguous()}
        if mask_grad is not None:
            outputs['grad_mask_output'] = mask_grad.contiguous()
        plan = self._run(library, outputs, backward=True, slices=slices)
        return grads, plan

    def _queries(self) -> int:
        return (self.locations if self.mode == 'points' else self.boxes).shape[1]

    def _points(self) -> int:
        return self.locations.shape[4] if self.mode == 'points' else self.grid.shape[0]

    def _run(self, library: ctypes.CDLL, outputs: dict[str, Tensor], *, backward: bool, slices: int) -> Plan:
        batch, cells, heads, depth = self.value.shape
        points = self._points()
        levels = torch.tensor(self.shapes, dtype=torch.int64).reshape(-1, 2)
        numbers = (batch, cells, heads, depth, len(levels), self._queries(), points, round(points**0.5))
        problem = GridProblem(mode=MODES[self.mode], **dict(zip(_INTEGERS_BEFORE_SHAPES, numbers, strict=True)))
        problem.shapes, problem.value = levels.data_ptr(), self.value.data_ptr()
        for name, stride in zip(_STRIDES, self.value.stride(), strict=False):
            setattr(problem, name, stride)
        inputs = {name: getattr(self, name, None) for name in _POINTERS if getattr(self, name, None) is not None}
        kept = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in (kept | outputs).items():
            assert tensor.is_contiguous()
            setattr(problem, name, tensor.data_ptr())
        plan = (ctypes.c_int64 * 5)()
        type_index = TYPES[self.value.dtype]
        assert library.emulate_grid(ctypes.byref(problem), type_index, int(backward), slices, plan) == 0
        return Plan(*plan)
