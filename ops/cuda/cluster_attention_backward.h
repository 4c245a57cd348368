// Backward of cluster attention for a warp, see cluster_attention_device.h; and the passes that make up a call.

#pragma once

#include "cluster_attention_device.h"

namespace boltz_mm::cuda {

BOLTZ_MM_DEVICE Index numbers_of_part(const ClusterProblem& problem) { return kClusterBiases + 2 * problem.depth; }

BOLTZ_MM_DEVICE Index parts_of_image(const ClusterProblem& problem) {
  return (problem.queries + kClusterQueries - 1) / kClusterQueries;
}

// What backward reads of a query's softmax.
template <typename C>
struct ClusterSoftmax {
  C top, share;

  BOLTZ_MM_DEVICE ClusterSoftmax(const ClusterProblem& problem, Index at) {
    const C* normalizer = static_cast<const C*>(problem.normalizer) + 2 * at;
    top = normalizer[0];
    share = C(1) / normalizer[1];
  }
  BOLTZ_MM_DEVICE C probability(C logit) const { return exponential(logit - top) * share; }
};

// One (image, head, block of queries): gradients of the queries, and a part of those of the parameters.
//
// With the probability p and the product g of a pair, its logit has the gradient p (g - mean), mean = sum of p g.  The
// mean is known at the end only, so that sums of p g and of p are taken apart.
template <int V, typename T, typename C>
struct ClusterBackwardQueries {
  using Compute = C;

  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const ClusterProblem& problem, Index task, ClusterTile<C>& tile) {
    using One = typename Warp::template Lanes<Numbers<C, 1>>;
    using Part = typename Warp::template Lanes<Numbers<C, V>>;
    using Biases = typename Warp::template Lanes<Numbers<C, kClusterBiases>>;
    const ClusterPlace place(problem, parts_of_image(problem), task);
    const RowLanes<V> lanes(problem.depth);
    const Index begin = place.row * kClusterQueries, slots = problem.lists * problem.cluster_size;
    const Index end = begin + kClusterQueries < problem.queries ? begin + kClusterQueries : problem.queries;
    const T* keys = rows_of<T>(problem.key, place);
    const T* values = rows_of<T>(problem.value, place);
    const C scale = static_cast<C>(problem.scale);
    const Index part = place.head * problem.parts + place.image * parts_of_image(problem) + place.row;
    C* partial = static_cast<C*>(problem.partial_sums) + part * numbers_of_part(problem);
    for (Index first = 0; lanes.has_chunk(first); first += lanes.chunk) {
      Biases of_biases;
      Part of_blank_key, of_blank_value;
      warp.each([&](int lane) {
        of_biases[lane].clear();
        of_blank_key[lane].clear();
        of_blank_value[lane].clear();
      });
      for (Index n = begin; n < end; ++n) {
        const T* query = rows_of<T>(problem.query, place) + n * problem.query.row_stride;
        const T* grad = rows_of<T>(problem.grad_output, place) + n * problem.grad_output.row_stride;
        const Index at = (place.image * problem.queries + n) * problem.heads + place.head;
        const ClusterSoftmax<C> softmax(problem, at);
        Part products, plain;  // of the keys
        Biases product_biases, plain_biases;
        One mean, blank_probability, blank_product;
        warp.each([&](int lane) {
          products[lane].clear();
          plain[lane].clear();
          product_biases[lane].clear();
          plain_biases[lane].clear();
          mean[lane].clear();
        });
        if (problem.blank_key) {
          multiply_parameter<V, T, C>(warp, lanes, query, problem.blank_key, place.head, blank_probability);
          multiply_parameter<V, T, C>(warp, lanes, grad, problem.blank_value, place.head, blank_product);
          warp.each([&](int lane) {
            C& probability = blank_probability[lane].x[0];
            probability = softmax.probability(probability * scale);
            if (lane == 0) mean[lane].x[0] = probability * blank_product[lane].x[0];
          });
        }
        for (Index start = 0; start < slots; start += kWarp) {
          const int count = pairs_at(start, slots);
          Biases features;  // and 1, for the bias
          One logits;
          warp.each([&](int lane) {
            bool padded = false;
            const Index key = lane < count ? key_of(problem, place.image, n, start + lane, padded) : Index{-1};
            tile.other[lane] = key;
            features[lane].clear();
            features[lane].x[kClusterFeatures] = 1;
            if (key >= 0) logits[lane].x[0] = find_bias<C>(problem, place, n, key, padded, features[lane].x);
          });
          multiply_rows<V, T, C>(warp, lanes, query, keys, problem.key.row_stride, count, tile, tile.first);
          multiply_rows<V, T, C>(warp, lanes, grad, values, problem.value.row_stride, count, tile, tile.second);
          warp.each([&](int lane) {
            if (tile.other[lane] < 0) return;
            const C probability = softmax.probability(logits[lane].x[0] + scale * tile.first[lane]);
            const C product = probability * tile.second[lane];
            mean[lane].x[0] += product;
            BOLTZ_MM_UNROLL
            for (int f = 0; f < kClusterBiases; ++f) {
              product_biases[lane].x[f] += product * features[lane].x[f];
              plain_biases[lane].x[f] += probability * features[lane].x[f];
            }
            tile.first[lane] = probability;
            tile.second[lane] = product;
          });
          warp.each([&](int lane) {
            add_rows<V, 2>(lane, lanes, keys, problem.key.row_stride, first, count, tile, {tile.first, tile.second},
                           {plain[lane].x, products[lane].x});
          });
        }
        warp.sum(mean, 1, kWarp);
        warp.each([&](int lane) {
          const C of_query = mean[lane].x[0];
          BOLTZ_MM_UNROLL
          for (int v = 0; v < V; ++v) products[lane].x[v] -= of_query * plain[lane].x[v];
          BOLTZ_MM_UNROLL
          for (int f = 0; f < kClusterBiases; ++f) {
            of_biases[lane].x[f] += product_biases[lane].x[f] - of_query * plain_biases[lane].x[f];
          }
          if (lane == 0 && first == 0) static_cast<C*>(problem.means)[at] = of_query;
        });
        warp.sum(products, lanes.width, kWarp);
        warp.each([&](int lane) {
          const Index c = first + lanes.channel(lane);
          if (problem.blank_key && c < lanes.depth) {
            const C* blank = static_cast<const C*>(problem.blank_key) + place.head * problem.depth + c;
            const C probability = blank_probability[lane].x[0];
            const C gradient = probability * (blank_product[lane].x[0] - mean[lane].x[0]);
            C query_part[V], grad_part[V];
            load<V>(query + c, query_part);
            load<V>(grad + c, grad_part);
            BOLTZ_MM_UNROLL
            for (int v = 0; v < V; ++v) {
              products[lane].x[v] += gradient * blank[v];
              of_blank_key[lane].x[v] += gradient * scale * query_part[v];
              of_blank_value[lane].x[v] += probability * grad_part[v];
            }
          }
          store_sum<V>(lane, lanes, first, products[lane].x, scale,
                       static_cast<T*>(problem.grad_query) + at * problem.depth);
        });
      }
      warp.sum(of_biases, 1, kWarp);
      warp.each([&](int lane) {
        if (lane == 0 && first == 0) {
          for (int f = 0; f < kClusterBiases; ++f) partial[f] = of_biases[lane].x[f];
        }
        const Index c = first + lanes.channel(lane);
        if (lane >= lanes.width || c >= lanes.depth) return;
        for (int v = 0; v < V; ++v) {
          partial[kClusterBiases + c + v] = of_blank_key[lane].x[v];
          partial[kClusterBiases + problem.depth + c + v] = of_blank_value[lane].x[v];
        }
      });
    }
  }
};

// Where 32 clusters begin in the sorted order.
struct ClusterStarts {
  using Compute = float;

  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const ClusterProblem& problem, Index task, ClusterTile<float>&) {
    const Index count = problem.clusters + 1;
    warp.each([&](int lane) {
      const Index number = task * kWarp + lane, image = quotient(number, count), cluster = number - image * count;
      if (image > 0 && (problem.nearest_batch_stride == 0 || image >= problem.batch)) return;
      const Index* order = problem.order + image * problem.nearest_batch_stride;
      Index low = 0, high = problem.queries * problem.lists;
      while (low < high) {
        const Index middle = (low + high) / 2;
        if (cluster_id(problem, image, order[middle]) < cluster) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      problem.starts[number] = low;
    });
  }
};

// One (image, head, key): its gradient and that of its value.
template <int V, typename T, typename C>
struct ClusterBackwardKeys {
  using Compute = C;

  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const ClusterProblem& problem, Index task, ClusterTile<C>& tile) {
    using Part = typename Warp::template Lanes<Numbers<C, V>>;
    const ClusterPlace place(problem, problem.keys, task);
    const RowLanes<V> lanes(problem.depth);
    const T* key = rows_of<T>(problem.key, place) + place.row * problem.key.row_stride;
    const T* value = rows_of<T>(problem.value, place) + place.row * problem.value.row_stride;
    const T* queries = rows_of<T>(problem.query, place);
    const T* grads = rows_of<T>(problem.grad_output, place);
    const Index lists = problem.nearest_batch_stride ? place.image : 0;
    const Index* order = problem.order + lists * problem.nearest_batch_stride;
    const Index* starts = problem.starts + lists * (problem.clusters + 1);
    // Key 0 stands for the padded slots of the last cluster too.
    const Index padded_slots = problem.clusters * problem.cluster_size - problem.keys;
    const int turns = place.row == 0 && padded_slots > 0 ? 2 : 1;
    const C scale = static_cast<C>(problem.scale);
    for (Index first = 0; lanes.has_chunk(first); first += lanes.chunk) {
      Part of_key, of_value;
      warp.each([&](int lane) {
        of_key[lane].clear();
        of_value[lane].clear();
      });
      for (int turn = 0; turn < turns; ++turn) {
        const Index cluster = turn ? problem.clusters - 1 : quotient(place.row, problem.cluster_size);
        const C times = turn ? static_cast<C>(padded_slots) : C(1);
        const Index begin = problem.sees_all ? 0 : starts[cluster];
        const Index end = problem.sees_all ? problem.queries : starts[cluster + 1];
        for (Index start = begin; start < end; start += kWarp) {
          const int count = pairs_at(start, end);
          typename Warp::template Lanes<Numbers<C, 1>> logits;
          warp.each([&](int lane) {
            tile.other[lane] = -1;
            if (lane >= count) return;
            const Index query = problem.sees_all ? start + lane : quotient(order[start + lane], problem.lists);
            tile.other[lane] = query;
            C five[kClusterFeatures];
            logits[lane].x[0] = find_bias<C>(problem, place, query, place.row, turn > 0, five);
          });
          multiply_rows<V, T, C>(warp, lanes, key, queries, problem.query.row_stride, count, tile, tile.first);
          multiply_rows<V, T, C>(warp, lanes, value, grads, problem.grad_output.row_stride, count, tile,
                                 tile.second);
          warp.each([&](int lane) {
            if (lane >= count) return;
            const Index at = (place.image * problem.queries + tile.other[lane]) * problem.heads + place.head;
            const C logit = logits[lane].x[0] + scale * tile.first[lane];
            const C probability = ClusterSoftmax<C>(problem, at).probability(logit) * times;
            tile.first[lane] = probability;
            tile.second[lane] = probability * (tile.second[lane] - static_cast<const C*>(problem.means)[at]);
          });
          warp.each([&](int lane) {
            add_rows<V, 1>(lane, lanes, queries, problem.query.row_stride, first, count, tile, {tile.second},
                           {of_key[lane].x});
            add_rows<V, 1>(lane, lanes, grads, problem.grad_output.row_stride, first, count, tile, {tile.first},
                           {of_value[lane].x});
          });
        }
      }
      warp.sum(of_key, lanes.width, kWarp);
      warp.sum(of_value, lanes.width, kWarp);
      const Index to = ((place.image * problem.keys + place.row) * problem.heads + place.head) * problem.depth;
      warp.each([&](int lane) {
        store_sum<V>(lane, lanes, first, of_key[lane].x, scale, static_cast<T*>(problem.grad_key) + to);
        store_sum<V>(lane, lanes, first, of_value[lane].x, C(1), static_cast<T*>(problem.grad_value) + to);
      });
    }
  }
};

BOLTZ_MM_DEVICE Index groups_of_numbers(const ClusterProblem& problem) {
  return (numbers_of_part(problem) + kWarp - 1) / kWarp;
}

// One (head, section, 32 numbers): their sums over the parts of the section.
template <typename C>
struct ClusterSumParts {
  using Compute = C;

  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const ClusterProblem& problem, Index task, ClusterTile<C>&) {
    const Index groups = groups_of_numbers(problem), numbers = numbers_of_part(problem);
    const Index row = quotient(task, groups), head = quotient(row, problem.sections);
    const Index begin = (row - head * problem.sections) * kClusterSection;
    const Index end = begin + kClusterSection < problem.parts ? begin + kClusterSection : problem.parts;
    const C* from = static_cast<const C*>(problem.partial_sums) + head * problem.parts * numbers;
    warp.each([&](int lane) {
      const Index number = (task - row * groups) * kWarp + lane;
      if (number >= numbers) return;
      double sum = 0;
      for (Index part = begin; part < end; ++part) sum += static_cast<double>(from[part * numbers + number]);
      problem.section_sums[row * numbers + number] = sum;
    });
  }
};

// One (head, 32 numbers): their sums over the sections, which are gradients of parameters.
template <typename C>
struct ClusterSumSections {
  using Compute = C;

  template <typename Warp>
  static BOLTZ_MM_DEVICE void run(Warp& warp, const ClusterProblem& problem, Index task, ClusterTile<C>&) {
    const Index groups = groups_of_numbers(problem), numbers = numbers_of_part(problem), depth = problem.depth;
    const Index head = quotient(task, groups);
    const double* from = problem.section_sums + head * problem.sections * numbers;
    warp.each([&](int lane) {
      Index number = (task - head * groups) * kWarp + lane;
      if (number >= numbers) return;
      double sum = 0;
      for (Index section = 0; section < problem.sections; ++section) sum += from[section * numbers + number];
      void* const results[] = {problem.grad_bias_weight, problem.grad_bias, problem.grad_blank_key,
                               problem.grad_blank_value};
      const Index sizes[] = {kClusterFeatures, 1, depth, depth};
      int which = 0;
      for (; number >= sizes[which]; ++which) number -= sizes[which];
      if (results[which]) static_cast<C*>(results[which])[head * sizes[which] + number] = static_cast<C>(sum);
    });
  }
};

// ---------------------------------------------------------------------------------------------------- launches ----

// Whether rows may be loaded and stored `vector` channels at a time.
inline bool in_vectors(const ClusterProblem& problem, bool backward, Index vector) {
  const ClusterRows rows[] = {problem.query, problem.key, problem.value, problem.grad_output};
  uintptr_t addresses = 0;
  Index sizes = problem.depth;
  for (int i = 0; i < (backward ? 4 : 3); ++i) {
    addresses |= reinterpret_cast<uintptr_t>(rows[i].data);
    sizes |= rows[i].batch_stride | rows[i].row_stride | rows[i].head_stride;  // vector is a power of two
  }
  for (const void* result : {problem.output, problem.grad_query, problem.grad_key, problem.grad_value}) {
    addresses |= reinterpret_cast<uintptr_t>(result);
  }
  return sizes % vector == 0 && addresses % 16 == 0;
}

template <int V, typename T, typename C, typename Run>
const char* run_cluster_backward(const ClusterProblem& problem, const Run& run) {
  const Index images = problem.nearest_batch_stride ? problem.batch : 1;
  const Index starts = problem.sees_all ? 0 : images * (problem.clusters + 1);
  const char* error = run.template operator()<ClusterStarts>((starts + kWarp - 1) / kWarp);
  if (!error) error = run.template operator()<ClusterBackwardQueries<V, T, C>>(problem.parts * problem.heads);
  if (!error) {
    error = run.template operator()<ClusterBackwardKeys<V, T, C>>(problem.batch * problem.heads * problem.keys);
  }
  if (!problem.grad_bias_weight && !problem.grad_bias && !problem.grad_blank_key) return error;
  const Index groups = (kClusterBiases + 2 * problem.depth + kWarp - 1) / kWarp;
  if (!error) error = run.template operator()<ClusterSumParts<C>>(problem.heads * problem.sections * groups);
  return error ? error : run.template operator()<ClusterSumSections<C>>(problem.heads * groups);
}

// run.operator()<Pass>(tasks) for every pass in turn; it returns null or an error.
template <typename T, typename C, typename Run>
const char* run_cluster(const ClusterProblem& problem, bool backward, const Run& run) {
  constexpr int V = 16 / sizeof(T);
  const bool vectors = in_vectors(problem, backward, V);
  if (backward) {
    return vectors ? run_cluster_backward<V, T, C>(problem, run) : run_cluster_backward<1, T, C>(problem, run);
  }
  const Index tasks = problem.batch * problem.heads * problem.queries;
  return vectors ? run.template operator()<ClusterForward<V, T, C>>(tasks)
                 : run.template operator()<ClusterForward<1, T, C>>(tasks);
}

template <typename Run>
const char* choose_cluster(const ClusterProblem& problem, ValueType type, bool backward, const Run& run) {
  switch (type) {
    case ValueType::float64:
      return run_cluster<double, double>(problem, backward, run);
    case ValueType::float32:
      return run_cluster<float, float>(problem, backward, run);
    case ValueType::bfloat16:
      return run_cluster<BFloat16, float>(problem, backward, run);
    case ValueType::float16:
      return run_cluster<Float16, float>(problem, backward, run);
  }
  return "unknown dtype";
}

}  // namespace boltz_mm::cuda
