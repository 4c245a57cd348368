// The kernels of cluster attention on the CPU, forward and backward.  This file is included by one source for each
// instruction set, inside of a namespace of its own; see cluster_attention_avx2.cpp.
//
// Keys (and, for backward, values) are transposed once, cluster by cluster, into panels, so that products are found in
// vectors over the keys; everything of 16 bits is widened there.  A query is done for all heads at once: the features
// of its offsets are computed once.  Backward first recomputes the probabilities query by query, for as many queries
// as fit into bounded memory, and then adds up the gradients of keys and values cluster by cluster, along the sorted
// list of queries that see the cluster: no atomics, and the same result for every number of threads.

namespace {

#include "vectors.h"

#include "row_kernels.h"

constexpr int kFeatures = 5;
constexpr Index kKeyGroup = 8;     // keys of a task of backward_keys
constexpr float kPadded = -100.0f;  // what the official code adds to the logits of padded slots

// Cuts scratch memory into aligned arrays; with a null pointer it only counts.
struct Carver {
  char* memory;
  Index used = 0;

  template <typename T>
  T* take(Index count) {
    T* result = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += (count * static_cast<Index>(sizeof(T)) + 63) / 64 * 64;
    return result;
  }
};

// What is known of a query, shared by its heads, and the rows of one head.
template <typename C>
struct QueryScratch {
  Index* ids;           // of the query before, -1 at first
  const C** panels;     // keys, of head 0
  const C** value_panels;
  const C** key_at;     // rows of the slots, of head 0
  const C** value_at;
  C *x, *y, *features;  // [row_slots], [row_slots], [5, row_slots]
  C* masked;            // what is added to the logits, where is_masked
  C* logits;            // [H, row_slots]
  C *blanks, *tops, *shares;  // [H] in whole vectors
  C *query, *grad, *products, *packed, *sums;
  C* bias_sums;         // [H, 6, lanes]
  bool is_masked;

  QueryScratch(const ClusterProblem& problem, const ClusterPlan& plan, void* memory, Index& used) {
    Carver carver{static_cast<char*>(memory)};
    const Index panels_of_query = problem.lists * (plan.slots / plan.width);
    const Index keys_of_query = problem.lists * problem.cluster_size;
    ids = carver.take<Index>(problem.lists);
    panels = carver.take<const C*>(panels_of_query);
    value_panels = carver.take<const C*>(panels_of_query);
    key_at = carver.take<const C*>(keys_of_query);
    value_at = carver.take<const C*>(keys_of_query);
    C** const rows[] = {&x, &y, &masked, &products, &packed};
    for (C** row : rows) *row = carver.take<C>(plan.row_slots + kLanes<C>);
    features = carver.take<C>(kFeatures * plan.row_slots);
    logits = carver.take<C>(problem.heads * plan.row_slots);
    C** const of_heads[] = {&blanks, &tops, &shares};
    for (C** row : of_heads) *row = carver.take<C>(padded_to_vectors<C>(problem.heads));
    C** const channels[] = {&query, &grad, &sums};
    for (C** row : channels) *row = carver.take<C>(plan.padded_depth);
    bias_sums = carver.take<C>(problem.heads * (kFeatures + 1) * kLanes<C>);
    used = carver.used;
    is_masked = false;
    if (memory) {
      for (Index j = 0; j < problem.lists; ++j) ids[j] = -1;
      for (Index i = 0; i < plan.row_slots; ++i) x[i] = y[i] = 0;
      for (Index h = 0; h < padded_to_vectors<C>(problem.heads); ++h) blanks[h] = tops[h] = shares[h] = 0;
    }
  }
};

// Rows that are 2 KiB or a multiple of it apart would push each other out of the cache.
template <typename T, typename C>
bool are_whole_vectors(const Rows& rows, Index depth) {
  return sizeof(T) == sizeof(C) && depth % kLanes<C> == 0 && rows.row_stride * sizeof(C) % 2048 != 0;
}

template <typename T, typename C>
ClusterPlan plan_call(const ClusterProblem& problem, bool backward) {
  ClusterPlan plan{};
  plan.width = panel_width<C>(problem.cluster_size);
  plan.slots = (problem.cluster_size + plan.width - 1) / plan.width * plan.width;
  plan.row_slots = padded_to_vectors<C>(problem.lists * plan.slots);
  plan.padded_depth = padded_to_vectors<C>(problem.depth);
  plan.partial_size = kFeatures + 1 + 2 * plan.padded_depth;
  plan.entry_bytes = sizeof(Entry);
  const Rows* const all[] = {&problem.key, &problem.value, &problem.query, &problem.grad_output};
  for (int i = 0; i < 4; ++i) plan.rows_in_place[i] = are_whole_vectors<T, C>(*all[i], problem.depth);
  Index queries, keys = 2 * kKeyGroup * plan.padded_depth * sizeof(C);
  QueryScratch<C> counted(problem, plan, nullptr, queries);
  plan.scratch = backward && keys > queries ? keys : queries;
  return plan;
}

template <typename T>
inline const T* row_of(const Rows& rows, Index image, Index row, Index head) {
  return static_cast<const T*>(rows.data) + image * rows.batch_stride + row * rows.row_stride +
         head * rows.head_stride;
}

// The key of a slot; padded slots of the last cluster count as key 0.
inline Index key_of(const ClusterProblem& problem, Index cluster, Index slot) {
  const Index key = cluster * problem.cluster_size + slot;
  return key < problem.keys ? key : 0;
}

// Four rows of channels to columns: to[d * to_stride + r] = from[r * from_stride + d]
template <typename T, typename C>
inline void transpose_four(const T* from, Index from_stride, Index depth, C* to, Index to_stride) {
  using V = Vector<C, 4>;
  Index d = 0;
  for (; d + 4 <= depth; d += 4) {
    const V a = load<4>(from + d), b = load<4>(from + from_stride + d);
    const V c = load<4>(from + 2 * from_stride + d), e = load<4>(from + 3 * from_stride + d);
    store<4>(to + d * to_stride, V{a[0], b[0], c[0], e[0]});
    store<4>(to + (d + 1) * to_stride, V{a[1], b[1], c[1], e[1]});
    store<4>(to + (d + 2) * to_stride, V{a[2], b[2], c[2], e[2]});
    store<4>(to + (d + 3) * to_stride, V{a[3], b[3], c[3], e[3]});
  }
  for (; d < depth; ++d) {
    for (int r = 0; r < 4; ++r) to[d * to_stride + r] = load<1>(from + r * from_stride + d);
  }
}

template <typename T, typename C>
void fill_panels(const ClusterProblem& problem, const ClusterPlan& plan, const Rows& rows, Index image, Index cluster,
                 C* to) {
  const Index depth = problem.depth, width = plan.width;
  for (Index h = 0; h < problem.heads; ++h) {
    for (Index first = 0; first < plan.slots; first += width, to += depth * width) {
      Index lane = 0;
      // Four rows at a time, where they are what the slots say.
      const Index key = cluster * problem.cluster_size + first;
      const Index left = problem.cluster_size - first, left_keys = problem.keys - key;
      for (; lane + 4 <= width && lane + 4 <= left && lane + 4 <= left_keys; lane += 4) {
        transpose_four<T, C>(row_of<T>(rows, image, key + lane, h), rows.row_stride, depth, to + lane, width);
      }
      for (; lane < width; ++lane) {
        const Index slot = first + lane;
        if (slot >= problem.cluster_size) {
          for (Index d = 0; d < depth; ++d) to[d * width + lane] = 0;
          continue;
        }
        const T* row = row_of<T>(rows, image, key_of(problem, cluster, slot), h);
        for (Index d = 0; d < depth; ++d) to[d * width + lane] = load<1>(row + d);
      }
    }
  }
}

template <typename T, typename C>
void prepare(const ClusterProblem& problem, int64_t begin, int64_t end) {
  const ClusterPlan plan = plan_call<T, C>(problem, false);
  const Index panels = problem.heads * problem.depth * plan.slots;
  for (Index task = begin; task < end; ++task) {
    const Index image = task / problem.clusters, cluster = task % problem.clusters;
    if (problem.key_panels) {
      fill_panels<T, C>(problem, plan, problem.key, image, cluster,
                        static_cast<C*>(problem.key_panels) + task * panels);
    }
    if (problem.value_panels) {
      fill_panels<T, C>(problem, plan, problem.value, image, cluster,
                        static_cast<C*>(problem.value_panels) + task * panels);
    }
    if (!problem.key_x || (image > 0 && problem.key_pos_batch_stride == 0)) continue;
    const C* pos = static_cast<const C*>(problem.key_pos) + image * problem.key_pos_batch_stride;
    C* x = static_cast<C*>(problem.key_x) + task * plan.slots;
    C* y = static_cast<C*>(problem.key_y) + task * plan.slots;
    for (Index slot = 0; slot < plan.slots; ++slot) {
      const C* at = pos + 2 * key_of(problem, cluster, slot < problem.cluster_size ? slot : 0);
      x[slot] = at[0];
      y[slot] = at[1];
    }
  }
}

template <typename T, typename C, typename Problem>
void copy_rows(const Problem& problem, const Rows& from, int64_t rows, void* to, int64_t begin, int64_t end) {
  const Index heads = problem.heads, depth = padded_to_vectors<C>(problem.depth);
  for (Index row = begin; row < end; ++row) {
    for (Index h = 0; h < heads; ++h) {
      const Index image = row / rows, place = (image * heads + h) * rows + row % rows;
      load_row(row_of<T>(from, image, row % rows, h), problem.depth, C(1), static_cast<C*>(to) + place * depth);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- a query ----

inline Index cluster_id(const ClusterProblem& problem, Index image, Index query, Index j) {
  if (!problem.nearest) return 0;
  const Index at = image * problem.nearest_batch_stride + query * problem.lists + j;
  return problem.wide_nearest ? static_cast<const int64_t*>(problem.nearest)[at]
                              : static_cast<const int32_t*>(problem.nearest)[at];
}

// Addresses of the rows of a cluster's slots, for head 0.
template <typename C>
inline void place_rows(const ClusterProblem& problem, const Rows& rows, Index image, Index cluster, const C** at) {
  const Index first = cluster * problem.cluster_size;
  const Index count = problem.keys - first < problem.cluster_size ? problem.keys - first : problem.cluster_size;
  const C* row = row_of<C>(rows, image, first, 0);
  const Index stride = rows.row_stride;
  for (Index slot = 0; slot < count; ++slot) at[slot] = row + slot * stride;
  for (Index slot = count; slot < problem.cluster_size; ++slot) at[slot] = row_of<C>(rows, image, 0, 0);
}

template <typename C>
inline void copy(const C* from, Index count, C* to) {
  Index i = 0;
  for (; i + 4 <= count; i += 4) store<4>(to + i, load<4>(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// Where the keys of the query's clusters are; false where an id is out of range.  Successive queries often have the
// same clusters in the same order.
template <typename C>
bool find_clusters(const ClusterProblem& problem, const ClusterPlan& plan, Index image, Index query,
                   QueryScratch<C>& scratch) {
  const Index size = problem.cluster_size, lists = problem.lists, panels = plan.slots / plan.width;
  bool changed = false;
  for (Index j = 0; j < lists; ++j) {
    const Index id = cluster_id(problem, image, query, j);
    if (id < 0 || id >= problem.clusters) return false;
    changed |= id != scratch.ids[j];
    scratch.ids[j] = id;
  }
  if (!changed) return true;
  scratch.is_masked = plan.slots > size || plan.row_slots > lists * plan.slots;
  const Index positions = problem.key_pos_batch_stride ? image * problem.clusters : 0;
  for (Index j = 0; j < lists; ++j) {
    const Index id = scratch.ids[j], cluster = image * problem.clusters + id;
    scratch.is_masked |= (id + 1) * size > problem.keys;
    if (plan.width > 1) {
      const Index step = problem.depth * plan.width, first = cluster * problem.heads * problem.depth * plan.slots;
      for (Index p = 0; p < panels; ++p) {
        scratch.panels[j * panels + p] = static_cast<const C*>(problem.key_panels) + first + p * step;
        if (problem.value_panels) {
          scratch.value_panels[j * panels + p] = static_cast<const C*>(problem.value_panels) + first + p * step;
        }
      }
    }
    if (problem.key_rows.data) place_rows(problem, problem.key_rows, image, id, scratch.key_at + j * size);
    place_rows(problem, problem.value_rows, image, id, scratch.value_at + j * size);
    if (problem.key_x) {
      const Index from = (positions + id) * plan.slots;
      copy(static_cast<const C*>(problem.key_x) + from, plan.slots, scratch.x + j * plan.slots);
      copy(static_cast<const C*>(problem.key_y) + from, plan.slots, scratch.y + j * plan.slots);
    }
  }
  if (!scratch.is_masked) return true;
  for (Index j = 0; j < lists; ++j) {
    for (Index slot = 0; slot < plan.slots; ++slot) {
      scratch.masked[j * plan.slots + slot] =
          slot >= size ? -__builtin_inff() : scratch.ids[j] * size + slot >= problem.keys ? kPadded : 0.0f;
    }
  }
  for (Index i = lists * plan.slots; i < plan.row_slots; ++i) scratch.masked[i] = -__builtin_inff();
  return true;
}

template <typename C>
inline Vector<C, kLanes<C>> clamp(Vector<C, kLanes<C>> offset, C bound) {
  using V = Vector<C, kLanes<C>>;
  const V most = V{} + bound;
  offset = offset > most ? most : offset;  // NaN stays
  return offset < -most ? -most : offset;
}

template <typename C>
void find_features(const ClusterProblem& problem, const ClusterPlan& plan, Index image, Index query,
                   QueryScratch<C>& scratch) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const C* pos = static_cast<const C*>(problem.query_pos) + image * problem.query_pos_batch_stride + 2 * query;
  const C bound = problem.max_offset;
  for (Index i = 0; i < plan.row_slots; i += N) {
    const V dx = clamp<C>(load<N>(scratch.x + i) - pos[0], bound);
    const V dy = clamp<C>(load<N>(scratch.y + i) - pos[1], bound);
    const V squared = dx * dx + dy * dy;
    const V inverse = inverse_root<N>(squared);
    const V root = squared * inverse;
    const V d = root + C(0.5) * inverse * (squared - root * root);
    const V ratio = squared > 0 ? inverse : V{};
    const V all[] = {dx, dy, d, dy * ratio, dx * ratio};
    for (int f = 0; f < kFeatures; ++f) store<N>(scratch.features + f * plan.row_slots + i, all[f]);
  }
}

// What is added to the products of a head.
template <typename C>
void start_logits(const ClusterProblem& problem, const ClusterPlan& plan, Index head, QueryScratch<C>& scratch,
                  C* logits) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const C first = problem.bias ? static_cast<const C*>(problem.bias)[head] : C(0);
  const C* weight = static_cast<const C*>(problem.bias_weight) + head * kFeatures;
  for (Index i = 0; i < plan.row_slots; i += N) {
    V sum = V{} + first;
    if (problem.bias_weight) {
      for (int f = 0; f < kFeatures; ++f) sum += weight[f] * load<N>(scratch.features + f * plan.row_slots + i);
    }
    if (scratch.is_masked) sum += load<N>(scratch.masked + i);
    store<N>(logits + i, sum);
  }
}

template <typename C>
inline C find_logits(const ClusterProblem& problem, const ClusterPlan& plan, Index head, QueryScratch<C>& scratch,
                     C* logits) {
  start_logits(problem, plan, head, scratch, logits);
  if (plan.width > 1) {
    multiply(plan.width, scratch.query, scratch.panels, head * problem.depth * plan.slots,
             problem.lists * (plan.slots / plan.width), problem.depth, logits);
  } else {
    multiply(plan.width, scratch.query, scratch.key_at, head * problem.key_rows.head_stride, problem.lists,
             problem.depth, logits);
  }
  if (!problem.blank_key) return -__builtin_inff();
  return multiply_rows(scratch.query, static_cast<const C*>(problem.blank_key) + head * problem.depth, problem.depth);
}

// Weights of the slots without those between clusters.
template <typename C>
inline const C* without_padding(const ClusterProblem& problem, const ClusterPlan& plan, const C* row, C* to) {
  if (plan.slots == problem.cluster_size) return row;
  for (Index j = 0; j < problem.lists; ++j) {
    __builtin_memcpy(to + j * problem.cluster_size, row + j * plan.slots, problem.cluster_size * sizeof(C));
  }
  return to;
}

template <typename C>
inline void add_scaled(const C* row, C factor, Index depth, C* to) {
  constexpr int N = kLanes<C>;
  Index d = 0;
  for (; d + N <= depth; d += N) store<N>(to + d, Vector<C, N>(load<N>(to + d) + factor * load<N>(row + d)));
  for (; d < depth; ++d) to[d] += factor * row[d];
}

template <typename T, typename C>
bool forward(const ClusterProblem& problem, int64_t begin, int64_t end, void* memory) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const ClusterPlan plan = plan_call<T, C>(problem, false);
  const Index heads = problem.heads, depth = problem.depth, keys = problem.lists * problem.cluster_size;
  const Index blocks = (problem.queries + kQueryBlock - 1) / kQueryBlock;
  const bool sees_any = keys > 0 || problem.blank_key;
  Index used, last_image = -1;
  QueryScratch<C> scratch(problem, plan, memory, used);
  for (Index row = begin * kQueryBlock; row < end * kQueryBlock; ++row) {
    const Index image = row / (blocks * kQueryBlock), query = row % (blocks * kQueryBlock);
    if (query >= problem.queries) continue;
    if (image != last_image) scratch.ids[0] = -1;
    last_image = image;
    if (!find_clusters(problem, plan, image, query, scratch)) return false;
    if (problem.bias_weight) find_features(problem, plan, image, query, scratch);
    // In three steps for all heads, so that the processor may overlap the waits of one head with the work of others.
    for (Index h = 0; h < heads; ++h) {
      load_row(row_of<T>(problem.query, image, query, h), depth, C(problem.scale), scratch.query);
      scratch.blanks[h] = find_logits(problem, plan, h, scratch, scratch.logits + h * plan.row_slots);
    }
    const Index place = (image * problem.queries + query) * heads;
    C* normalizers = static_cast<C*>(problem.normalizer) + 2 * place;
    for (Index h = 0; h < heads; ++h) {
      C* logits = scratch.logits + h * plan.row_slots;
      V tops = V{} + scratch.blanks[h];
      for (Index i = 0; i < plan.row_slots; i += N) {
        const V row = load<N>(logits + i);
        tops = row > tops ? row : tops;
      }
      const C top = max_lanes<N, C>(tops);
      V sums = {};
      for (Index i = 0; i < plan.row_slots; i += N) {
        const V weights = exp_negative<N>(V(load<N>(logits + i) - top));
        store<N>(logits + i, weights);
        sums += weights;
      }
      scratch.tops[h] = top;
      scratch.shares[h] = sum_lanes<N, C>(sums);
    }
    for (Index h = 0; h < heads; h += N) {  // in vectors over the heads, with room for a whole one
      V blanks = {};
      if (problem.blank_key) blanks = exp_negative<N>(V(load<N>(scratch.blanks + h) - load<N>(scratch.tops + h)));
      const V sums = load<N>(scratch.shares + h) + blanks;
      store<N>(scratch.blanks + h, blanks);
      store<N>(scratch.products, sums);
      store<N>(scratch.shares + h, sees_any ? V{} + 1 / sums : V{});
      for (Index i = 0; i < N && h + i < heads; ++i) {
        normalizers[2 * (h + i)] = scratch.tops[h + i];
        normalizers[2 * (h + i) + 1] = scratch.products[i];
      }
    }
    for (Index h = 0; h < heads; ++h) {
      const C* weights = without_padding(problem, plan, scratch.logits + h * plan.row_slots, scratch.packed);
      add_weighted_rows(weights, scratch.value_at, h * problem.value_rows.head_stride, keys, plan.padded_depth,
                        scratch.sums);
      if (problem.blank_value) {
        add_scaled(static_cast<const C*>(problem.blank_value) + h * depth, scratch.blanks[h], depth, scratch.sums);
      }
      store_row(scratch.sums, depth, scratch.shares[h], static_cast<T*>(problem.output) + (place + h) * depth);
    }
  }
  return true;
}

#include "cluster_attention_backward.h"

#include "neighbor_sums_kernels.h"

template <typename T, typename C>
constexpr ClusterKernels make_kernels() {
  return {plan_call<T, C>,        prepare<T, C>, copy_rows<T, C, ClusterProblem>, forward<T, C>,
          backward_queries<T, C>, invert<T, C>,  key_groups,      backward_keys<T, C>};
}

}  // namespace

const ClusterKernels cluster_kernels[kValueTypes] = {
    make_kernels<double, double>(),
    make_kernels<float, float>(),
    make_kernels<BFloat16, float>(),
    make_kernels<Float16, float>(),
};

const NeighborKernels neighbor_kernels[2] = {make_neighbor_kernels<double>(), make_neighbor_kernels<float>()};
