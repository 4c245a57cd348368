// The kernel around a pass (grid_forward.h, grid_backward.h), the threads as a Team, and the launch.

#pragma once

#include "grid_device.h"

#include <cuda_runtime.h>

namespace boltz_mm::cuda {

struct DeviceTeam {
  int rank, size, lane, lanes, slice, slices;

  __device__ DeviceTeam(const Plan& plan) : size(plan.lanes * plan.slices), lanes(plan.lanes), slices(plan.slices) {
    rank = threadIdx.x & (size - 1);
    lane = rank & (lanes - 1);
    slice = rank / lanes;
    const unsigned in_warp = threadIdx.x & (kWarp - 1);
    group_shift_ = in_warp & ~static_cast<unsigned>(lanes - 1);
    group_mask_ = mask_of(lanes) << group_shift_;
    warp_mask_ = size >= kWarp ? ~0u : mask_of(size) << (in_warp & ~static_cast<unsigned>(size - 1));
  }

  __device__ __forceinline__ void sync_group() const { __syncwarp(group_mask_); }

  __device__ __forceinline__ void sync_team() const {
    if (size > kWarp) {
      __syncthreads();  // the team is the block
    } else {
      __syncwarp(warp_mask_);
    }
  }

  __device__ __forceinline__ uint32_t ballot(bool yes) const {
    return (__ballot_sync(group_mask_, yes) & group_mask_) >> group_shift_;
  }

  template <typename C>
  __device__ __forceinline__ C group_xor(C x, int offset) const {
    return __shfl_xor_sync(group_mask_, x, offset);
  }

  template <typename C>
  __device__ __forceinline__ C warp_xor(C x, int offset) const {
    return __shfl_xor_sync(warp_mask_, x, offset);
  }

 private:
  unsigned group_shift_, group_mask_, warp_mask_;

  static __device__ unsigned mask_of(int threads) { return threads == kWarp ? ~0u : (1u << threads) - 1u; }
};

template <typename Pass>
__global__ void __launch_bounds__(kThreads, Pass::kBlocksAtOnce)
    grid_kernel(const __grid_constant__ GridProblem problem, const __grid_constant__ Plan plan) {
  using Sample = typename Pass::Sample;
  __shared__ alignas(16) unsigned char samples[kThreads * sizeof(Sample)];
  __shared__ typename Pass::Compute scratch[kThreads];
  DeviceTeam team(plan);
  const int number = threadIdx.x / team.size;
  Sample* group_samples = reinterpret_cast<Sample*>(samples) + (threadIdx.x & ~(team.lanes - 1));
  for (Index block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    const Row row = locate_row(problem, plan.rows, block, number);
    if (row.query < problem.queries) Pass::run(team, problem, row, group_samples, scratch + number * team.size);
  }
}

struct LaunchPass {
  const GridProblem& problem;
  const Plan& plan;
  cudaStream_t stream;

  template <typename Pass>
  const char* operator()(Pass) const {
    const Index blocks = plan.blocks < kMostBlocks ? plan.blocks : kMostBlocks;
    grid_kernel<Pass><<<static_cast<unsigned>(blocks), plan.threads(), 0, stream>>>(problem, plan);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace boltz_mm::cuda
