// The CUDA operators that sample between points (ops/cuda/point_deform.cpp) as operators of the CPU: the lanes of a team
// run one after the other, so that all but the launch is tried without a device.  Built by test_point_deform_emulated.py.

#include "../../ops/cuda/point_deform_device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace boltz_mm::cuda {
namespace {

struct EmulatedLanes {
  template <typename X>
  struct Own {
    X x[kWarp];
    X& operator[](int lane) { return x[lane]; }
  };

  int lanes;

  // From the last one on: the order of lanes must not matter between two waits.
  template <typename F>
  void all(const F& f) const {
    for (int lane = lanes - 1; lane >= 0; --lane) f(lane);
  }

  template <typename F>
  void each(const F& f) const {
    all(f);
  }

  template <typename C>
  void sum(Own<C>& own) const {
    C total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += own[lane];
    for (int lane = 0; lane < lanes; ++lane) own[lane] = total;
  }
};

template <bool BACKWARD>
struct RunPoints {
  const PointProblem& problem;

  template <int V, typename T, typename C>
  const char* go() const {
    int32_t token[kNeighboursAtOnce * kWarp];
    C share[kNeighboursAtOnce * kWarp], dot[kNeighboursAtOnce * kWarp], attention[kWarp];
    const PointTile<C> tile{token, share, dot, attention, kWarp};
    EmulatedLanes team{lanes_for(problem.depth, V)};
    for (Index row = 0; row < rows_of(problem); ++row) {
      if constexpr (BACKWARD) {
        point_backward<V, T, C>(team, problem, row, tile);
      } else {
        point_forward<V, T, C>(team, problem, row, tile);
      }
    }
    if (!BACKWARD || !problem.grad_power) return nullptr;
    double sum = 0;
    for (Index row = 0; row < rows_of(problem); ++row) sum += static_cast<const C*>(problem.power_parts)[row];
    *static_cast<C*>(problem.grad_power) = static_cast<C>(sum);
    return nullptr;
  }
};

}  // namespace

const char* launch_point_forward(const PointProblem& problem, ValueType type, void*) {
  return choose_point_types(problem, type, RunPoints<false>{problem});
}

const char* launch_point_backward(const PointProblem& problem, ValueType type, void*) {
  return choose_point_types(problem, type, RunPoints<true>{problem});
}

}  // namespace boltz_mm::cuda

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

static AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream

#include "../../ops/cuda/point_deform.cpp"
