// A warp as kernels see it: numbers that its lanes hold, and what the lanes do together.
//
//   Lanes<X>              an X of each lane
//   each(f)               run f(lane) for all lanes, and wait for all of them
//   sum(x, first, last)   add to the X of each lane those at the distances first, 2 first, ... below last
//   largest(x)            the largest X of all lanes, in each; none may be NaN
// The tests have another Warp, which runs the lanes one after the other (tests/ops/emulated_warp.h).

#pragma once

#include "grid_device.h"

namespace boltz_mm::cuda {

template <typename C, int N>
struct Numbers {
  C x[N];

  BOLTZ_MM_DEVICE void clear() {
    BOLTZ_MM_UNROLL
    for (int i = 0; i < N; ++i) x[i] = 0;
  }
};

BOLTZ_MM_DEVICE float square_root(float x) { return sqrtf(x); }
BOLTZ_MM_DEVICE double square_root(double x) { return sqrt(x); }

#ifdef __CUDACC__
struct DeviceWarp {
  int lane;

  template <typename X>
  struct Lanes {
    X own;
    __device__ __forceinline__ X& operator[](int) { return own; }
  };

  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    f(lane);
    __syncwarp();
  }

  template <typename C, int N>
  __device__ __forceinline__ void sum(Lanes<Numbers<C, N>>& numbers, int first, int last) const {
    for (int distance = first; distance < last; distance *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) numbers.own.x[i] += __shfl_xor_sync(~0u, numbers.own.x[i], distance);
    }
  }

  template <typename C>
  __device__ __forceinline__ void largest(Lanes<Numbers<C, 1>>& numbers) const {
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const C other = __shfl_xor_sync(~0u, numbers.own.x[0], distance);
      if (other > numbers.own.x[0]) numbers.own.x[0] = other;
    }
  }
};
#endif

}  // namespace boltz_mm::cuda
