// The CUDA operators of ops/cuda/cluster_attention.cpp as operators of the CPU: what is between PyTorch and a launch,
// and the device functions of ops/cuda/cluster_attention_*.h, warp after warp.  Built by
// test_cluster_attention_emulated.py.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../ops/cuda/cluster_attention_backward.h"
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
  const ClusterProblem& problem;

  template <typename Pass>
  const char* operator()(Index tasks) const {
    using C = typename Pass::Compute;
    EmulatedWarp warp;
    for (Index task = 0; task < tasks; ++task) {
      // What another task left in the tile must not matter: NaN and a row that would show.
      ClusterTile<C> tile;
      for (int i = 0; i < kWarp; ++i) tile.other[i] = Index{1} << 40, tile.first[i] = tile.second[i] = NAN;
      Pass::run(warp, problem, task, tile);
    }
    return nullptr;
  }
};

}  // namespace

// In place of the launches.
const char* launch_cluster_attention(const ClusterProblem& problem, ValueType type, void*) {
  return choose_cluster(problem, type, false, Emulate{problem});
}

const char* launch_cluster_attention_backward(const ClusterProblem& problem, ValueType type, void*) {
  return choose_cluster(problem, type, true, Emulate{problem});
}

}  // namespace boltz_mm::cuda

#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream

#include "../../ops/cuda/cluster_attention.cpp"
