#!/usr/bin/env bash
# Build, test and time the operators on a machine that has a CUDA device, nvcc, a C++ compiler and PyTorch (built for
# CUDA) with pytest; the OpenMMLab stack is not needed.  Usage, anywhere:
#
#   bash tools/benchmark/device_check.sh [arguments of tools/benchmark/ops.py]
#
# PYTHON chooses the interpreter.  Ends with an error if the library does not build or a test fails.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}

"$python" - <<'PROGRAM'
import torch

if not torch.cuda.is_available():
    raise SystemExit(f'PyTorch {torch.__version__} finds no CUDA device')
device = torch.cuda.get_device_properties(0)
print(f'PyTorch {torch.__version__}, {device.name}, compute capability {device.major}.{device.minor}, '
      f'{device.total_memory / 2**30:.0f} GiB')
PROGRAM

BOLTZ_MM_CUDA=1 "$python" setup.py -q build_ext --inplace
"$python" -c 'from boltz_mm.ops import _backend; assert "cuda" in _backend._loaded_devices, _backend._load_errors'
"$python" -m pytest -q -p no:cacheprovider tests/ops/test_cuda.py tests/ops/test_cuda_points.py \
  tests/ops/test_cuda_cluster_attention.py
"$python" tools/benchmark/ops.py --device cuda "$@"
