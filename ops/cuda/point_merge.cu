// Weighted sums over neighbours: the kernels for each dtype, and the launches.

#include "point_merge_device.h"

#include <cuda_runtime.h>

namespace boltz_mm::cuda {
namespace {

constexpr int kMergeWarps = 4;  // of a block
constexpr Index kMostMergeBlocks = 1 << 20;

template <typename Pass>
__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_kernel(const __grid_constant__ MergeProblem problem, Index tasks) {
  __shared__ PairTile<typename Pass::Compute> tiles[kMergeWarps];
  const int number = threadIdx.x / kWarp;
  DeviceWarp warp{static_cast<int>(threadIdx.x % kWarp)};
  for (Index task = static_cast<Index>(blockIdx.x) * kMergeWarps + number; task < tasks;
       task += static_cast<Index>(gridDim.x) * kMergeWarps) {
    Pass::run(warp, problem, task, tiles[number]);
  }
}

struct LaunchMerge {
  const MergeProblem& problem;
  cudaStream_t stream;

  template <typename Pass>
  const char* operator()(Index tasks) const {
    if (tasks == 0) return nullptr;
    const Index wanted = (tasks + kMergeWarps - 1) / kMergeWarps;
    const Index blocks = wanted < kMostMergeBlocks ? wanted : kMostMergeBlocks;
    merge_kernel<Pass><<<static_cast<unsigned>(blocks), kMergeWarps * kWarp, 0, stream>>>(problem, tasks);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace

const char* launch_merge(const MergeProblem& problem, ValueType type, void* stream) {
  return choose_merge(problem, type, false, LaunchMerge{problem, static_cast<cudaStream_t>(stream)});
}

const char* launch_merge_backward(const MergeProblem& problem, ValueType type, void* stream) {
  return choose_merge(problem, type, true, LaunchMerge{problem, static_cast<cudaStream_t>(stream)});
}

}  // namespace boltz_mm::cuda
