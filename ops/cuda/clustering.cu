// Clusters along a space-filling curve: the kernels, and their launch.

#include "clustering_device.h"

#include <cuda_runtime.h>

namespace boltz_mm::cuda {
namespace {

constexpr int kThreads = 128;

__device__ int64_t thread_number() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

struct ValueCell {
  __device__ void operator()(const ClusterProblem& problem, int64_t at) const { value_cell(problem, at); }
};
struct ValueToken {
  __device__ void operator()(const ClusterProblem& problem, int64_t at) const { value_token(problem, at); }
};
struct LayAnchor {
  __device__ void operator()(const ClusterProblem& problem, int64_t at) const { lay_anchor(problem, at); }
};
struct CompareToken {
  __device__ void operator()(const ClusterProblem& problem, int64_t at) const {
    const uint32_t bits = compare_token(problem, at);
    uint32_t* largest = largest_of(problem, at);
    if (*largest < bits) atomicMax(largest, bits);  // reading first spares most of the atomics
  }
};
struct CombineToken {
  __device__ void operator()(const ClusterProblem& problem, int64_t at) const { combine_token(problem, at); }
};
struct FinishCluster {
  __device__ void operator()(const ClusterProblem& problem, int64_t at) const { finish_cluster(problem, at); }
};

template <typename Step>
__global__ void __launch_bounds__(kThreads) run(const __grid_constant__ ClusterProblem problem, int64_t count) {
  const int64_t at = thread_number();
  if (at < count) Step()(problem, at);
}

template <typename Step>
const char* launch(const ClusterProblem& problem, int64_t count, void* stream) {
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  run<Step><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(problem, count);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_cell_values(const ClusterProblem& problem, void* stream) {
  return launch<ValueCell>(problem, problem.grid.height * problem.grid.width, stream);
}

const char* launch_token_values(const ClusterProblem& problem, void* stream) {
  return launch<ValueToken>(problem, problem.batch * problem.tokens, stream);
}

const char* launch_keys(const ClusterProblem& problem, void* stream) {
  const int64_t tokens = problem.batch * problem.tokens;
  const char* error = launch<LayAnchor>(problem, problem.grid.height * problem.grid.width, stream);
  if (error == nullptr) error = launch<CompareToken>(problem, tokens, stream);
  if (error == nullptr) error = launch<CombineToken>(problem, tokens, stream);
  return error;
}

const char* launch_means(const ClusterProblem& problem, void* stream) {
  return launch<FinishCluster>(problem, problem.batch * problem.clusters, stream);
}

}  // namespace boltz_mm::cuda
