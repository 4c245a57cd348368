// Forward pass of deformable, box and instance attention: the kernels for each dtype, and their launch.

#include "grid_forward.h"
#include "grid_kernel.h"

namespace boltz_mm::cuda {
namespace {

template <typename T, typename C>
const char* launch(const GridProblem& problem, const Plan& plan, const LaunchPass& launch_pass) {
  constexpr int V = 16 / sizeof(T);
  if (plan.vector == V) return choose_forward<V, T, C>(problem, launch_pass);
  return choose_forward<1, T, C>(problem, launch_pass);
}

}  // namespace

const char* launch_forward(const GridProblem& problem, ValueType type, void* stream) {
  const Plan plan = make_plan(problem, type, false);
  if (plan.blocks == 0) return nullptr;
  const LaunchPass launch_pass{problem, plan, static_cast<cudaStream_t>(stream)};
  switch (type) {
    case ValueType::float64:
      return launch<double, double>(problem, plan, launch_pass);
    case ValueType::float32:
      return launch<float, float>(problem, plan, launch_pass);
    case ValueType::bfloat16:
      return launch<BFloat16, float>(problem, plan, launch_pass);
    case ValueType::float16:
      return launch<Float16, float>(problem, plan, launch_pass);
  }
  return "unknown dtype";
}

}  // namespace boltz_mm::cuda
