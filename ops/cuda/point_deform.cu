// Attention and interpolation between points: the kernels around a row, the lanes as a Team, and the launch.

#include "point_deform_device.h"

#include <cuda_runtime.h>

namespace boltz_mm::cuda {
namespace {

constexpr int kPointThreads = 128;
constexpr Index kMostPointBlocks = 1 << 20;
constexpr int kSumThreads = 256;

struct PointTeam {
  template <typename X>
  struct Own {
    X x;
    __device__ __forceinline__ X& operator[](int) { return x; }
  };

  int lanes, rank;

  __device__ explicit PointTeam(int lanes) : lanes(lanes), rank(threadIdx.x & (lanes - 1)) {
    const unsigned members = lanes == kWarp ? ~0u : (1u << lanes) - 1u;
    mask_ = members << (threadIdx.x & (kWarp - 1) & ~static_cast<unsigned>(lanes - 1));
  }

  template <typename F>
  __device__ __forceinline__ void all(const F& f) const {
    f(rank);
  }

  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    f(rank);
    __syncwarp(mask_);
  }

  template <typename C>
  __device__ __forceinline__ void sum(Own<C>& own) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) own.x += __shfl_xor_sync(mask_, own.x, offset);
  }

 private:
  unsigned mask_;
};

template <int V, typename T, typename C, bool BACKWARD>
__global__ void __launch_bounds__(kPointThreads) point_kernel(const __grid_constant__ PointProblem problem, int lanes) {
  __shared__ int32_t token[kNeighboursAtOnce * kPointThreads];
  __shared__ C share[kNeighboursAtOnce * kPointThreads], attention[kPointThreads];
  __shared__ C dot[BACKWARD ? kNeighboursAtOnce * kPointThreads : 1];
  PointTeam team(lanes);
  const int base = threadIdx.x & ~(lanes - 1), teams = kPointThreads / lanes;
  const PointTile<C> tile{token + base, share + base, dot + (BACKWARD ? base : 0), attention + base, kPointThreads};
  const Index rows = problem.batch * problem.queries * problem.heads;
  for (Index row = blockIdx.x * static_cast<Index>(teams) + base / lanes; row < rows;
       row += gridDim.x * static_cast<Index>(teams)) {
    if constexpr (BACKWARD) {
      point_backward<V, T, C>(team, problem, row, tile);
    } else {
      point_forward<V, T, C>(team, problem, row, tile);
    }
  }
}

// The sum of the rows' parts of the gradient of the power, in a fixed order.
template <typename C>
__global__ void __launch_bounds__(kSumThreads) sum_power_parts(const __grid_constant__ PointProblem problem) {
  __shared__ double sums[kSumThreads];
  const Index rows = problem.batch * problem.queries * problem.heads;
  double sum = 0;
  for (Index row = threadIdx.x; row < rows; row += kSumThreads) sum += static_cast<const C*>(problem.power_parts)[row];
  sums[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *static_cast<C*>(problem.grad_power) = static_cast<C>(sums[0]);
}

template <bool BACKWARD>
struct LaunchPoints {
  const PointProblem& problem;
  cudaStream_t stream;

  template <int V, typename T, typename C>
  const char* go() const {
    const int lanes = lanes_for(problem.depth, V);
    const Index teams = kPointThreads / lanes, wanted = (rows_of(problem) + teams - 1) / teams;
    const unsigned blocks = static_cast<unsigned>(wanted < kMostPointBlocks ? wanted : kMostPointBlocks);
    if (blocks > 0) point_kernel<V, T, C, BACKWARD><<<blocks, kPointThreads, 0, stream>>>(problem, lanes);
    if (BACKWARD && problem.grad_power) sum_power_parts<C><<<1, kSumThreads, 0, stream>>>(problem);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace

const char* launch_point_forward(const PointProblem& problem, ValueType type, void* stream) {
  return choose_point_types(problem, type, LaunchPoints<false>{problem, static_cast<cudaStream_t>(stream)});
}

const char* launch_point_backward(const PointProblem& problem, ValueType type, void* stream) {
  return choose_point_types(problem, type, LaunchPoints<true>{problem, static_cast<cudaStream_t>(stream)});
}

}  // namespace boltz_mm::cuda
