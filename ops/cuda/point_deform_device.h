// What a team of lanes does for one row (b, n, h) of attention or interpolation between points, forward and backward.
//
// Everything is written against a Team (see PointTeam in point_deform.cu), lanes of one warp:
//   lanes                  how many there are, a power of two
//   Team::Own<X>           an X of each lane
//   all(f), each(f)        run f(lane) for all lanes; each also waits for all of them
//   sum(own)               give each lane the sum over all of them
// so that the tests run the same code on a CPU.  Samples are taken `lanes` at a time: first each lane finds the
// neighbours and weights of one sample, four neighbours at a time, then the lanes share the channels of every row.

#pragma once

#include "grid_backward.h"
#include "point_deform.h"

namespace boltz_mm::cuda {

constexpr int kNeighboursAtOnce = 4;

// Entry j of sample i of a tile at [j * stride + i].
template <typename C>
struct PointTile {
  int32_t* token;  // of all levels, -1 for none
  C* share;
  C* dot;
  C* attention;
  int stride;
};

BOLTZ_MM_DEVICE float to_power(float x, float p) {
  return p == 3 ? x * x * x : p == 2 ? x * x : p == 1 ? x : powf(x, p);
}
BOLTZ_MM_DEVICE double to_power(double x, double p) {
  return p == 3 ? x * x * x : p == 2 ? x * x : p == 1 ? x : pow(x, p);
}
BOLTZ_MM_DEVICE float natural_log(float x) { return logf(x); }
BOLTZ_MM_DEVICE double natural_log(double x) { return log(x); }
BOLTZ_MM_DEVICE float to_even(float x) { return rintf(x); }
BOLTZ_MM_DEVICE double to_even(double x) { return rint(x); }

template <typename C>
BOLTZ_MM_DEVICE Index cell_along(C place, Index size) {
  const C high = static_cast<C>(size - 1);
  return static_cast<Index>(to_even(place < 0 ? C(0) : place > high ? high : place));
}

// A row (b, n, h), and what its samples have in common.
template <typename C>
struct PointRow {
  const PointProblem& problem;
  Index index, batch, query, head, count;
  C power, largest = 0, sum = 1;

  BOLTZ_MM_DEVICE PointRow(const PointProblem& problem, Index index) : problem(problem), index(index) {
    const Index place = quotient(index, problem.heads);
    head = index - place * problem.heads;
    batch = quotient(place, problem.queries);
    query = place - batch * problem.queries;
    count = problem.levels * problem.points;
    power = *static_cast<const C*>(problem.power);
    if (!problem.logits) return;
    const C* logits = static_cast<const C*>(problem.logits) + index * count;
    for (Index i = 0; i < count; ++i) largest = i == 0 || logits[i] > largest ? logits[i] : largest;
    sum = 0;
    for (Index i = 0; i < count; ++i) sum += exponential(logits[i] - largest);
  }

  BOLTZ_MM_DEVICE C attention(Index i) const {
    if (!problem.logits) return 1;
    return exponential(static_cast<const C*>(problem.logits)[index * count + i] - largest) / sum;
  }
};

// A sample: its place, and where its neighbours are.
template <typename C>
struct PointSample {
  const PointRow<C>& row;
  bool finite;
  C x, y, total;
  Index numbers, start, size;  // first number in the tables; tokens of the level

  BOLTZ_MM_DEVICE PointSample(const PointRow<C>& row, Index i) : row(row) {
    const PointProblem& problem = row.problem;
    const Index level = quotient(i, problem.points);
    const C* query = static_cast<const C*>(problem.query_pos) + row.batch * problem.query_batch_stride + 2 * row.query;
    x = query[0];
    y = query[1];
    if (problem.offsets) {
      const C* offset = static_cast<const C*>(problem.offsets) + 2 * (row.index * row.count + i);
      x += offset[0];
      y += offset[1];
    }
    finite = x - x == 0 && y - y == 0;
    start = problem.starts[level];
    size = problem.starts[level + 1] - start;
    Index line = row.query;
    if (problem.height && finite) {
      line = (level * problem.height + cell_along(y, problem.height)) * problem.width + cell_along(x, problem.width);
    }
    numbers = row.batch * problem.table_batch_stride + line * problem.neighbours;
    total = 0;
    for (Index j = 0; j < problem.neighbours; ++j) total += nearness(token(j));
  }

  // -1 where there is none: for a place that is not finite, and for numbers that are no tokens of the level.
  BOLTZ_MM_DEVICE Index token(Index j) const {
    if (!finite) return -1;
    const PointProblem& problem = row.problem;
    const Index number = problem.wide ? static_cast<const int64_t*>(problem.tables)[numbers + j]
                                      : static_cast<const int32_t*>(problem.tables)[numbers + j];
    return number >= 0 && number < size ? start + number : -1;
  }

  BOLTZ_MM_DEVICE void offset_from(Index token, C& dx, C& dy) const {
    const C* place =
        static_cast<const C*>(row.problem.positions) + row.batch * row.problem.position_batch_stride + 2 * token;
    dx = x - place[0];
    dy = y - place[1];
  }

  BOLTZ_MM_DEVICE C nearness(Index token) const {
    if (token < 0) return 0;
    C dx, dy;
    offset_from(token, dx, dy);
    return C(1) / (to_power(dx * dx + dy * dy, row.power) + C(1e-11));
  }

  BOLTZ_MM_DEVICE C share(Index token) const { return total == 0 ? C(0) : nearness(token) / total; }
};

// Neighbours [group, group + 4) of the sample i of a row, to place `at` of a tile.
template <typename C>
BOLTZ_MM_DEVICE void fill_tile(const PointRow<C>& row, Index i, Index group, const PointTile<C>& tile, int at) {
  const PointSample<C> sample(row, i);
  tile.attention[at] = row.attention(i);
  for (int j = 0; j < kNeighboursAtOnce; ++j) {
    const Index token = group + j < row.problem.neighbours ? sample.token(group + j) : Index(-1);
    const C share = sample.share(token);
    tile.token[j * tile.stride + at] = static_cast<int32_t>(share == 0 ? Index(-1) : token);
    tile.share[j * tile.stride + at] = share;
  }
}

template <int V, typename C>
struct Channels {
  C x[V];
};

template <typename T>
BOLTZ_MM_DEVICE Index head_offset(const PointProblem& problem, Index batch, Index head) {
  return batch * problem.value_batch_stride + head * problem.value_head_stride;
}

template <int V, typename T, typename C, typename Team>
BOLTZ_MM_DEVICE void point_forward(Team& team, const PointProblem& problem, Index index, const PointTile<C>& tile) {
  const PointRow<C> row(problem, index);
  const T* values = static_cast<const T*>(problem.value) + head_offset<T>(problem, row.batch, row.head);
  for (Index chunk = 0; chunk < problem.depth; chunk += team.lanes * V) {
    typename Team::template Own<Channels<V, C>> sums;
    team.all([&](int lane) {
      for (int v = 0; v < V; ++v) sums[lane].x[v] = 0;
    });
    for (Index first = 0; first < row.count; first += team.lanes) {
      const int samples = static_cast<int>(row.count - first < team.lanes ? row.count - first : team.lanes);
      for (Index group = 0; group < problem.neighbours; group += kNeighboursAtOnce) {
        team.each([&](int lane) {
          if (lane < samples) fill_tile(row, first + lane, group, tile, lane);
        });
        team.each([&](int lane) {
          const Index channel = chunk + lane * V;
          if (channel >= problem.depth) return;
          for (int i = 0; i < samples; ++i) {
            BOLTZ_MM_UNROLL
            for (int j = 0; j < kNeighboursAtOnce; ++j) {
              const int at = j * tile.stride + i;
              if (tile.token[at] < 0) continue;
              const C weight = tile.share[at] * tile.attention[i];
              C numbers[V];
              load<V>(values + tile.token[at] * problem.value_token_stride + channel, numbers);
              BOLTZ_MM_UNROLL
              for (int v = 0; v < V; ++v) sums[lane].x[v] += weight * numbers[v];
            }
          }
        });
      }
    }
    team.all([&](int lane) {
      const Index channel = chunk + lane * V;
      if (channel < problem.depth) store<V>(sums[lane].x, static_cast<T*>(problem.output) + index * problem.depth + channel);
    });
  }
}

// What a lane adds up for its sample.
template <typename C>
struct PointGradients {
  C x, y, mean, power;
};

// The part of the neighbours of a tile in the gradients of a sample.
template <typename C>
BOLTZ_MM_DEVICE void finish_group(const PointRow<C>& row, Index i, const PointTile<C>& tile, int at, bool all,
                                  PointGradients<C>& gradients) {
  const PointSample<C> sample(row, i);
  for (int j = 0; j < kNeighboursAtOnce; ++j) {
    const int entry = j * tile.stride + at;
    if (tile.token[entry] < 0) continue;
    C difference = 0;  // dot - mean, without what both have in common where all neighbours are at hand
    for (int k = 0; all && k < kNeighboursAtOnce; ++k) {
      const int other = k * tile.stride + at;
      if (tile.token[other] >= 0) difference += tile.share[other] * (tile.dot[entry] - tile.dot[other]);
    }
    if (!all) difference = tile.dot[entry] - gradients.mean;
    C dx, dy;
    sample.offset_from(tile.token[entry], dx, dy);
    const C squared = dx * dx + dy * dy;
    if (squared == 0) continue;
    const C raised = to_power(squared, row.power);
    const C common = -tile.attention[at] * tile.share[entry] * difference * (raised / (raised + C(1e-11)));
    const C slope = common / squared * (2 * row.power);
    gradients.x += slope * dx;
    gradients.y += slope * dy;
    gradients.power += common * natural_log(squared);
  }
}

template <int V, typename T, typename C, typename Team>
BOLTZ_MM_DEVICE void point_backward(Team& team, const PointProblem& problem, Index index, const PointTile<C>& tile) {
  const PointRow<C> row(problem, index);
  const T* values = static_cast<const T*>(problem.value) + head_offset<T>(problem, row.batch, row.head);
  const T* grad = static_cast<const T*>(problem.grad_output) + index * problem.depth;
  const Index token_channels = problem.heads * problem.depth;
  C* grad_value = static_cast<C*>(problem.grad_value);
  if (grad_value) grad_value += row.batch * problem.tokens * token_channels + row.head * problem.depth;
  const bool few = problem.neighbours <= kNeighboursAtOnce;
  typename Team::template Own<C> products, powers;
  team.all([&](int lane) { products[lane] = powers[lane] = 0; });
  for (Index first = 0; first < row.count; first += team.lanes) {
    const int samples = static_cast<int>(row.count - first < team.lanes ? row.count - first : team.lanes);
    typename Team::template Own<PointGradients<C>> gradients;
    team.all([&](int lane) { gradients[lane] = PointGradients<C>{0, 0, 0, 0}; });
    // With more neighbours than a tile holds their mean is found in a pass before.
    for (int pass = few ? 1 : 0; pass < 2; ++pass) {
      for (Index group = 0; group < problem.neighbours; group += kNeighboursAtOnce) {
        team.each([&](int lane) {
          if (lane < samples) fill_tile(row, first + lane, group, tile, lane);
        });
        for (int i = 0; i < samples; ++i) {
          for (int j = 0; j < kNeighboursAtOnce; ++j) {
            const int at = j * tile.stride + i;
            if (tile.token[at] < 0) continue;
            const C weight = tile.share[at] * tile.attention[i];
            typename Team::template Own<C> dot;
            team.all([&](int lane) {
              dot[lane] = 0;
              for (Index channel = lane * V; channel < problem.depth; channel += team.lanes * V) {
                C numbers[V], upstream[V];
                load<V>(values + tile.token[at] * problem.value_token_stride + channel, numbers);
                load<V>(grad + channel, upstream);
                BOLTZ_MM_UNROLL
                for (int v = 0; v < V; ++v) {
                  dot[lane] += numbers[v] * upstream[v];
                  upstream[v] *= weight;
                }
                if (pass == 1 && grad_value) add_to<V>(grad_value + tile.token[at] * token_channels + channel, upstream);
              }
            });
            team.sum(dot);
            team.all([&](int lane) {
              if (lane == 0) tile.dot[at] = dot[lane];
            });
          }
        }
        team.each([](int) {});
        team.each([&](int lane) {
          if (lane >= samples) return;
          PointGradients<C>& own = gradients[lane];
          if (few || pass == 0) {
            for (int j = 0; j < kNeighboursAtOnce; ++j) {
              const int at = j * tile.stride + lane;
              if (tile.token[at] >= 0) own.mean += tile.share[at] * tile.dot[at];
            }
          }
          if (pass == 1) finish_group(row, first + lane, tile, lane, few, own);
        });
      }
    }
    team.each([&](int lane) {
      if (lane >= samples) return;
      const Index place = index * row.count + first + lane;
      if (problem.grad_offsets) {
        static_cast<C*>(problem.grad_offsets)[2 * place] = gradients[lane].x;
        static_cast<C*>(problem.grad_offsets)[2 * place + 1] = gradients[lane].y;
      }
      if (problem.grad_logits) {
        const C product = row.attention(first + lane) * gradients[lane].mean;
        static_cast<C*>(problem.grad_logits)[place] = product;
        products[lane] += product;
      }
      powers[lane] += gradients[lane].power;
    });
  }
  if (problem.grad_logits) {
    team.sum(products);
    team.all([&](int lane) {
      for (Index i = lane; i < row.count; i += team.lanes) {
        static_cast<C*>(problem.grad_logits)[index * row.count + i] -= row.attention(i) * products[lane];
      }
    });
  }
  if (!problem.power_parts) return;
  team.sum(powers);
  team.all([&](int lane) {
    if (lane == 0) static_cast<C*>(problem.power_parts)[index] = powers[lane];
  });
}

// Elements of value that a lane takes at a time: as many as 16 bytes hold, where all rows begin at a multiple of that.
template <typename T>
bool reads_vectors(const PointProblem& problem) {
  constexpr Index V = 16 / sizeof(T);
  const Index strides = problem.value_batch_stride | problem.value_token_stride | problem.value_head_stride;
  const auto address = reinterpret_cast<uintptr_t>(problem.value) | reinterpret_cast<uintptr_t>(problem.output) |
                       reinterpret_cast<uintptr_t>(problem.grad_output) |
                       reinterpret_cast<uintptr_t>(problem.grad_value);
  return problem.depth % V == 0 && strides % V == 0 && address % 16 == 0;
}

inline int lanes_for(Index depth, int vector) {
  int lanes = 1;
  while (lanes < kWarp && lanes * vector < depth) lanes *= 2;
  return lanes;
}

// Calls run.template operator()<V, T, C>() for the dtype of value.
template <typename Run>
const char* choose_point_types(const PointProblem& problem, ValueType type, const Run& run) {
  switch (type) {
    case ValueType::float64:
      return reads_vectors<double>(problem) ? run.template go<2, double, double>() : run.template go<1, double, double>();
    case ValueType::float32:
      return reads_vectors<float>(problem) ? run.template go<4, float, float>() : run.template go<1, float, float>();
    case ValueType::bfloat16:
      return reads_vectors<BFloat16>(problem) ? run.template go<8, BFloat16, float>()
                                              : run.template go<1, BFloat16, float>();
    case ValueType::float16:
      return reads_vectors<Float16>(problem) ? run.template go<8, Float16, float>()
                                             : run.template go<1, Float16, float>();
  }
  return "unknown dtype";
}

inline Index rows_of(const PointProblem& problem) { return problem.batch * problem.queries * problem.heads; }

}  // namespace boltz_mm::cuda
