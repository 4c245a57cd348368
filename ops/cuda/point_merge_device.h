// What a warp of each kernel does for weighted sums over neighbours, forward and backward.
//
// Everything is written against a Warp (see warp.h), so that the tests run the same code on a CPU.  No atomics: a row
// of feat has one warp, which adds up its gradient in the order of the points.

#pragma once

#include "point_merge.h"
#include "warp.h"

namespace boltz_mm::cuda {

constexpr int kMergeInner = 4;  // inner channels at a time
constexpr int kMergePacks = 2;  // vectors of channels that a lane holds

BOLTZ_MM_DEVICE float error_function(float x) { return erff(x); }
BOLTZ_MM_DEVICE double error_function(double x) { return erf(x); }

// The pairs (point, row of feat) that the lanes of a warp have in hand; `other` is negative where there is none.
template <typename C>
struct PairTile {
  Index other[kWarp];  // row of feat (forward), point (backward)
  Index place[kWarp];  // in [N, K]
  C weight[kWarp][kMergeInner];
};

BOLTZ_MM_DEVICE Index cluster_at(const MergeProblem& problem, Index b, Index place) {
  const Index at = b * problem.nearest_batch_stride + place;
  return problem.nearest_is_wide ? static_cast<const int64_t*>(problem.nearest)[at]
                                 : static_cast<const int32_t*>(problem.nearest)[at];
}

BOLTZ_MM_DEVICE Index slots_of(const MergeProblem& problem) { return problem.count * problem.cluster_size; }

// The row of feat at a place in [N, K]; -1 where there is none.
BOLTZ_MM_DEVICE Index row_at(const MergeProblem& problem, Index b, Index place) {
  const Index entry = quotient(place, problem.cluster_size);
  const Index cluster = cluster_at(problem, b, entry);
  if (cluster < 0 || cluster >= problem.rows) return -1;  // before the product, which could overflow
  const Index row = cluster * problem.cluster_size + (place - entry * problem.cluster_size);
  return row < problem.rows ? row : -1;
}

// The weights of one pair before they are multiplied by importance.
template <typename C>
struct OffsetWeights {
  C five[5];
  C mean, deviation;
  const C *weight, *bias, *gain, *shift;

  BOLTZ_MM_DEVICE OffsetWeights(const MergeProblem& problem, Index b, Index point, Index row)
      : weight(static_cast<const C*>(problem.weight)), bias(static_cast<const C*>(problem.bias)),
        gain(static_cast<const C*>(problem.norm_weight)), shift(static_cast<const C*>(problem.norm_bias)) {
    const C* query = static_cast<const C*>(problem.query_pos) + b * problem.query_batch_stride + 2 * point;
    const C* key = static_cast<const C*>(problem.key_pos) + b * problem.key_batch_stride + 2 * row;
    const C limit = static_cast<C>(problem.max_offset), sign = static_cast<C>(problem.sign);
    const C dx = clamped((key[0] - query[0]) * sign, limit), dy = clamped((key[1] - query[1]) * sign, limit);
    const C square = dx * dx + dy * dy, distance = square_root(square);
    five[0] = dx;
    five[1] = dy;
    five[2] = distance;
    five[3] = square == 0 ? C(0) : dy / distance;
    five[4] = square == 0 ? C(0) : dx / distance;
    C sum = 0, squares = 0;
    for (Index i = 0; i < problem.inner; ++i) sum += hidden(i);
    mean = sum / static_cast<C>(problem.inner);
    for (Index i = 0; i < problem.inner; ++i) squares += (hidden(i) - mean) * (hidden(i) - mean);
    deviation = C(1) / square_root(squares / static_cast<C>(problem.inner) + static_cast<C>(problem.eps));
  }

  BOLTZ_MM_DEVICE C hidden(Index i) const {
    C sum = bias[i];
    BOLTZ_MM_UNROLL
    for (int f = 0; f < 5; ++f) sum += weight[i * 5 + f] * five[f];
    return sum;
  }
  BOLTZ_MM_DEVICE C normalized(Index i) const { return (hidden(i) - mean) * deviation; }
  BOLTZ_MM_DEVICE C before_gelu(Index i) const { return normalized(i) * gain[i] + shift[i]; }
  BOLTZ_MM_DEVICE C activation(Index i) const {
    const C x = before_gelu(i);
    return x * share_below(x);
  }
  BOLTZ_MM_DEVICE C slope(Index i) const {
    const C x = before_gelu(i);
    return share_below(x) + x * exponential(x * x * C(-0.5)) * C(0.39894228040143268);
  }

 private:
  static BOLTZ_MM_DEVICE C share_below(C x) {
    return C(0.5) * error_function(x * C(0.70710678118654752)) + C(0.5);
  }
  static BOLTZ_MM_DEVICE C clamped(C x, C limit) {
    const C above = x < -limit ? -limit : x;
    return above > limit ? limit : above;
  }
};

template <typename C>
BOLTZ_MM_DEVICE C importance_of(const MergeProblem& problem, Index b, Index row) {
  return problem.importance ? static_cast<const C*>(problem.importance)[b * problem.rows + row] : C(1);
}

// Weights of inner channels first .. first + 3 of a pair; 0 beyond the last.
template <typename C>
BOLTZ_MM_DEVICE void find_weights(const MergeProblem& problem, Index b, Index point, Index place, Index row,
                                  Index first, C (&to)[kMergeInner]) {
  if (problem.given) {
    const C* from = static_cast<const C*>(problem.weights) + (b * problem.points * slots_of(problem) + place) *
                    problem.inner + first;
    for (int k = 0; k < kMergeInner; ++k) to[k] = first + k < problem.inner ? from[k] : C(0);
    return;
  }
  const OffsetWeights<C> weights(problem, b, point, row);
  const C importance = importance_of<C>(problem, b, row);
  for (int k = 0; k < kMergeInner; ++k) {
    to[k] = first + k < problem.inner ? weights.activation(first + k) * importance : C(0);
  }
}

// How a warp is divided: `width` lanes share the channels, each group of them takes other pairs.
template <int V>
struct Division {
  int width, chunk;

  BOLTZ_MM_DEVICE explicit Division(Index channels) : width(1) {
    while (width < kWarp && width * V < channels) width *= 2;
    chunk = width * V * kMergePacks;
  }
  // First channel of a lane's vector q, counted from the start of the chunk.
  BOLTZ_MM_DEVICE Index channel(int lane, int q) const { return (q * width + lane % width) * V; }
};

// ---------------------------------------------------------------------------------------------------- forward ----

// One (image, point).
template <int V, typename T, typename C, typename Warp>
BOLTZ_MM_DEVICE void merge_point(Warp& warp, const MergeProblem& problem, Index task, PairTile<C>& tile) {
  using Sums = Numbers<C, kMergeInner * kMergePacks * V>;
  const Index b = quotient(task, problem.points), point = task - b * problem.points;
  const Index slots = slots_of(problem), channels = problem.channels;
  const T* feat = static_cast<const T*>(problem.feat) + b * problem.feat_batch_stride;
  T* output = static_cast<T*>(problem.output) + task * problem.inner * channels;
  const Division<V> division(channels);
  const int groups = kWarp / division.width;
  for (Index first = 0; first < channels; first += division.chunk) {
    for (Index i = 0; i < problem.inner; i += kMergeInner) {
      typename Warp::template Lanes<Sums> sums;
      warp.each([&](int lane) { sums[lane].clear(); });
      for (Index slot = 0; slot < slots; slot += kWarp) {
        warp.each([&](int lane) {
          const Index place = point * slots + slot + lane;
          const Index row = slot + lane < slots ? row_at(problem, b, place) : -1;
          tile.other[lane] = row;
          if (row >= 0) find_weights<C>(problem, b, point, place, row, i, tile.weight[lane]);
        });
        warp.each([&](int lane) {
          C* total = sums[lane].x;
          for (int p = lane / division.width; p < kWarp; p += groups) {
            const Index row = tile.other[p];
            if (row < 0) continue;
            BOLTZ_MM_UNROLL
            for (int q = 0; q < kMergePacks; ++q) {
              const Index c = first + division.channel(lane, q);
              if (c >= channels) continue;
              C x[V];
              load<V>(feat + row * problem.feat_row_stride + c, x);
              BOLTZ_MM_UNROLL
              for (int k = 0; k < kMergeInner; ++k) {
                const C weight = tile.weight[p][k];
                BOLTZ_MM_UNROLL
                for (int v = 0; v < V; ++v) total[(k * kMergePacks + q) * V + v] += weight * x[v];
              }
            }
          }
        });
      }
      warp.sum(sums, division.width, kWarp);
      warp.each([&](int lane) {
        if (lane >= division.width) return;
        BOLTZ_MM_UNROLL
        for (int k = 0; k < kMergeInner; ++k) {
          BOLTZ_MM_UNROLL
          for (int q = 0; q < kMergePacks; ++q) {
            const Index c = first + division.channel(lane, q);
            if (c >= channels || i + k >= problem.inner) continue;
            C result[V];
            BOLTZ_MM_UNROLL
            for (int v = 0; v < V; ++v) result[v] = sums[lane].x[(k * kMergePacks + q) * V + v];
            store<V>(result, output + (i + k) * channels + c);
          }
        }
      });
    }
  }
}

// --------------------------------------------------------------------------------------------------- backward ----

// The places in nearest that name a row's cluster: from begin to end of the sorted ones.
struct Places {
  const Index* order;
  Index begin, end;

  BOLTZ_MM_DEVICE Places(const MergeProblem& problem, Index b, Index row)
      : order(problem.order + b * problem.nearest_batch_stride) {
    const Index cluster = quotient(row, problem.cluster_size);
    begin = first_from(problem, b, cluster);
    end = first_from(problem, b, cluster + 1);
  }

 private:
  BOLTZ_MM_DEVICE Index first_from(const MergeProblem& problem, Index b, Index cluster) const {
    Index low = 0, high = problem.points * problem.count;
    while (low < high) {
      const Index middle = (low + high) / 2;
      if (cluster_at(problem, b, order[middle]) < cluster) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// The point of a place in nearest, and where in [N, K] its pair with a row is.
BOLTZ_MM_DEVICE Index locate(const MergeProblem& problem, Index entry, Index row, Index& place) {
  const Index point = quotient(entry, problem.count);
  place = entry * problem.cluster_size + row % problem.cluster_size;
  return point;
}

// One (image, row of feat): its gradient, and those of the weights of its pairs.
template <int V, typename T, typename C, typename Warp>
BOLTZ_MM_DEVICE void merge_row_backward(Warp& warp, const MergeProblem& problem, Index task, PairTile<C>& tile) {
  using Sums = Numbers<C, kMergePacks * V>;
  using Products = Numbers<C, kMergeInner>;
  const Index b = quotient(task, problem.rows), row = task - b * problem.rows;
  const Index channels = problem.channels, inner = problem.inner, slots = slots_of(problem);
  const T* feat = static_cast<const T*>(problem.feat) + b * problem.feat_batch_stride + row * problem.feat_row_stride;
  const T* grad_output = static_cast<const T*>(problem.grad_output) + b * problem.points * inner * channels;
  T* grad_feat = static_cast<T*>(problem.grad_feat) + task * channels;
  C* grad_weights = static_cast<C*>(problem.grad_weights) + b * problem.points * slots * inner;
  const Places places(problem, b, row);
  const Division<V> division(channels);
  const int groups = kWarp / division.width;
  for (Index first = 0; first < channels; first += division.chunk) {
    typename Warp::template Lanes<Sums> sums, features;
    warp.each([&](int lane) {
      sums[lane].clear();
      features[lane].clear();
      BOLTZ_MM_UNROLL
      for (int q = 0; q < kMergePacks; ++q) {
        const Index c = first + division.channel(lane, q);
        if (c >= channels) continue;
        C x[V];
        load<V>(feat + c, x);
        BOLTZ_MM_UNROLL
        for (int v = 0; v < V; ++v) features[lane].x[q * V + v] = x[v];
      }
    });
    for (Index i = 0; i < inner; i += kMergeInner) {
      for (Index start = places.begin; start < places.end; start += kWarp) {
        warp.each([&](int lane) {
          tile.other[lane] = -1;
          if (start + lane >= places.end) return;
          const Index point = locate(problem, places.order[start + lane], row, tile.place[lane]);
          tile.other[lane] = point;
          find_weights<C>(problem, b, point, tile.place[lane], row, i, tile.weight[lane]);
        });
        for (int turn = 0; turn < kWarp; turn += groups) {
          typename Warp::template Lanes<Products> products;
          warp.each([&](int lane) {
            products[lane].clear();
            const int p = turn + lane / division.width;
            const Index point = tile.other[p];
            if (point < 0) return;
            BOLTZ_MM_UNROLL
            for (int q = 0; q < kMergePacks; ++q) {
              const Index c = first + division.channel(lane, q);
              if (c >= channels) continue;
              BOLTZ_MM_UNROLL
              for (int k = 0; k < kMergeInner; ++k) {
                if (i + k >= inner) continue;
                C gradient[V];
                load<V>(grad_output + (point * inner + i + k) * channels + c, gradient);
                const C weight = tile.weight[p][k];
                BOLTZ_MM_UNROLL
                for (int v = 0; v < V; ++v) {
                  products[lane].x[k] += gradient[v] * features[lane].x[q * V + v];
                  sums[lane].x[q * V + v] += gradient[v] * weight;
                }
              }
            }
          });
          warp.sum(products, 1, division.width);
          warp.each([&](int lane) {
            const int p = turn + lane / division.width;
            if (lane % division.width != 0 || tile.other[p] < 0) return;
            C* to = grad_weights + tile.place[p] * inner + i;
            for (int k = 0; k < kMergeInner && i + k < inner; ++k) to[k] += products[lane].x[k];
          });
        }
      }
    }
    warp.sum(sums, division.width, kWarp);
    warp.each([&](int lane) {
      if (lane >= division.width) return;
      BOLTZ_MM_UNROLL
      for (int q = 0; q < kMergePacks; ++q) {
        const Index c = first + division.channel(lane, q);
        if (c >= channels) continue;
        C result[V];
        BOLTZ_MM_UNROLL
        for (int v = 0; v < V; ++v) result[v] = sums[lane].x[q * V + v];
        store<V>(result, grad_feat + c);
      }
    });
  }
}

// Gradients of the parameters of inner channel i from one pair.
template <typename C>
BOLTZ_MM_DEVICE void add_parameters(const OffsetWeights<C>& weights, const C* grad, C importance, Index i, Index inner,
                                    C* sums) {
  C mean = 0, mean_product = 0;
  for (Index k = 0; k < inner; ++k) {
    const C normalized = grad[k] * importance * weights.slope(k) * weights.gain[k];
    mean += normalized;
    mean_product += normalized * weights.normalized(k);
  }
  const C before_gelu = grad[i] * importance * weights.slope(i), normalized = weights.normalized(i);
  const C count = static_cast<C>(inner);
  const C hidden = (before_gelu * weights.gain[i] - mean / count - normalized * mean_product / count) * weights.deviation;
  BOLTZ_MM_UNROLL
  for (int f = 0; f < 5; ++f) sums[f] += hidden * weights.five[f];
  sums[5] += hidden;
  sums[6] += before_gelu * normalized;
  sums[7] += before_gelu;
}

// One block of rows: the gradients of importance, and its part of those of the parameters.
template <typename C, typename Warp>
BOLTZ_MM_DEVICE void merge_parameters_backward(Warp& warp, const MergeProblem& problem, Index task) {
  const Index blocks = (problem.rows + kMergeRows - 1) / kMergeRows, inner = problem.inner;
  const Index b = quotient(task, blocks), begin = (task - b * blocks) * kMergeRows;
  const Index end = begin + kMergeRows < problem.rows ? begin + kMergeRows : problem.rows;
  const C* grad_weights = static_cast<const C*>(problem.grad_weights) + b * problem.points * slots_of(problem) * inner;
  for (Index i = -1; i < inner; ++i) {  // -1: importance
    typename Warp::template Lanes<Numbers<C, kMergeSums>> sums;
    warp.each([&](int lane) { sums[lane].clear(); });
    for (Index row = begin; row < end; ++row) {
      if (i < 0 && !problem.grad_importance) break;
      const Places places(problem, b, row);
      typename Warp::template Lanes<Numbers<C, 1>> of_importance;
      warp.each([&](int lane) {
        of_importance[lane].clear();
        for (Index at = places.begin + lane; at < places.end; at += kWarp) {
          Index place;
          const Index point = locate(problem, places.order[at], row, place);
          const OffsetWeights<C> weights(problem, b, point, row);
          const C* grad = grad_weights + place * inner;
          if (i < 0) {
            for (Index k = 0; k < inner; ++k) of_importance[lane].x[0] += grad[k] * weights.activation(k);
          } else {
            add_parameters(weights, grad, importance_of<C>(problem, b, row), i, inner, sums[lane].x);
          }
        }
      });
      if (i >= 0) continue;
      warp.sum(of_importance, 1, kWarp);
      warp.each([&](int lane) {
        if (lane == 0) static_cast<C*>(problem.grad_importance)[b * problem.rows + row] = of_importance[lane].x[0];
      });
    }
    if (i < 0) continue;
    warp.sum(sums, 1, kWarp);
    warp.each([&](int lane) {
      if (lane != 0) return;
      for (int k = 0; k < kMergeSums; ++k) {
        problem.partial_sums[(task * inner + i) * kMergeSums + k] = static_cast<double>(sums[lane].x[k]);
      }
    });
  }
}

// One number of grad_parameters.
template <typename C, typename Warp>
BOLTZ_MM_DEVICE void merge_sum_parts(Warp& warp, const MergeProblem& problem, Index task) {
  const Index parts = problem.parts, step = problem.inner * kMergeSums;
  typename Warp::template Lanes<Numbers<double, 1>> sums;
  warp.each([&](int lane) {
    sums[lane].clear();
    for (Index part = lane; part < parts; part += kWarp) sums[lane].x[0] += problem.partial_sums[part * step + task];
  });
  warp.sum(sums, 1, kWarp);
  warp.each([&](int lane) {
    if (lane == 0) static_cast<C*>(problem.grad_parameters)[task] = static_cast<C>(sums[lane].x[0]);
  });
}

// ---------------------------------------------------------------------------------------------------- launches ----

template <int V, typename T, typename C>
struct MergePoint {
  using Compute = C;
  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const MergeProblem& problem, Index task, PairTile<C>& tile) {
    merge_point<V, T, C>(warp, problem, task, tile);
  }
};

template <int V, typename T, typename C>
struct MergeRowBackward {
  using Compute = C;
  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const MergeProblem& problem, Index task, PairTile<C>& tile) {
    merge_row_backward<V, T, C>(warp, problem, task, tile);
  }
};

template <typename C>
struct MergeParametersBackward {
  using Compute = C;
  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const MergeProblem& problem, Index task, PairTile<C>&) {
    merge_parameters_backward<C>(warp, problem, task);
  }
};

template <typename C>
struct MergeSumParts {
  using Compute = C;
  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const MergeProblem& problem, Index task, PairTile<C>&) {
    merge_sum_parts<C>(warp, problem, task);
  }
};

inline bool in_vectors(const MergeProblem& problem, const void* second, Index vector) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(problem.feat) | reinterpret_cast<uintptr_t>(second) |
                              reinterpret_cast<uintptr_t>(problem.grad_feat);
  return problem.channels % vector == 0 && problem.feat_row_stride % vector == 0 &&
         problem.feat_batch_stride % vector == 0 && addresses % 16 == 0;
}

// run.operator()<Pass>(tasks) for every pass in turn; it returns null or an error.
template <typename T, typename C, typename Run>
const char* run_merge(const MergeProblem& problem, const Run& run) {
  constexpr int V = 16 / sizeof(T);
  const Index tasks = problem.batch * problem.points;
  if (in_vectors(problem, problem.output, V)) return run.template operator()<MergePoint<V, T, C>>(tasks);
  return run.template operator()<MergePoint<1, T, C>>(tasks);
}

template <typename T, typename C, typename Run>
const char* run_merge_backward(const MergeProblem& problem, const Run& run) {
  constexpr int V = 16 / sizeof(T);
  const Index tasks = problem.batch * problem.rows;
  const char* error = in_vectors(problem, problem.grad_output, V)
                          ? run.template operator()<MergeRowBackward<V, T, C>>(tasks)
                          : run.template operator()<MergeRowBackward<1, T, C>>(tasks);
  if (error || problem.given) return error;
  error = run.template operator()<MergeParametersBackward<C>>(problem.parts);
  return error ? error : run.template operator()<MergeSumParts<C>>(problem.inner * kMergeSums);
}

template <typename Run>
const char* choose_merge(const MergeProblem& problem, ValueType type, bool backward, const Run& run) {
  switch (type) {
    case ValueType::float64:
      return backward ? run_merge_backward<double, double>(problem, run) : run_merge<double, double>(problem, run);
    case ValueType::float32:
      return backward ? run_merge_backward<float, float>(problem, run) : run_merge<float, float>(problem, run);
    case ValueType::bfloat16:
      return backward ? run_merge_backward<BFloat16, float>(problem, run) : run_merge<BFloat16, float>(problem, run);
    case ValueType::float16:
      return backward ? run_merge_backward<Float16, float>(problem, run) : run_merge<Float16, float>(problem, run);
  }
  return "unknown dtype";
}

}  // namespace boltz_mm::cuda
