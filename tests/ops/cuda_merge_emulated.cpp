// The CUDA operators of ops/cuda/point_merge.cpp as operators of the CPU: what is between PyTorch and a launch, and the
// device functions of ops/cuda/point_merge_device.h, warp after warp.  Built by test_point_merge_emulated.py.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../ops/cuda/point_merge_device.h"
#include "emulated_warp.h"

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

static AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace boltz_mm::cuda {
namespace {

struct Emulate {
  const MergeProblem& problem;

  template <typename Pass>
  const char* operator()(Index tasks) const {
    PairTile<typename Pass::Compute> tile;
    EmulatedWarp warp;
    for (Index task = 0; task < tasks; ++task) Pass::run(warp, problem, task, tile);
    return nullptr;
  }
};

}  // namespace

// In place of the launches.
const char* launch_merge(const MergeProblem& problem, ValueType type, void*) {
  return choose_merge(problem, type, false, Emulate{problem});
}

const char* launch_merge_backward(const MergeProblem& problem, ValueType type, void*) {
  return choose_merge(problem, type, true, Emulate{problem});
}

}  // namespace boltz_mm::cuda

#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream

#include "../../ops/cuda/point_merge.cpp"
