// The Warp of ops/cuda/warp.h on the CPU: the lanes one after the other, in lockstep at every step that all take.

#pragma once

#include "../../ops/cuda/warp.h"

namespace boltz_mm::cuda {

struct EmulatedWarp {
  template <typename X>
  struct Lanes {
    X of_lane[kWarp];
    X& operator[](int lane) { return of_lane[lane]; }
  };

  template <typename F>
  void each(const F& f) const {
    for (int lane = 0; lane < kWarp; ++lane) f(lane);
  }

  template <typename C, int N>
  void sum(Lanes<Numbers<C, N>>& numbers, int first, int last) const {
    for (int distance = first; distance < last; distance *= 2) {
      const Lanes<Numbers<C, N>> before = numbers;
      for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < N; ++i) numbers[lane].x[i] += before.of_lane[lane ^ distance].x[i];
      }
    }
  }

  template <typename C>
  void largest(Lanes<Numbers<C, 1>>& numbers) const {
    C most = numbers[0].x[0];
    for (int lane = 0; lane < kWarp; ++lane) most = numbers[lane].x[0] > most ? numbers[lane].x[0] : most;
    for (int lane = 0; lane < kWarp; ++lane) numbers[lane].x[0] = most;
  }
};

}  // namespace boltz_mm::cuda
