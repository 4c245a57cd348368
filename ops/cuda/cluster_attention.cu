// Cluster attention: the kernels for each dtype, and the launches.

#include "cluster_attention_backward.h"

#include <cuda_runtime.h>

namespace boltz_mm::cuda {
namespace {

constexpr int kClusterWarps = 8;             // of a block
constexpr Index kManyTasks = 1 << 15;        // enough to fill a device with warps that have several tasks each
constexpr Index kTasksOfWarp = 4;            // neighbours, so that the rows of a block's L1 cache are used more often
constexpr Index kMostClusterBlocks = 1 << 20;

template <typename Pass>
__global__ void __launch_bounds__(kClusterWarps* kWarp)
    cluster_kernel(const __grid_constant__ ClusterProblem problem, Index tasks, Index tasks_of_block) {
  __shared__ ClusterTile<typename Pass::Compute> tiles[kClusterWarps];
  const int number = threadIdx.x / kWarp;
  DeviceWarp warp{static_cast<int>(threadIdx.x % kWarp)};
  const Index step = static_cast<Index>(gridDim.x) * tasks_of_block;
  for (Index first = static_cast<Index>(blockIdx.x) * tasks_of_block; first < tasks; first += step) {
    const Index end = first + tasks_of_block < tasks ? first + tasks_of_block : tasks;
    for (Index task = first + number; task < end; task += kClusterWarps) {
      Pass::run(warp, problem, task, tiles[number]);
    }
  }
}

struct LaunchCluster {
  const ClusterProblem& problem;
  cudaStream_t stream;

  template <typename Pass>
  const char* operator()(Index tasks) const {
    if (tasks == 0) return nullptr;
    const Index of_block = kClusterWarps * (tasks >= kManyTasks ? kTasksOfWarp : 1);
    const Index wanted = (tasks + of_block - 1) / of_block;
    const Index blocks = wanted < kMostClusterBlocks ? wanted : kMostClusterBlocks;
    cluster_kernel<Pass>
        <<<static_cast<unsigned>(blocks), kClusterWarps * kWarp, 0, stream>>>(problem, tasks, of_block);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace

const char* launch_cluster_attention(const ClusterProblem& problem, ValueType type, void* stream) {
  return choose_cluster(problem, type, false, LaunchCluster{problem, static_cast<cudaStream_t>(stream)});
}

const char* launch_cluster_attention_backward(const ClusterProblem& problem, ValueType type, void* stream) {
  return choose_cluster(problem, type, true, LaunchCluster{problem, static_cast<cudaStream_t>(stream)});
}

}  // namespace boltz_mm::cuda
