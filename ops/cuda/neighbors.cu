// Exact nearest neighbours: the kernels, and their launch.

#include "neighbors_device.h"

#include <cuda_runtime.h>

namespace boltz_mm::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kScanThreads = 1024;

struct DeviceAtomics {
  __device__ void max(uint32_t* at, uint32_t number) const { atomicMax(at, number); }
  __device__ int32_t add(int32_t* at, int32_t number) const { return atomicAdd(at, number); }
};

__device__ int64_t thread_number() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

__global__ void bound_points(const __grid_constant__ NeighborProblem problem) {
  const int64_t at = thread_number();
  if (at < problem.batch * problem.points) bound_point(DeviceAtomics(), problem, at);
}

__global__ void lay_grids(const __grid_constant__ NeighborProblem problem) {
  const int64_t image = thread_number();
  if (image < problem.batch) lay_grid(problem, image);
}

__global__ void count_points(const __grid_constant__ NeighborProblem problem) {
  const int64_t at = thread_number();
  if (at < problem.batch * problem.points) count_point(DeviceAtomics(), problem, at);
}

__global__ void __launch_bounds__(kScanThreads) scan_buckets(const __grid_constant__ NeighborProblem problem) {
  __shared__ int32_t sums[kScanThreads];
  const int rank = threadIdx.x;
  const BucketScan scan(problem, blockIdx.x, rank, kScanThreads);
  const int32_t own = scan.sum();
  sums[rank] = own;
  for (int offset = 1; offset < kScanThreads; offset *= 2) {
    __syncthreads();
    const int32_t before = rank >= offset ? sums[rank - offset] : 0;
    __syncthreads();
    sums[rank] += before;
  }
  scan.write(sums[rank] - own);
}

__global__ void fill_points(const __grid_constant__ NeighborProblem problem) {
  const int64_t at = thread_number();
  if (at < problem.batch * problem.points) fill_point(DeviceAtomics(), problem, at);
}

template <typename Keys>
__global__ void __launch_bounds__(kThreads) search_queries(const __grid_constant__ NeighborProblem problem) {
  const int64_t query = thread_number();
  if (query < problem.batch * problem.queries) search_query<Keys>(problem, query);
}

struct LaunchSearch {
  const NeighborProblem& problem;
  unsigned blocks;
  cudaStream_t stream;

  template <typename Keys>
  void operator()(Keys*) const {
    search_queries<Keys><<<blocks, kThreads, 0, stream>>>(problem);
  }
};

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

const char* launch_neighbors(const NeighborProblem& problem, void* queue) {
  const cudaStream_t stream = static_cast<cudaStream_t>(queue);
  const unsigned blocks = blocks_for(problem.batch * problem.points);
  if (problem.height == 0) bound_points<<<blocks, kThreads, 0, stream>>>(problem);
  lay_grids<<<blocks_for(problem.batch), kThreads, 0, stream>>>(problem);
  count_points<<<blocks, kThreads, 0, stream>>>(problem);
  scan_buckets<<<static_cast<unsigned>(problem.batch), kScanThreads, 0, stream>>>(problem);
  fill_points<<<blocks, kThreads, 0, stream>>>(problem);
  choose_keys(problem.k, LaunchSearch{problem, blocks_for(problem.batch * problem.queries), stream});
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace boltz_mm::cuda
