// What a warp of each kernel does for cluster attention, written against a Warp (see warp.h): pairs, rows, forward.
//
// A warp has one query of one head, or one key of one head in the second half of backward.  It takes 32 pairs at a
// time: each lane finds one pair and what is added to its logit; then groups of lanes, each as wide as a row, multiply
// rows with coalesced loads; then each lane has the softmax weight of its pair; then the groups add up weighted rows.
// Neighbouring queries, and the keys of a cluster, are taken by one block, so that its L1 cache serves the rows that
// they share.  Nothing is stored for a pair: backward finds its logit again.  No atomics: sums have a fixed order.

#pragma once

#include "cluster_attention.h"
#include "warp.h"

namespace boltz_mm::cuda {

constexpr int kClusterTurns = 4;  // rows that a group of lanes multiplies at a time

// The pairs that the lanes of a warp have in hand; `other` is the row of the other side, negative where there is none.
template <typename C>
struct ClusterTile {
  Index other[kWarp];
  C first[kWarp], second[kWarp];
};

// The row of a task: tasks are images times heads times rows.
struct ClusterPlace {
  Index image, head, row;

  BOLTZ_MM_DEVICE ClusterPlace(const ClusterProblem& problem, Index rows, Index task) {
    const Index of_head = quotient(task, rows);
    row = task - of_head * rows;
    image = quotient(of_head, problem.heads);
    head = of_head - image * problem.heads;
  }
};

template <typename T>
BOLTZ_MM_DEVICE const T* rows_of(const ClusterRows& rows, const ClusterPlace& place) {
  return static_cast<const T*>(rows.data) + place.image * rows.batch_stride + place.head * rows.head_stride;
}

// How a warp is divided: `width` lanes share the channels of a row, each group of them takes other rows.
template <int V>
struct RowLanes {
  int width, groups;
  Index chunk, depth;

  BOLTZ_MM_DEVICE explicit RowLanes(Index depth) : width(1), depth(depth) {
    while (width < kWarp && width * V < depth) width *= 2;
    groups = kWarp / width;
    chunk = width * V;
  }
  BOLTZ_MM_DEVICE Index channel(int lane) const { return lane % width * V; }
  // Chunks of channels, of which there is one at least.
  BOLTZ_MM_DEVICE bool has_chunk(Index first) const { return first == 0 || first < depth; }
};

// -------------------------------------------------------------------------------------------------------- pairs ----

BOLTZ_MM_DEVICE Index cluster_id(const ClusterProblem& problem, Index image, Index place) {
  const Index at = image * problem.nearest_batch_stride + place;
  return problem.nearest_is_wide ? static_cast<const int64_t*>(problem.nearest)[at]
                                 : static_cast<const int32_t*>(problem.nearest)[at];
}

// The key of a query's slot, -1 where there is none; a padded slot counts as key 0.
BOLTZ_MM_DEVICE Index key_of(const ClusterProblem& problem, Index image, Index query, Index slot, bool& padded) {
  padded = false;
  if (problem.sees_all) return slot;
  const Index list = quotient(slot, problem.cluster_size);
  const Index id = cluster_id(problem, image, query * problem.lists + list);
  if (id < 0 || id >= problem.clusters) return -1;
  const Index key = id * problem.cluster_size + (slot - list * problem.cluster_size);
  padded = key >= problem.keys;
  return padded ? 0 : key;
}

template <typename C>
BOLTZ_MM_DEVICE C bounded(C x, C bound) {  // NaN stays
  const C above = x < -bound ? -bound : x;
  return above > bound ? bound : above;
}

template <typename C>
BOLTZ_MM_DEVICE void find_features(const ClusterProblem& problem, Index image, Index query, Index key, C* five) {
  const C* from = static_cast<const C*>(problem.query_pos) + image * problem.query_pos_batch_stride + 2 * query;
  const C* to = static_cast<const C*>(problem.key_pos) + image * problem.key_pos_batch_stride + 2 * key;
  const C bound = static_cast<C>(problem.max_offset);
  const C dx = bounded(to[0] - from[0], bound), dy = bounded(to[1] - from[1], bound);
  const C square = dx * dx + dy * dy, distance = square_root(square);
  const C inverse = square == 0 ? C(0) : C(1) / distance;
  five[0] = dx;
  five[1] = dy;
  five[2] = distance;
  five[3] = dy * inverse;
  five[4] = dx * inverse;
}

// What is added to the logit of a pair; leaves its features, zeros where they are of no use.
template <typename C>
BOLTZ_MM_DEVICE C find_bias(const ClusterProblem& problem, const ClusterPlace& place, Index query, Index key,
                            bool padded, C* five) {
  C sum = problem.bias ? static_cast<const C*>(problem.bias)[place.head] : C(0);
  if (padded) sum -= C(100);
  if (!problem.bias_weight) return sum;
  find_features<C>(problem, place.image, query, key, five);
  const C* weight = static_cast<const C*>(problem.bias_weight) + place.head * kClusterFeatures;
  BOLTZ_MM_UNROLL
  for (int f = 0; f < kClusterFeatures; ++f) sum += weight[f] * five[f];
  return sum;
}

// --------------------------------------------------------------------------------------------------------- rows ----

// Products of a row with those of the first `count` pairs of the tile.
template <int V, typename T, typename C, typename Warp>
BOLTZ_MM_DEVICE void multiply_rows(Warp& warp, const RowLanes<V>& lanes, const T* row, const T* others, Index stride,
                                   int count, const ClusterTile<C>& tile, C* to) {
  for (int start = 0; start < count; start += kClusterTurns * lanes.groups) {
    typename Warp::template Lanes<Numbers<C, kClusterTurns>> products;
    warp.each([&](int lane) {
      products[lane].clear();
      for (Index c = lanes.channel(lane); c < lanes.depth; c += lanes.chunk) {
        C own[V];
        load<V>(row + c, own);
        BOLTZ_MM_UNROLL
        for (int turn = 0; turn < kClusterTurns; ++turn) {
          const int pair = start + turn * lanes.groups + lane / lanes.width;
          if (pair >= count || tile.other[pair] < 0) continue;
          C other[V];
          load<V>(others + tile.other[pair] * stride + c, other);
          BOLTZ_MM_UNROLL
          for (int v = 0; v < V; ++v) products[lane].x[turn] += own[v] * other[v];
        }
      }
    });
    warp.sum(products, 1, lanes.width);
    warp.each([&](int lane) {
      if (lane % lanes.width != 0) return;
      BOLTZ_MM_UNROLL
      for (int turn = 0; turn < kClusterTurns; ++turn) {
        const int pair = start + turn * lanes.groups + lane / lanes.width;
        if (pair < count) to[pair] = products[lane].x[turn];
      }
    });
  }
}

// The product of a row with a parameter [D] of the head, in all lanes.
template <int V, typename T, typename C, typename Warp>
BOLTZ_MM_DEVICE void multiply_parameter(Warp& warp, const RowLanes<V>& lanes, const T* row, const void* parameter,
                                        Index head, typename Warp::template Lanes<Numbers<C, 1>>& product) {
  const C* other = static_cast<const C*>(parameter) + head * lanes.depth;
  warp.each([&](int lane) {
    product[lane].clear();
    for (Index c = lanes.channel(lane); c < lanes.depth; c += lanes.chunk) {
      C own[V];
      load<V>(row + c, own);
      BOLTZ_MM_UNROLL
      for (int v = 0; v < V; ++v) product[lane].x[0] += own[v] * other[c + v];
    }
  });
  warp.sum(product, 1, lanes.width);
}

// A lane's part of a sum of the rows of the tile, each times one of N weights.
template <int V, int N, typename T, typename C>
BOLTZ_MM_DEVICE void add_rows(int lane, const RowLanes<V>& lanes, const T* rows, Index stride, Index first, int count,
                              const ClusterTile<C>& tile, const C* const (&weights)[N], C* const (&sums)[N]) {
  const Index c = first + lanes.channel(lane);
  if (c >= lanes.depth) return;
#ifdef __CUDACC__
#pragma unroll 4
#endif
  for (int pair = lane / lanes.width; pair < count; pair += lanes.groups) {
    if (tile.other[pair] < 0) continue;
    C row[V];
    load<V>(rows + tile.other[pair] * stride + c, row);
    BOLTZ_MM_UNROLL
    for (int n = 0; n < N; ++n) {
      const C weight = weights[n][pair];
      BOLTZ_MM_UNROLL
      for (int v = 0; v < V; ++v) sums[n][v] += weight * row[v];
    }
  }
}

// A sum that all groups of lanes hold, stored by the first of them.
template <int V, typename T, typename C>
BOLTZ_MM_DEVICE void store_sum(int lane, const RowLanes<V>& lanes, Index first, const C (&sum)[V], C factor, T* to) {
  const Index c = first + lanes.channel(lane);
  if (lane >= lanes.width || c >= lanes.depth) return;
  C result[V];
  BOLTZ_MM_UNROLL
  for (int v = 0; v < V; ++v) result[v] = sum[v] * factor;
  store<V>(result, to + c);
}

BOLTZ_MM_DEVICE int pairs_at(Index start, Index end) {
  return end - start < kWarp ? static_cast<int>(end - start) : kWarp;
}

// ----------------------------------------------------------------------------------------------------- forward ----

// One (image, head, query).
template <int V, typename T, typename C>
struct ClusterForward {
  using Compute = C;

  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const ClusterProblem& problem, Index task, ClusterTile<C>& tile) {
    using One = typename Warp::template Lanes<Numbers<C, 1>>;
    const ClusterPlace place(problem, problem.queries, task);
    const RowLanes<V> lanes(problem.depth);
    const T* query = rows_of<T>(problem.query, place) + place.row * problem.query.row_stride;
    const T* keys = rows_of<T>(problem.key, place);
    const T* values = rows_of<T>(problem.value, place);
    const Index slots = problem.lists * problem.cluster_size;
    const Index to = (place.image * problem.queries + place.row) * problem.heads + place.head;
    const C scale = static_cast<C>(problem.scale);
    for (Index first = 0; lanes.has_chunk(first); first += lanes.chunk) {
      typename Warp::template Lanes<Numbers<C, V>> sums;
      One tops, totals;  // the largest logit so far, in all lanes; sums of a lane's weights in relation to it
      if (problem.blank_key) multiply_parameter<V, T, C>(warp, lanes, query, problem.blank_key, place.head, tops);
      warp.each([&](int lane) {
        sums[lane].clear();
        totals[lane].clear();
        if (!problem.blank_key) {
          tops[lane].x[0] = -INFINITY;
          return;
        }
        tops[lane].x[0] *= scale;
        if (lane == 0) totals[lane].x[0] = 1;
        const Index c = first + lanes.channel(lane);
        if (lane >= lanes.width || c >= lanes.depth) return;
        const C* blank = static_cast<const C*>(problem.blank_value) + place.head * problem.depth + c;
        BOLTZ_MM_UNROLL
        for (int v = 0; v < V; ++v) sums[lane].x[v] = blank[v];
      });
      for (Index start = 0; start < slots; start += kWarp) {
        const int count = pairs_at(start, slots);
        One logits, most;
        warp.each([&](int lane) {
          bool padded = false;
          const Index key =
              lane < count ? key_of(problem, place.image, place.row, start + lane, padded) : Index{-1};
          tile.other[lane] = key;
          C five[kClusterFeatures];
          logits[lane].x[0] = key < 0 ? C(0) : find_bias<C>(problem, place, place.row, key, padded, five);
        });
        multiply_rows<V, T, C>(warp, lanes, query, keys, problem.key.row_stride, count, tile, tile.first);
        warp.each([&](int lane) {
          if (tile.other[lane] < 0) {
            most[lane].x[0] = -INFINITY;
            return;
          }
          logits[lane].x[0] += scale * tile.first[lane];
          const C logit = logits[lane].x[0];
          most[lane].x[0] = logit == logit ? logit : C(-INFINITY);
        });
        warp.largest(most);
        warp.each([&](int lane) {
          const C before = tops[lane].x[0], top = most[lane].x[0] > before ? most[lane].x[0] : before;
          const C factor = top == before ? C(1) : exponential(before - top);
          const C weight = tile.other[lane] < 0 ? C(0) : exponential(logits[lane].x[0] - top);
          tops[lane].x[0] = top;
          tile.second[lane] = weight;
          totals[lane].x[0] = totals[lane].x[0] * factor + weight;
          BOLTZ_MM_UNROLL
          for (int v = 0; v < V; ++v) sums[lane].x[v] *= factor;
        });
        warp.each([&](int lane) {
          add_rows<V, 1>(lane, lanes, values, problem.value.row_stride, first, count, tile, {tile.second},
                         {sums[lane].x});
        });
      }
      warp.sum(totals, 1, kWarp);
      warp.sum(sums, lanes.width, kWarp);
      warp.each([&](int lane) {
        const C total = totals[lane].x[0];
        const C share = total == 0 ? C(0) : C(1) / total;
        store_sum<V>(lane, lanes, first, sums[lane].x, share, static_cast<T*>(problem.output) + to * problem.depth);
        if (lane != 0 || first != 0) return;
        static_cast<C*>(problem.normalizer)[2 * to] = tops[lane].x[0];
        static_cast<C*>(problem.normalizer)[2 * to + 1] = total;
      });
    }
  }
};

}  // namespace boltz_mm::cuda
