// Backward pass of deformable, box and instance attention, for one row and its team (see grid_device.h).
//
// Points are found as in the forward pass.  For each sample the lanes multiply the gradient of the output with the four
// corners, add the sample's part to the gradient of value (atomically: the order, and so the last digits, may differ
// from run to run), and hand the gradients of position and weight to the lane that found the point.  That lane turns
// them into gradients of location and weight, or of box and logit; these are always summed in the same order.

#pragma once

#include "grid_forward.h"

namespace boltz_mm::cuda {

template <typename C>
struct alignas(16) BackwardSample {
  C x[2], y[2];  // coefficients of columns and rows
  C weight, level_weight;
  Corners corners;
  int owner;   // lane that found the point
  int exists;  // bit i: corner i (row-major) is inside of the level
};

template <typename C>
BOLTZ_MM_DEVICE BackwardSample<C> backward_sample(const Level& level, const Position<C>& at, int lane) {
  const Axis<C> x = along_axis(at.x, level.width), y = along_axis(at.y, level.height);
  BackwardSample<C> sample;
  sample.x[0] = x.first;
  sample.x[1] = x.second;
  sample.y[0] = y.first;
  sample.y[1] = y.second;
  sample.level_weight = 0;
  sample.corners = find_corners(level, x, y);
  sample.owner = lane;
  const int columns = (x.has_first ? 1 : 0) | (x.has_second ? 2 : 0);
  sample.exists = (y.has_first ? columns : 0) | (y.has_second ? columns << 2 : 0);
  return sample;
}

// Gradients of a point: of its position in cells and of its weights.
template <typename C>
struct PointGradient {
  C x = 0, y = 0, weight = 0, level_weight = 0;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kAddsFourFloats = true;
#else
constexpr bool kAddsFourFloats = false;
#endif

// Add to memory that other threads add to as well.
template <int V, typename C>
BOLTZ_MM_DEVICE void add_to(C* sums, const C (&parts)[V]) {
#ifdef __CUDACC__
  if constexpr (kAddsFourFloats && sizeof(C) == 4 && V % 4 == 0) {
    BOLTZ_MM_UNROLL
    for (int i = 0; i < V; i += 4) {
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(sums + i)),
                   "f"(parts[i]), "f"(parts[i + 1]), "f"(parts[i + 2]), "f"(parts[i + 3])
                   : "memory");
    }
  } else {
    BOLTZ_MM_UNROLL
    for (int i = 0; i < V; ++i) atomicAdd(sums + i, parts[i]);
  }
#else
  for (int i = 0; i < V; ++i) sums[i] += parts[i];
#endif
}

// What the samples of a row have in common.
template <typename T, typename C>
struct Upstream {
  const T* values;
  const T* grad;       // of the output
  const T* mask_grad;  // of the mask output at a point
  C* grad_value;       // or null
  Index stride, grad_stride, depth;
};

template <typename T, typename C>
BOLTZ_MM_DEVICE Upstream<T, C> upstream_of(const GridProblem& problem, const Row& row) {
  Upstream<T, C> up;
  up.values = values_of<T>(problem, row);
  up.grad = static_cast<const T*>(problem.grad_output) + row.index * problem.depth;
  up.mask_grad = nullptr;
  up.stride = problem.value_cell_stride;
  up.grad_stride = problem.heads * problem.depth;
  up.depth = problem.depth;
  up.grad_value = problem.grad_value ? static_cast<C*>(problem.grad_value) +
                                           (row.batch * problem.cells * problem.heads + row.head) * problem.depth
                                     : nullptr;
  return up;
}

// The part of one lane in V channels: adds to the gradients of the point, and to the gradient of value.
template <int V, bool MASK, typename T, typename C>
BOLTZ_MM_DEVICE void backward_channels(const Upstream<T, C>& up, const BackwardSample<C>& sample, Index channel,
                                       PointGradient<C>& gradient) {
  const Index cell = sample.corners.cell, right = sample.corners.right(), down = sample.corners.down();
  const Index cells[4] = {cell, cell + right, cell + down, cell + down + right};
  C v[4][V], grad[V], mask_grad[V], both[V];
  load(up.grad + channel, grad);
  if constexpr (MASK) load(up.mask_grad + channel, mask_grad);
  BOLTZ_MM_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (sample.exists >> k & 1) {
      load(up.values + cells[k] * up.stride + channel, v[k]);
    } else {
      BOLTZ_MM_UNROLL
      for (int i = 0; i < V; ++i) v[k][i] = 0;
    }
  }
  BOLTZ_MM_UNROLL
  for (int i = 0; i < V; ++i) {
    const C upper = sample.x[0] * v[0][i] + sample.x[1] * v[1][i], lower = sample.x[0] * v[2][i] + sample.x[1] * v[3][i];
    const C sampled = sample.y[0] * upper + sample.y[1] * lower;
    gradient.weight += grad[i] * sampled;
    both[i] = sample.weight * grad[i];
    if constexpr (MASK) {
      gradient.level_weight += mask_grad[i] * sampled;
      both[i] += sample.level_weight * mask_grad[i];
    }
    gradient.x += both[i] * (sample.y[0] * (v[1][i] - v[0][i]) + sample.y[1] * (v[3][i] - v[2][i]));
    gradient.y += both[i] * (lower - upper);
  }
  if (!up.grad_value) return;
  BOLTZ_MM_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (!(sample.exists >> k & 1)) continue;
    const C coefficient = sample.y[k / 2] * sample.x[k % 2];
    C parts[V];
    BOLTZ_MM_UNROLL
    for (int i = 0; i < V; ++i) parts[i] = coefficient * both[i];
    add_to(up.grad_value + cells[k] * up.grad_stride + channel, parts);
  }
}

// Gradients of a sampled point, in all lanes.
template <int V, bool MASK, typename T, typename C, typename Team>
BOLTZ_MM_DEVICE PointGradient<C> backward_point(Team& team, const Upstream<T, C>& up,
                                                const BackwardSample<C>& sample) {
  PointGradient<C> gradient;
  for (Index channel = V * team.lane; channel < up.depth; channel += V * team.lanes) {
    backward_channels<V, MASK>(up, sample, channel, gradient);
  }
  gradient.x = sum_over_lanes(team, gradient.x);
  gradient.y = sum_over_lanes(team, gradient.y);
  gradient.weight = sum_over_lanes(team, gradient.weight);
  if constexpr (MASK) gradient.level_weight = sum_over_lanes(team, gradient.level_weight);
  return gradient;
}

// Samples the points of the group's lanes; returns the gradients of the lane's own point, 0 where it is not inside.
template <int V, bool MASK, typename T, typename C, typename Team>
BOLTZ_MM_DEVICE PointGradient<C> backward_tile(Team& team, const Upstream<T, C>& up, bool inside,
                                               const BackwardSample<C>& sample, BackwardSample<C>* samples) {
  PointGradient<C> own;
  const int count = share_samples(team, inside, sample, samples);
  for (int s = 0; s < count; ++s) {
    const PointGradient<C> gradient = backward_point<V, MASK>(team, up, samples[s]);
    if (samples[s].owner == team.lane) own = gradient;
  }
  return own;
}

// Gradients of a box and its angle, summed over points.
template <typename C>
struct BoxGradient {
  C x = 0, y = 0, width = 0, height = 0, angle = 0;

  BOLTZ_MM_DEVICE void add(const Frame<C>& frame, const PointGradient<C>& point, C grid_x, C grid_y) {
    const C in_x = point.x * frame.scale_x, in_y = point.y * frame.scale_y;
    const C along = in_x * frame.cosine + in_y * frame.sine, across = in_y * frame.cosine - in_x * frame.sine;
    x += in_x;
    y += in_y;
    width += along * grid_x;
    height += across * grid_y;
    angle += across * grid_x * frame.width - along * grid_y * frame.height;
  }

  // For the threads that differ in rank from `first` on.
  template <typename Team>
  BOLTZ_MM_DEVICE void sum(Team& team, int first, bool has_angle, C* scratch) {
    x = combine(team, x, first, scratch, Add());
    y = combine(team, y, first, scratch, Add());
    width = combine(team, width, first, scratch, Add());
    height = combine(team, height, first, scratch, Add());
    if (has_angle) angle = combine(team, angle, first, scratch, Add());
  }

  BOLTZ_MM_DEVICE void write(const GridProblem& problem, const Frame<C>& frame, Index index) const {
    C* to = static_cast<C*>(problem.grad_boxes) + index * 4;
    to[0] = x;
    to[1] = y;
    to[2] = frame.width > 0 ? width : C(0);
    to[3] = frame.height > 0 ? height : C(0);
  }
};

// Points given, or box attention: a level at a time, its points side by side.
template <int V, Mode MODE, typename T, typename C, typename Team>
BOLTZ_MM_DEVICE void attend_backward(Team& team, const GridProblem& problem, const Row& row,
                                     BackwardSample<C>* samples, C* scratch) {
  const Index points = problem.points, count = problem.levels * points;
  const Upstream<T, C> up = upstream_of<T, C>(problem, row);
  const C* numbers =
      static_cast<const C*>(MODE == Mode::points ? problem.weights : problem.logits) + row.index * count;
  C* grad_numbers = static_cast<C*>(MODE == Mode::points ? problem.grad_weights : problem.grad_logits) +
                    row.index * count;
  Softmax<C> softmax;
  if constexpr (MODE == Mode::box) softmax = softmax_of(team, numbers, count, 1, scratch);
  C total = 0;
  Levels levels(problem);
  for (Index level = 0; level < problem.levels; ++level) {
    levels.seek(level);
    Frame<C> frame;
    if constexpr (MODE == Mode::box) frame = read_frame<C>(problem, row, levels.level);
    BoxGradient<C> box;
    for (Index tile = static_cast<Index>(team.slice) * team.lanes; tile < points; tile += team.size) {
      const Index point = tile + team.lane, item = level * points + point;
      bool inside = false;
      BackwardSample<C> sample;
      C weight = 0;
      if (point < points) {
        const Position<C> at = MODE == Mode::box ? place_on_grid(problem, frame, point)
                                                 : given_place<C>(problem, row, levels.level, point);
        weight = MODE == Mode::box ? softmax.weight(numbers[item]) : numbers[item];
        inside = is_inside(at, levels.level);
        if (inside) {
          sample = backward_sample(levels.level, at, team.lane);
          sample.weight = weight;
        }
      }
      const PointGradient<C> gradient = backward_tile<V, false>(team, up, inside, sample, samples);
      if (point >= points) continue;
      if constexpr (MODE == Mode::points) {
        C* location = static_cast<C*>(problem.grad_locations) + (row.index * count + item) * 2;
        location[0] = gradient.x * static_cast<C>(levels.level.width);
        location[1] = gradient.y * static_cast<C>(levels.level.height);
        grad_numbers[item] = gradient.weight;
      } else {
        const C product = weight * gradient.weight;
        grad_numbers[item] = product;  // the softmax is undone below
        total += product;
        if (inside) {
          const C* grid = static_cast<const C*>(problem.grid) + 2 * point;
          box.add(frame, gradient, grid[0], grid[1]);
        }
      }
    }
    if constexpr (MODE == Mode::box) {
      box.sum(team, 1, problem.grad_angles != nullptr, scratch);
      const Index index = row.index * problem.levels + level;
      if (team.rank == 0) box.write(problem, frame, index);
      if (team.rank == 0 && problem.grad_angles) static_cast<C*>(problem.grad_angles)[index] = box.angle;
    }
  }
  if constexpr (MODE == Mode::box) {
    total = sum_over_team(team, total, scratch);
    for (Index level = 0; level < problem.levels; ++level) {  // each thread what it has written above
      for (Index point = team.rank; point < points; point += team.size) {
        const Index item = level * points + point;
        grad_numbers[item] -= softmax.weight(numbers[item]) * total;
      }
    }
  }
}

// Instance attention: a level in each lane, the points one after another.  With MASK there are two gradients from
// above, and two weights for each sample.
template <int V, bool MASK, typename T, typename C, typename Team>
BOLTZ_MM_DEVICE void instance_backward(Team& team, const GridProblem& problem, const Row& row,
                                       BackwardSample<C>* samples, C* scratch) {
  const Index count = problem.levels * 4;
  const C* logits = static_cast<const C*>(problem.logits) + row.index * count;
  C* grad_logits = static_cast<C*>(problem.grad_logits) + row.index * count;
  const C share = points_in_quadrant<C>(problem);
  const T* mask_grad = MASK ? static_cast<const T*>(problem.grad_mask_output) + mask_offset(problem, row) : nullptr;
  Upstream<T, C> up = upstream_of<T, C>(problem, row);
  const Softmax<C> spatial = softmax_of(team, logits, count, 1, scratch);
  Softmax<C> over_levels[4];
  if constexpr (MASK) {
    BOLTZ_MM_UNROLL
    for (int i = 0; i < 4; ++i) over_levels[i] = softmax_of(team, logits + i, count - i, 4, scratch);
  }
  C total = 0, level_totals[4] = {};
  Levels levels(problem);
  for (Index tile = 0; tile < problem.levels; tile += team.lanes) {
    const Index level = tile + team.lane;
    const bool exists = level < problem.levels;
    Frame<C> frame = {};
    C sums[4] = {}, level_sums[4] = {};
    if (exists) {
      levels.seek(level);
      frame = read_frame<C>(problem, row, levels.level);
    }
    BoxGradient<C> box;
    for (Index point = team.slice; point < problem.points; point += team.slices) {
      const int quadrant = quadrant_of(problem, point);
      if constexpr (MASK) up.mask_grad = mask_grad + point * problem.heads * problem.depth;
      const Position<C> at = place_on_grid(problem, frame, point);
      const bool inside = exists && is_inside(at, levels.level);
      BackwardSample<C> sample;
      if (inside) {
        sample = backward_sample(levels.level, at, team.lane);
        const C logit = logits[level * 4 + quadrant];
        sample.weight = spatial.weight(logit) / share;
        if constexpr (MASK) sample.level_weight = pick(over_levels, quadrant).weight(logit);
      }
      const PointGradient<C> gradient = backward_tile<V, MASK>(team, up, inside, sample, samples);
      if (!inside) continue;
      const C* grid = static_cast<const C*>(problem.grid) + 2 * point;
      box.add(frame, gradient, grid[0], grid[1]);
      BOLTZ_MM_UNROLL
      for (int i = 0; i < 4; ++i) {
        sums[i] += i == quadrant ? gradient.weight : C(0);
        level_sums[i] += i == quadrant ? gradient.level_weight : C(0);
      }
    }
    box.sum(team, team.lanes, false, scratch);
    BOLTZ_MM_UNROLL
    for (int i = 0; i < 4; ++i) {
      sums[i] = sum_over_slices(team, sums[i], scratch);
      if constexpr (MASK) level_sums[i] = sum_over_slices(team, level_sums[i], scratch);
    }
    if (exists && team.slice == 0) {
      box.write(problem, frame, row.index * problem.levels + level);
      BOLTZ_MM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const C logit = logits[level * 4 + i], product = spatial.weight(logit) * (sums[i] / share);
        grad_logits[level * 4 + i] = product;  // the softmax is undone below
        total += product;
        if constexpr (MASK) {
          const C level_product = over_levels[i].weight(logit) * level_sums[i];
          grad_logits[level * 4 + i] += level_product;
          level_totals[i] += level_product;
        }
      }
    }
  }
  total = sum_over_team(team, total, scratch);
  if constexpr (MASK) {
    BOLTZ_MM_UNROLL
    for (int i = 0; i < 4; ++i) level_totals[i] = sum_over_team(team, level_totals[i], scratch);
  }
  if (team.slice != 0) return;
  for (Index level = team.lane; level < problem.levels; level += team.lanes) {
    BOLTZ_MM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Index item = level * 4 + i;
      C undone = spatial.weight(logits[item]) * total;
      if constexpr (MASK) undone += over_levels[i].weight(logits[item]) * level_totals[i];
      grad_logits[item] -= undone;
    }
  }
}

// The pass of one row, by mode.
template <int V, Mode MODE, bool MASK, typename T, typename C>
struct Backward {
  using Value = T;
  using Compute = C;
  using Sample = BackwardSample<C>;
  // The registers of a multiprocessor are shared by these.
  static constexpr int kBlocksAtOnce = sizeof(C) == 8 || (MASK && V == 8) ? 1 : 2;

  template <typename Team>
  static BOLTZ_MM_DEVICE void run(Team& team, const GridProblem& problem, const Row& row, Sample* samples,
                                  C* scratch) {
    if constexpr (MODE == Mode::instance) {
      instance_backward<V, MASK, T, C>(team, problem, row, samples, scratch);
    } else {
      attend_backward<V, MODE, T, C>(team, problem, row, samples, scratch);
    }
  }
};

// Calls with_pass(Pass()) for the pass that a problem needs.
template <int V, typename T, typename C, typename WithPass>
inline auto choose_backward(const GridProblem& problem, const WithPass& with_pass) {
  if (problem.mode == Mode::points) return with_pass(Backward<V, Mode::points, false, T, C>());
  if (problem.mode == Mode::box) return with_pass(Backward<V, Mode::box, false, T, C>());
  if (problem.grad_mask_output) return with_pass(Backward<V, Mode::instance, true, T, C>());
  return with_pass(Backward<V, Mode::instance, false, T, C>());
}

}  // namespace boltz_mm::cuda
