"""The baselines of the operator benchmark compute what the operators compute, on the golden cases of the operators."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from boltz_mm import ops
from tests.parity.case import Case
from tests.parity.compare import mismatch
from tools.benchmark.baselines import grid_attention as plain

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'data' / 'parity' / 'boxer'


@pytest.mark.parametrize('folder', sorted(GOLDEN.glob('op_*')), ids=lambda folder: folder.name)
def test_golden_cases(folder: Path) -> None:
    case = Case(folder)
    inputs = case.inputs
    sizes = [tuple(size) for size in inputs['spatial_shapes'].tolist()]
    names = ['value', 'sampling_locations']
    names += [name for name in inputs if name.endswith('attention_weights')]
    leaves = [inputs[name].requires_grad_() for name in names]
    value, locations, *weights = leaves
    weights = [weight.flatten(4) for weight in weights]
    if case.kind == 'op_box_attn':
        outputs = {'output': plain.deform_attention(value, sizes, locations, *weights)}
    else:
        by_name = dict(zip(names[2:], weights, strict=True))
        spatial, level = by_name['spatial_attention_weights'], by_name['level_attention_weights']
        output, masks = plain.instance_attention_at(value, sizes, locations, spatial, level)
        outputs = {'output': output, 'mask_output': masks.view_as(inputs['cotangent_mask_output'])}
    cotangents = [inputs[f'cotangent_{name}'] for name in outputs]
    grads = torch.autograd.grad(list(outputs.values()), leaves, cotangents)
    produced = {f'out.{name}': output for name, output in outputs.items()}
    produced |= {f'grad.{name}': grad for name, grad in zip(names, grads, strict=True)}
    assert set(produced) == set(case.check)
    for name, ours in produced.items():
        assert mismatch(ours, case.stored[name], case.check[name]) is None, name


@pytest.mark.parametrize('valid', [True, False])
def test_boxes_and_logits(valid: bool) -> None:
    """What the baselines do before they sample equals what the operators do inside."""
    torch.manual_seed(0)
    sizes, points = ((5, 7), (3, 4)), ops.grid_points(4, dtype=torch.float64)
    value = torch.randn(2, 47, 3, 5, dtype=torch.float64)
    boxes = torch.rand(2, 6, 3, 2, 4, dtype=torch.float64) - 0.1
    ratios = torch.rand(2, 2, 2, dtype=torch.float64) if valid else None
    logits = torch.randn(2, 6, 3, 2, 16, dtype=torch.float64)
    assert_close(
        plain.box_attention(value, sizes, boxes, logits, points, ratios),
        ops.box_attention(value, sizes, boxes, logits, points, valid_ratios=ratios),
    )
    quadrants = torch.randn(2, 6, 3, 2, 2, 2, dtype=torch.float64)
    ours = ops.instance_attention(value, sizes, boxes, quadrants, points, valid_ratios=ratios)
    for a, b in zip(plain.instance_attention(value, sizes, boxes, quadrants, points, ratios), ours, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize('op', ['box_attention', 'instance_attention', 'deform_attention'])
def test_quick_run_as_json(op: str) -> None:
    done = subprocess.run(
        [sys.executable, 'tools/benchmark/ops.py', '--op', op, '--json', '--quick'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line['direction'] for line in lines} == {'fwd', 'fwdbwd'}
    assert {line['dtype'] for line in lines} == {'float32', 'bfloat16'}
    for line in lines:
        assert list(line) == [
            'op', 'case', 'device', 'dtype', 'direction', 'ms', 'baseline', 'baseline_ms', 'extra_bytes', 'threads',
            'ratio',
        ]  # fmt: skip
        assert line['op'] == op
        assert line['device'] == 'cpu'
        assert line['ratio'] == pytest.approx(line['baseline_ms'] / line['ms'], rel=1e-3)
        assert line['extra_bytes'] > 0
    if op == 'box_attention':
        assert {line['case'].split()[-1] for line in lines} == {'local', 'random'}
