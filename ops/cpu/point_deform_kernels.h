// The kernels of attention and interpolation between points on the CPU, forward and backward.  This file is included
// by one source for each instruction set, inside of a namespace of its own; see point_deform_avx2.cpp.
//
// Both directions work on blocks of samples: places, neighbours and weights are found in vectors over the samples, rows
// of value are added in vectors over the channels.  Nothing that the formula repeats is stored: a block holds about a
// hundred samples at a time.
//
// Backward has one task for each (batch, head, level).  A task owns that part of the gradient of value and adds to it
// in a scratch map, in the order of the queries: no atomics, and the same result for every number of threads.  The
// softmax is applied before and undone after the tasks, in passes over the logits alone.

namespace {

#include "vectors.h"

#include "rows.h"

#include "inverse_distance.h"

constexpr Index kBlockSamples = 128;

// The samples of a block.  Neighbour j of sample i stands at [j * size + i]; the number of neighbours is rounded up to
// a multiple of 4, because backward takes four at a time.
template <typename C>
struct Samples {
  using Int = typename IntegerOf<C>::type;
  Index size, neighbours, planes;
  C *x, *y;       // place
  C *attention;
  C *exists;      // 0 for a place that is not finite
  Int *column, *row;
  Int *token;
  C *near_x, *near_y;
  C *share;       // weights of the neighbours

  void carve(Carver& carver, Index count, Index neighbours_of_each) {
    size = padded<C>(count);
    neighbours = neighbours_of_each;
    planes = (neighbours + 3) / 4 * 4;
    C** const numbers[] = {&x, &y, &attention, &exists};
    for (C** array : numbers) *array = carver.take<C>(size);
    C** const of_neighbours[] = {&near_x, &near_y, &share};
    for (C** array : of_neighbours) *array = carver.take<C>(size * planes);
    column = carver.take<Int>(size);
    row = carver.take<Int>(size);
    token = carver.take<Int>(size * planes);
  }

  // So that what lies behind the last sample is a number.
  void clear() const {
    __builtin_memset(near_x, 0, size * planes * sizeof(C));
    __builtin_memset(near_y, 0, size * planes * sizeof(C));
    __builtin_memset(attention, 0, size * sizeof(C));
  }
};

// The rows (b, n, h) of a block: consecutive queries of one head, the levels [first_level, last_level).
struct Rows {
  Index batch, head, query, count, first_level, last_level;

  Index row(const PointProblem& problem, Index r) const {
    return (batch * problem.queries + query + r) * problem.heads + head;
  }
};

inline Index channels_of(const PointProblem& problem, Index head) {
  const Index left = problem.channels - head * problem.depth;
  return left < problem.depth ? left : problem.depth;
}

template <typename C>
void place_samples(const PointProblem& problem, const Rows& rows, const Samples<C>& samples) {
  const Index count = (rows.last_level - rows.first_level) * problem.points;
  const C* from = static_cast<const C*>(problem.query_pos) + rows.batch * problem.query_batch_stride + rows.query * 2;
  C *x = samples.x, *y = samples.y;
  for (Index r = 0; r < rows.count; ++r, x += count, y += count) {
    const C query_x = from[2 * r], query_y = from[2 * r + 1];
    if (!problem.offsets) {
      for (Index i = 0; i < count; ++i) x[i] = query_x, y[i] = query_y;
      continue;
    }
    const Index first = rows.row(problem, r) * problem.levels + rows.first_level;
    const C* offset = static_cast<const C*>(problem.offsets) + first * problem.points * 2;
    for (Index i = 0; i < count; ++i) {
      x[i] = query_x + offset[2 * i];
      y[i] = query_y + offset[2 * i + 1];
    }
  }
  for (Index i = rows.count * count; i < samples.size; ++i) samples.x[i] = samples.y[i] = __builtin_nan("");
}

// The cell that a sample is in: halves round to even, as the addition of a large number does.
template <typename C>
inline Vector<C, kLanes<C>> cell_along(Vector<C, kLanes<C>> place, Index size) {
  using V = Vector<C, kLanes<C>>;
  const V low = {}, high = V{} + C(size - 1);
  const C large = sizeof(C) == 4 ? C(12582912.0) : C(6755399441055744.0);
  place = place < low ? low : place;
  place = place > high ? high : place;
  return (place + large) - large;
}

template <typename C>
void find_cells(const PointProblem& problem, const Samples<C>& samples) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  using I = Vector<typename IntegerOf<C>::type, N>;
  for (Index i = 0; i < samples.size; i += N) {
    const V x = load<N>(samples.x + i), y = load<N>(samples.y + i);
    const I finite = ((x - x) == 0) & ((y - y) == 0);
    const V at_x = finite ? x : V{}, at_y = finite ? y : V{};
    store<N>(samples.x + i, at_x);
    store<N>(samples.y + i, at_y);
    store<N>(samples.exists + i, V(finite ? V{} + 1 : V{}));
    if (!problem.height) continue;
    store<N>(samples.column + i, I(__builtin_convertvector(cell_along<C>(at_x, problem.width), I)));
    store<N>(samples.row + i, I(__builtin_convertvector(cell_along<C>(at_y, problem.height), I)));
  }
}

// Neighbours of sample i, from their numbers in a table.
template <typename I, typename C>
inline void take_neighbours(const Samples<C>& samples, Index i, const I* numbers, Index base, const C* positions) {
  for (Index j = 0, at = i; j < samples.neighbours; ++j, at += samples.size) {
    const Index token = base + static_cast<Index>(numbers[j]);
    samples.token[at] = token;
    samples.near_x[at] = positions[2 * token];
    samples.near_y[at] = positions[2 * token + 1];
  }
}

// `base` is added to the numbers of the first level: 0 where values and positions begin with it.
template <typename I, typename C>
void look_up(const PointProblem& problem, const Rows& rows, const Samples<C>& samples, Index base,
             const C* positions) {
  const I* tables = static_cast<const I*>(problem.tables) + rows.batch * problem.table_batch_stride;
  const Index points = problem.points, neighbours = samples.neighbours;
  Index i = 0;
  for (Index r = 0; r < rows.count; ++r) {
    for (Index level = rows.first_level; level < rows.last_level; ++level) {
      const Index start = base + problem.starts[level] - problem.starts[rows.first_level];
      if (!problem.height) {
        const I* numbers = tables + (rows.query + r) * neighbours;
        for (Index p = 0; p < points; ++p, ++i) take_neighbours(samples, i, numbers, start, positions);
        continue;
      }
      const I* table = tables + level * problem.height * problem.width * neighbours;
      for (Index p = 0; p < points; ++p, ++i) {
        const Index cell = samples.row[i] * problem.width + samples.column[i];
        take_neighbours(samples, i, table + cell * neighbours, start, positions);
      }
    }
  }
}

template <typename C>
void find_neighbours(const PointProblem& problem, const Rows& rows, const Samples<C>& samples, Index base,
                     const C* positions) {
  place_samples(problem, rows, samples);
  find_cells(problem, samples);
  problem.wide ? look_up<int64_t>(problem, rows, samples, base, positions)
               : look_up<int32_t>(problem, rows, samples, base, positions);
}

// What backward needs of the distances: slope = d^power * u / d and turn = d^power * u * ln(d); 0 where d is 0 and
// where nothing is left of u.
template <typename C>
struct Slopes {
  C *slope = nullptr, *turn = nullptr;
};

// Weights of the neighbours, times what is in `scale` and with a sum of 1 otherwise.
template <bool BACKWARD, typename C>
void find_shares(const Samples<C>& samples, Power power, const C* scale, const Slopes<C>& slopes) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const Index size = samples.size;
  for (Index i = 0; i < size; i += N) {
    const V x = load<N>(samples.x + i), y = load<N>(samples.y + i);
    V total = {};
    for (Index j = 0, at = i; j < samples.neighbours; ++j, at += size) {
      const V dx = x - load<N>(samples.near_x + at), dy = y - load<N>(samples.near_y + at);
      const V squared = dx * dx + dy * dy;
      const V raised = raise<N>(squared, power);
      const V nearness = 1 / (raised + C(1e-11));
      store<N>(samples.share + at, nearness);
      total += nearness;
      if constexpr (BACKWARD) {
        const auto counts = (squared != 0) & (nearness != 0);
        const V ratio = raised * nearness;
        store<N>(slopes.slope + at, V(counts ? V(ratio / squared) : V{}));
        if (slopes.turn) store<N>(slopes.turn + at, V(counts ? V(ratio * logarithm<N>(squared)) : V{}));
      }
    }
    const V exists = load<N>(samples.exists + i);
    V factor = exists / total;
    if (scale) factor *= load<N>(scale + i);
    factor = ((total == 0) | (exists == 0)) ? V{} : factor;
    for (Index j = 0, at = i; j < samples.neighbours; ++j, at += size) {
      const V share = load<N>(samples.share + at);
      store<N>(samples.share + at, V(share * factor));
    }
  }
}

// Copy one head of the tokens [first, first + count) of an image to contiguous rows, which fit into a cache.
template <typename T>
void pack_values(const PointProblem& problem, Index b, Index h, Index first, Index count, T* packed) {
  const T* from = static_cast<const T*>(problem.value) + b * problem.value_batch_stride +
                  h * problem.value_head_stride + first * problem.value_token_stride;
  const Index depth = channels_of(problem, h);
  for (Index token = 0; token < count; ++token) {
    __builtin_memcpy(packed + token * depth, from + token * problem.value_token_stride, depth * sizeof(T));
  }
}

// ------------------------------------------------------------------------------------------------------ forward ----

// Sum of the weighted rows of the samples [first, last); K is the number of neighbours, 0 for any.
template <Index K, typename T, typename C>
struct SumRows {
  const Samples<C>& samples;
  Index first, last;
  const T* values;
  Index stride;
  T* output;

  template <int VECTORS, int N>
  inline __attribute__((always_inline)) void run(Index channel) const {
    constexpr int kChains = VECTORS >= 8 ? 1 : VECTORS >= 4 ? 2 : 4;
    const Index neighbours = K ? K : samples.neighbours;
    Vector<C, N> sums[kChains][VECTORS] = {};
    for (Index i = first; i < last; ++i) {
      Index at = i;
#pragma GCC unroll 4
      for (Index j = 0; j < neighbours; ++j, at += samples.size) {
        const C share = samples.share[at];
        const T* row = values + samples.token[at] * stride + channel;
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[j % kChains][v] += share * load<N>(row + v * N);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      for (int chain = 1; chain < kChains; ++chain) sums[0][v] += sums[chain][v];
      store<N>(output + channel + v * N, sums[0][v]);
    }
  }
};

template <typename T, typename C>
struct ForwardScratch {
  Samples<C> samples;
  Index rows;  // in a block
  C* softmax;
  T* packed;

  ForwardScratch(const PointProblem& problem, void* memory, Index& used) {
    const Index count = problem.levels * problem.points;
    const Index fitting = kBlockSamples / (count ? count : 1);
    rows = fitting < 1 ? 1 : fitting;
    Carver carver{static_cast<char*>(memory)};
    samples.carve(carver, rows * count, problem.neighbours);
    softmax = carver.take<C>(padded<C>(count) + kLanes<C>);
    packed = carver.take<T>(problem.packed ? problem.tokens * problem.depth : 0);
    used = carver.used;
  }
};

template <typename T, typename C>
Index forward_scratch(const PointProblem& problem) {
  Index used;
  ForwardScratch<T, C>(problem, nullptr, used);
  return used;
}

template <typename T, typename C>
void forward_block(const PointProblem& problem, const ForwardScratch<T, C>& scratch, const Rows& rows, const T* values,
                   Index stride) {
  const Samples<C>& samples = scratch.samples;
  const Index count = problem.levels * problem.points, depth = channels_of(problem, rows.head);
  const C* positions = static_cast<const C*>(problem.positions) + rows.batch * problem.position_batch_stride;
  find_neighbours(problem, rows, samples, 0, positions);
  if (problem.logits) {
    for (Index r = 0; r < rows.count; ++r) {
      const C* logits = static_cast<const C*>(problem.logits) + rows.row(problem, r) * count;
      softmax_row(logits, count, scratch.softmax);
      for (Index i = 0; i < count; ++i) samples.attention[r * count + i] = scratch.softmax[i];
    }
  }
  find_shares<false>(samples, Power(problem.power), problem.logits ? samples.attention : nullptr, Slopes<C>{});
  for (Index r = 0; r < rows.count; ++r) {
    T* output = static_cast<T*>(problem.output) +
                (rows.batch * problem.queries + rows.query + r) * problem.channels + rows.head * problem.depth;
    const Index first = r * count;
    if (samples.neighbours == 4) {
      for_channels<kVectors, kLanes<C>>(SumRows<4, T, C>{samples, first, first + count, values, stride, output}, 0,
                                        depth);
    } else {
      for_channels<kVectors, kLanes<C>>(SumRows<0, T, C>{samples, first, first + count, values, stride, output}, 0,
                                        depth);
    }
  }
}

template <typename T, typename C>
void forward(const PointProblem& problem, int64_t begin, int64_t end, void* memory) {
  Index used;
  const ForwardScratch<T, C> scratch(problem, memory, used);
  scratch.samples.clear();
  for (Index task = begin; task < end; ++task) {
    const Index split = task % problem.splits, bh = task / problem.splits;
    const Index b = bh / problem.heads, h = bh % problem.heads;
    const Index first = problem.queries * split / problem.splits, last = problem.queries * (split + 1) / problem.splits;
    const T* values = static_cast<const T*>(problem.value) + b * problem.value_batch_stride +
                      h * problem.value_head_stride;
    Index stride = problem.value_token_stride;
    if (problem.packed) {
      pack_values(problem, b, h, 0, problem.tokens, scratch.packed);
      values = scratch.packed;
      stride = channels_of(problem, h);
    }
    for (Index query = first; query < last; query += scratch.rows) {
      const Index count = last - query < scratch.rows ? last - query : scratch.rows;
      forward_block<T, C>(problem, scratch, Rows{b, h, query, count, 0, problem.levels}, values, stride);
    }
  }
}

// ----------------------------------------------------------------------------------------------------- backward ----

template <typename T, typename C>
struct BackwardScratch {
  Samples<C> samples;
  Slopes<C> slopes;
  Index rows;  // queries in a block
  T* packed;
  C *map, *grads, *dots, *grad_x, *grad_y, *softmax;

  BackwardScratch(const PointProblem& problem, void* memory, Index& used) {
    const Index fitting = kBlockSamples / (problem.points ? problem.points : 1);
    rows = fitting < 1 ? 1 : fitting;
    Index most = 0;
    for (Index level = 0; level < problem.levels; ++level) {
      const Index tokens = problem.starts[level + 1] - problem.starts[level];
      most = tokens > most ? tokens : most;
    }
    Carver carver{static_cast<char*>(memory)};
    samples.carve(carver, rows * problem.points, problem.neighbours);
    map = carver.take<C>(problem.grad_value ? most * problem.depth : 0);
    packed = carver.take<T>(problem.packed ? most * problem.depth : 0);
    grads = carver.take<C>(rows * problem.depth);
    slopes.slope = carver.take<C>(samples.size * samples.planes);
    slopes.turn = carver.take<C>(problem.grad_power ? samples.size * samples.planes : 0);
    if (!problem.grad_power) slopes.turn = nullptr;
    dots = carver.take<C>(samples.size * samples.planes);
    grad_x = carver.take<C>(samples.size);
    grad_y = carver.take<C>(samples.size);
    softmax = carver.take<C>(padded<C>(problem.levels * problem.points) + kLanes<C>);
    used = carver.used;
  }
};

template <typename T, typename C>
Index backward_scratch(const PointProblem& problem) {
  Index used;
  BackwardScratch<T, C>(problem, nullptr, used);
  return used;
}

// Channels from `channel` on, for four neighbours: dot products with their rows of value, and weighted additions to
// their rows of the gradient, one after the other, because two of them may be the same.
template <int N, bool DOTS, bool SCATTER, typename T, typename C>
inline __attribute__((always_inline)) void backward_channels(const T* const (&rows)[4], C* const (&maps)[4],
                                                             const C (&weights)[4], const C* grad, Index channel,
                                                             Index depth, C (&dots)[4]) {
  using V = Vector<C, N>;
  V sums[4] = {};
  for (; channel + N <= depth; channel += N) {
    const V g = load<N>(grad + channel);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if constexpr (DOTS) sums[i] += g * load<N>(rows[i] + channel);
      if constexpr (SCATTER) store<N>(maps[i] + channel, V(load<N>(maps[i] + channel) + weights[i] * g));
    }
  }
  if constexpr (DOTS) sum_lanes_of_four<N, C>(sums, dots);
  if constexpr (N > 1) {
    if (channel < depth) backward_channels<N / 2, DOTS, SCATTER>(rows, maps, weights, grad, channel, depth, dots);
  }
}

template <bool DOTS, bool SCATTER, typename T, typename C>
void backward_rows(const PointProblem& problem, const BackwardScratch<T, C>& scratch, Index count, Index depth,
                   const T* values, Index stride) {
  const Samples<C>& samples = scratch.samples;
  for (Index i = 0; i < count; ++i) {
    const C* grad = scratch.grads + i / problem.points * depth;
    for (Index group = 0; group < samples.neighbours; group += 4) {
      const T* rows[4];
      C* maps[4];
      C weights[4], dots[4] = {};
      for (int j = 0; j < 4; ++j) {
        const bool real = group + j < samples.neighbours;
        const Index at = i + (real ? group + j : group) * samples.size;
        const Index token = samples.token[at];
        rows[j] = values + token * stride;
        maps[j] = scratch.map + token * depth;
        weights[j] = real ? samples.share[at] * samples.attention[i] : C(0);
      }
      backward_channels<kLanes<C>, DOTS, SCATTER>(rows, maps, weights, grad, 0, depth, dots);
      if constexpr (DOTS) {
        for (int j = 0; j < 4; ++j) scratch.dots[i + (group + j) * samples.size] = dots[j];
      }
    }
  }
}

// Hand what the rows of value gave on to places, attention weights and power; returns the part of the power.
template <typename T, typename C>
double finish_samples(const PointProblem& problem, const BackwardScratch<T, C>& scratch) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const Samples<C>& samples = scratch.samples;
  const Index size = samples.size, neighbours = samples.neighbours;
  const C twice = C(2 * problem.power);
  V of_power = {};
  for (Index i = 0; i < size; i += N) {
    const V attention = load<N>(samples.attention + i);
    const V x = load<N>(samples.x + i), y = load<N>(samples.y + i), exists = load<N>(samples.exists + i);
    V grad_x = {}, grad_y = {}, grad_attention = {}, grad_power = {};
    for (Index j = 0, at = i; j < neighbours; ++j, at += size) {
      const V share = load<N>(samples.share + at), dot = load<N>(scratch.dots + at);
      grad_attention += share * dot;
      V difference = {};  // dot - grad_attention, without what both have in common
      for (Index k = 0, other = i; k < neighbours; ++k, other += size) {
        difference += load<N>(samples.share + other) * (dot - load<N>(scratch.dots + other));
      }
      const V common = -attention * share * difference;
      const V slope = common * load<N>(scratch.slopes.slope + at) * twice;
      grad_x += slope * (x - load<N>(samples.near_x + at));
      grad_y += slope * (y - load<N>(samples.near_y + at));
      if (scratch.slopes.turn) grad_power += common * load<N>(scratch.slopes.turn + at);
    }
    store<N>(scratch.grad_x + i, V(exists == 0 ? V{} : grad_x));
    store<N>(scratch.grad_y + i, V(exists == 0 ? V{} : grad_y));
    store<N>(samples.attention + i, V(attention * grad_attention));
    of_power += exists == 0 ? V{} : grad_power;
  }
  return sum_lanes<N, C>(of_power);
}

template <typename T, typename C>
double backward_block(const PointProblem& problem, const BackwardScratch<T, C>& scratch, const Rows& rows,
                      const T* values, Index stride) {
  const Samples<C>& samples = scratch.samples;
  const Index points = problem.points, depth = channels_of(problem, rows.head), level = rows.first_level;
  const Index count = rows.count * points;
  const C* positions = static_cast<const C*>(problem.positions) + rows.batch * problem.position_batch_stride;
  find_neighbours(problem, rows, samples, 0, positions + 2 * problem.starts[level]);
  for (Index r = 0; r < rows.count; ++r) {
    const Index query = rows.batch * problem.queries + rows.query + r;
    const T* grad = static_cast<const T*>(problem.grad_output) + query * problem.channels + rows.head * problem.depth;
    convert_row<kLanes<C>>(grad, depth, scratch.grads + r * depth);
    const Index first = (rows.row(problem, r) * problem.levels + level) * points;
    for (Index p = 0; p < points; ++p) {
      samples.attention[r * points + p] = problem.grad_logits ? static_cast<C*>(problem.grad_logits)[first + p] : C(1);
    }
  }
  find_shares<true>(samples, Power(problem.power), static_cast<const C*>(nullptr), scratch.slopes);
  const bool dots = problem.grad_offsets || problem.grad_logits || problem.grad_power;
  if (dots && problem.grad_value) {
    backward_rows<true, true>(problem, scratch, count, depth, values, stride);
  } else if (dots) {
    backward_rows<true, false>(problem, scratch, count, depth, values, stride);
  } else {
    backward_rows<false, true>(problem, scratch, count, depth, values, stride);
  }
  if (!dots) return 0;
  const double of_power = finish_samples(problem, scratch);
  for (Index r = 0; r < rows.count; ++r) {
    const Index first = (rows.row(problem, r) * problem.levels + level) * points;
    for (Index p = 0; p < points; ++p) {
      const Index i = r * points + p;
      if (problem.grad_offsets) {
        static_cast<C*>(problem.grad_offsets)[2 * (first + p)] = scratch.grad_x[i];
        static_cast<C*>(problem.grad_offsets)[2 * (first + p) + 1] = scratch.grad_y[i];
      }
      if (problem.grad_logits) static_cast<C*>(problem.grad_logits)[first + p] = samples.attention[i];
    }
  }
  return of_power;
}

template <typename T, typename C>
void backward(const PointProblem& problem, int64_t begin, int64_t end, void* memory) {
  Index used;
  const BackwardScratch<T, C> scratch(problem, memory, used);
  scratch.samples.clear();
  __builtin_memset(scratch.dots, 0, scratch.samples.size * scratch.samples.planes * sizeof(C));
  const Index heads = problem.heads;
  for (Index task = begin; task < end; ++task) {
    const Index level = task % problem.levels, h = task / problem.levels % heads, b = task / problem.levels / heads;
    const Index start = problem.starts[level], tokens = problem.starts[level + 1] - start;
    const Index depth = channels_of(problem, h);
    if (problem.grad_value) __builtin_memset(scratch.map, 0, tokens * depth * sizeof(C));
    const T* values = static_cast<const T*>(problem.value) + b * problem.value_batch_stride +
                      start * problem.value_token_stride + h * problem.value_head_stride;
    Index stride = problem.value_token_stride;
    if (problem.packed) {
      pack_values(problem, b, h, start, tokens, scratch.packed);
      values = scratch.packed;
      stride = depth;
    }
    double of_power = 0;
    for (Index query = 0; query < problem.queries; query += scratch.rows) {
      const Index left = problem.queries - query, count = left < scratch.rows ? left : scratch.rows;
      of_power += backward_block<T, C>(problem, scratch, Rows{b, h, query, count, level, level + 1}, values, stride);
    }
    if (problem.grad_power) problem.grad_power[task] = of_power;
    if (!problem.grad_value) continue;
    T* grad_value = static_cast<T*>(problem.grad_value) + (b * problem.tokens + start) * problem.channels +
                    h * problem.depth;
    for (Index token = 0; token < tokens; ++token) {
      convert_row<kLanes<C>>(scratch.map + token * depth, depth, grad_value + token * problem.channels);
    }
  }
}

template <typename C>
void softmax(const PointProblem& problem, int64_t begin, int64_t end, void* memory) {
  const Index count = problem.levels * problem.points;
  C* row_softmax = static_cast<C*>(memory);
  for (Index row = begin; row < end; ++row) {
    softmax_row(static_cast<const C*>(problem.logits) + row * count, count, row_softmax);
    __builtin_memcpy(static_cast<C*>(problem.grad_logits) + row * count, row_softmax, count * sizeof(C));
  }
}

// gradient of logit i = product_i - weight_i * sum over j of product_j, with product = weight * gradient of weight.
template <typename C>
void softmax_backward(const PointProblem& problem, int64_t begin, int64_t end, void* memory) {
  const Index count = problem.levels * problem.points;
  C* row_softmax = static_cast<C*>(memory);
  for (Index row = begin; row < end; ++row) {
    softmax_row(static_cast<const C*>(problem.logits) + row * count, count, row_softmax);
    C* grad = static_cast<C*>(problem.grad_logits) + row * count;
    C sum = 0;
    for (Index i = 0; i < count; ++i) sum += grad[i];
    for (Index i = 0; i < count; ++i) grad[i] -= row_softmax[i] * sum;
  }
}

template <typename T, typename C>
constexpr PointKernels make_kernels() {
  return {forward_scratch<T, C>, forward<T, C>,  backward_scratch<T, C>,
          softmax<C>,            backward<T, C>, softmax_backward<C>};
}

}  // namespace

const PointKernels point_kernels[kValueTypes] = {
    make_kernels<double, double>(),
    make_kernels<float, float>(),
    make_kernels<BFloat16, float>(),
    make_kernels<Float16, float>(),
};
