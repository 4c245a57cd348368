// Forward pass of deformable, box and instance attention, for one row and its team (see grid_device.h).
//
// A group of lanes finds the cells and coefficients of one point in each lane, keeps the points that are inside of
// their level in shared memory, and then samples them one after another, each lane in its channels.  Neither points
// nor weights exist in device memory.

#pragma once

#include "grid_device.h"

namespace boltz_mm::cuda {

template <typename C>
struct alignas(16) ForwardSample {
  C coefficients[4];
  Corners corners;
  C weight, level_weight;  // for a mask output only; elsewhere the weight is part of the coefficients
};

template <typename C>
BOLTZ_MM_DEVICE ForwardSample<C> forward_sample(const Level& level, const Position<C>& at, C scale) {
  const Axis<C> x = along_axis(at.x, level.width), y = along_axis(at.y, level.height);
  ForwardSample<C> sample;
  const C first = scale * y.first, second = scale * y.second;
  sample.coefficients[0] = first * x.first;
  sample.coefficients[1] = first * x.second;
  sample.coefficients[2] = second * x.first;
  sample.coefficients[3] = second * x.second;
  sample.corners = find_corners(level, x, y);
  return sample;
}

// Put the samples of the group that are inside next to each other into shared memory; returns how many there are.
template <typename Team, typename Sample>
BOLTZ_MM_DEVICE int share_samples(Team& team, bool inside, const Sample& sample, Sample* shared) {
  const uint32_t who = team.ballot(inside);
  const uint32_t before = who & ((1u << team.lane) - 1u);
  team.sync_group();  // the samples of before have been read
#ifdef __CUDACC__
  if (inside) shared[__popc(before)] = sample;
  const int count = __popc(who);
#else
  if (inside) shared[__builtin_popcount(before)] = sample;
  const int count = __builtin_popcount(who);
#endif
  team.sync_group();
  return count;
}

// V channels of a sample.
template <int V, typename T, typename C>
BOLTZ_MM_DEVICE void interpolate(const T* values, Index stride, const ForwardSample<C>& sample, C (&result)[V]) {
  const T* corner = values + sample.corners.cell * stride;
  const Index right = sample.corners.right() * stride, down = sample.corners.down() * stride;
  C v[4][V];
  load(corner, v[0]);
  load(corner + right, v[1]);
  load(corner + down, v[2]);
  load(corner + down + right, v[3]);
  BOLTZ_MM_UNROLL
  for (int i = 0; i < V; ++i) {
    result[i] = sample.coefficients[0] * v[0][i] + sample.coefficients[1] * v[1][i] +
                sample.coefficients[2] * v[2][i] + sample.coefficients[3] * v[3][i];
  }
}

template <int V, typename T, typename C, typename Team>
BOLTZ_MM_DEVICE void write_output(Team& team, const GridProblem& problem, const Row& row, Index channel, C (&sums)[V],
                                  C* scratch) {
  if (team.slices > 1) {
    BOLTZ_MM_UNROLL
    for (int i = 0; i < V; ++i) sums[i] = sum_over_slices(team, sums[i], scratch);
  }
  if (team.slice == 0 && channel < problem.depth) {
    store(sums, static_cast<T*>(problem.output) + row.index * problem.depth + channel);
  }
}

// Without a mask output: the points of all levels in one sequence.
template <int V, Mode MODE, typename T, typename C, typename Team>
BOLTZ_MM_DEVICE void attend(Team& team, const GridProblem& problem, const Row& row, ForwardSample<C>* samples,
                            C* scratch) {
  const Index stride = problem.value_cell_stride, points = problem.points, count = problem.levels * points;
  const Index logits_of_level = MODE == Mode::instance ? 4 : points;
  const C* numbers = MODE == Mode::points ? static_cast<const C*>(problem.weights) + row.index * count
                                          : static_cast<const C*>(problem.logits) +
                                                row.index * problem.levels * logits_of_level;
  Softmax<C> softmax;
  if constexpr (MODE != Mode::points) {
    softmax = softmax_of(team, numbers, problem.levels * logits_of_level, 1, scratch);
  }
  const Index step = static_cast<Index>(team.lanes) * team.slices;
  for (Index first = 0; first < problem.depth; first += V * team.lanes) {
    const Index channel = first + V * team.lane;
    const T* values = values_of<T>(problem, row) + (channel < problem.depth ? channel : 0);
    C sums[V] = {};
    Levels levels(problem);
    Index level = 0, point = team.rank;
    for (Index tile = static_cast<Index>(team.slice) * team.lanes; tile < count; tile += step, point += step) {
      while (level < problem.levels && point >= points) {
        point -= points;
        ++level;
      }
      bool inside = false;
      ForwardSample<C> sample;
      if (level < problem.levels) {
        levels.seek(level);
        Position<C> at;
        C weight;
        if constexpr (MODE == Mode::points) {
          at = given_place<C>(problem, row, levels.level, point);
          weight = numbers[level * points + point];
        } else {
          at = place_on_grid(problem, read_frame<C>(problem, row, levels.level), point);
          if constexpr (MODE == Mode::box) {
            weight = softmax.weight(numbers[level * points + point]);
          } else {
            weight = softmax.weight(numbers[level * 4 + quadrant_of(problem, point)]) / points_in_quadrant<C>(problem);
          }
        }
        inside = is_inside(at, levels.level);
        if (inside) sample = forward_sample(levels.level, at, weight);
      }
      const int shared = share_samples(team, inside, sample, samples);
      BOLTZ_MM_UNROLL_TWICE
      for (int s = 0; s < shared; ++s) {
        C sampled[V];
        interpolate(values, stride, samples[s], sampled);
        BOLTZ_MM_UNROLL
        for (int i = 0; i < V; ++i) sums[i] += sampled[i];
      }
    }
    write_output<V, T>(team, problem, row, channel, sums, scratch);
  }
}

// With a mask output: a point at a time, its levels side by side.  Each sample is taken once for both outputs.
template <int V, typename T, typename C, typename Team>
BOLTZ_MM_DEVICE void attend_with_mask(Team& team, const GridProblem& problem, const Row& row,
                                      ForwardSample<C>* samples, C* scratch) {
  const Index stride = problem.value_cell_stride, count = problem.levels * 4;
  const C* logits = static_cast<const C*>(problem.logits) + row.index * count;
  const C share = points_in_quadrant<C>(problem);
  const Softmax<C> spatial = softmax_of(team, logits, count, 1, scratch);
  Softmax<C> over_levels[4];
  BOLTZ_MM_UNROLL
  for (int i = 0; i < 4; ++i) over_levels[i] = softmax_of(team, logits + i, count - i, 4, scratch);
  T* masks = static_cast<T*>(problem.mask_output) + mask_offset(problem, row);
  for (Index first = 0; first < problem.depth; first += V * team.lanes) {
    const Index channel = first + V * team.lane;
    const T* values = values_of<T>(problem, row) + (channel < problem.depth ? channel : 0);
    C sums[V] = {};
    Levels levels(problem);
    for (Index point = team.slice; point < problem.points; point += team.slices) {
      const int quadrant = quadrant_of(problem, point);
      C mask[V] = {};
      for (Index tile = 0; tile < problem.levels; tile += team.lanes) {
        bool inside = false;
        ForwardSample<C> sample;
        if (tile + team.lane < problem.levels) {
          levels.seek(tile + team.lane);
          const Position<C> at = place_on_grid(problem, read_frame<C>(problem, row, levels.level), point);
          inside = is_inside(at, levels.level);
          if (inside) {
            const C logit = logits[levels.level.index * 4 + quadrant];
            sample = forward_sample(levels.level, at, C(1));
            sample.weight = spatial.weight(logit) / share;
            sample.level_weight = pick(over_levels, quadrant).weight(logit);
          }
        }
        const int shared = share_samples(team, inside, sample, samples);
        BOLTZ_MM_UNROLL_TWICE
        for (int s = 0; s < shared; ++s) {
          C sampled[V];
          interpolate(values, stride, samples[s], sampled);
          BOLTZ_MM_UNROLL
          for (int i = 0; i < V; ++i) {
            sums[i] += samples[s].weight * sampled[i];
            mask[i] += samples[s].level_weight * sampled[i];
          }
        }
      }
      if (channel < problem.depth) store(mask, masks + point * problem.heads * problem.depth + channel);
    }
    write_output<V, T>(team, problem, row, channel, sums, scratch);
  }
}

// The pass of one row, by mode.
template <int V, Mode MODE, bool MASK, typename T, typename C>
struct Forward {
  using Value = T;
  using Compute = C;
  using Sample = ForwardSample<C>;
  // The registers of a multiprocessor are shared by these.
  static constexpr int kBlocksAtOnce = sizeof(C) == 8 ? (MASK ? 1 : 2) : (MASK || V == 8 ? 2 : 3);

  template <typename Team>
  static BOLTZ_MM_DEVICE void run(Team& team, const GridProblem& problem, const Row& row, Sample* samples,
                                  C* scratch) {
    if constexpr (MASK) {
      attend_with_mask<V, T, C>(team, problem, row, samples, scratch);
    } else {
      attend<V, MODE, T, C>(team, problem, row, samples, scratch);
    }
  }
};

// Calls with_pass(Pass()) for the pass that a problem needs.
template <int V, typename T, typename C, typename WithPass>
inline auto choose_forward(const GridProblem& problem, const WithPass& with_pass) {
  if (problem.mode == Mode::points) return with_pass(Forward<V, Mode::points, false, T, C>());
  if (problem.mode == Mode::box) return with_pass(Forward<V, Mode::box, false, T, C>());
  if (problem.mask_output) return with_pass(Forward<V, Mode::instance, true, T, C>());
  return with_pass(Forward<V, Mode::instance, false, T, C>());
}

}  // namespace boltz_mm::cuda
