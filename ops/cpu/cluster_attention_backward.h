// Backward of cluster attention; a part of cluster_attention_kernels.h.

inline Index blocks_of_image(const ClusterProblem& problem) {
  return (problem.queries + kQueryBlock - 1) / kQueryBlock;
}

// Queries of an image that are in the chunk, and the place of the first in the chunk's memory.
struct ChunkPart {
  Index image, begin, end, place;
  bool is_first, is_last;  // of the image

  ChunkPart(const ClusterProblem& problem, const QueryChunk& chunk, Index image) : image(image) {
    const Index blocks = blocks_of_image(problem), first = image * blocks;
    const Index from = chunk.first_block > first ? chunk.first_block - first : 0;
    const Index to = chunk.last_block < first + blocks ? chunk.last_block - first : blocks;
    begin = from * kQueryBlock;
    end = to * kQueryBlock < problem.queries ? to * kQueryBlock : problem.queries;
    place = (first + from - chunk.first_block) * kQueryBlock;
    is_first = from == 0;
    is_last = to == blocks;
  }
};

// Probabilities and gradients of the logits of one query and head, into memory; and what follows from them at once.
template <typename T, typename C>
void backward_row(const ClusterProblem& problem, const ClusterPlan& plan, Index image, Index query, Index head,
                  QueryScratch<C>& scratch, C* probabilities, C* partial) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const Index depth = problem.depth, slots = plan.row_slots;
  const Index place = (image * problem.queries + query) * problem.heads + head;
  const C* normalizer = static_cast<const C*>(problem.normalizer) + 2 * place;
  const C top = normalizer[0], share = 1 / normalizer[1];
  load_row(row_of<T>(problem.query, image, query, head), depth, C(problem.scale), scratch.query);
  load_row(row_of<T>(problem.grad_output, image, query, head), depth, C(1), scratch.grad);
  const C blank = find_logits(problem, plan, head, scratch, scratch.logits);
  for (Index i = 0; i < slots; i += N) store<N>(scratch.products + i, V{});
  if (plan.width > 1) {
    multiply(plan.width, scratch.grad, scratch.value_panels, head * depth * plan.slots,
             problem.lists * (plan.slots / plan.width), depth, scratch.products);
  } else {
    multiply(plan.width, scratch.grad, scratch.value_at, head * problem.value_rows.head_stride, problem.lists, depth,
             scratch.products);
  }
  V sums = {};
  for (Index i = 0; i < slots; i += N) {
    const V p = exp_negative<N>(V(load<N>(scratch.logits + i) - top)) * share;
    store<N>(probabilities + i, p);
    sums += p * load<N>(scratch.products + i);
  }
  C mean = sum_lanes<N, C>(sums), blank_probability = 0, blank_product = 0;
  if (problem.blank_key) {
    blank_probability = exp_negative<1>(C(blank - top)) * share;
    blank_product =
        multiply_rows(scratch.grad, static_cast<const C*>(problem.blank_value) + head * depth, depth);
    mean += blank_probability * blank_product;
  }
  C* grads = probabilities + slots;
  C* bias_sums = scratch.bias_sums + head * (kFeatures + 1) * N;
  V of_bias[kFeatures + 1];
  for (int f = 0; f <= kFeatures; ++f) of_bias[f] = load<N>(bias_sums + f * N);
  for (Index i = 0; i < slots; i += N) {
    const V grad = load<N>(probabilities + i) * (load<N>(scratch.products + i) - mean);
    store<N>(grads + i, grad);
    of_bias[kFeatures] += grad;
    if (problem.bias_weight) {
      for (int f = 0; f < kFeatures; ++f) of_bias[f] += grad * load<N>(scratch.features + f * slots + i);
    }
  }
  for (int f = 0; f <= kFeatures; ++f) store<N>(bias_sums + f * N, of_bias[f]);
  const C* weights = without_padding(problem, plan, grads, scratch.packed);
  add_weighted_rows(weights, scratch.key_at, head * problem.key_rows.head_stride,
                    problem.lists * problem.cluster_size, plan.padded_depth, scratch.sums);
  if (problem.blank_key) {
    const C blank_grad = blank_probability * (blank_product - mean);
    add_scaled(static_cast<const C*>(problem.blank_key) + head * depth, blank_grad, depth, scratch.sums);
    add_scaled(scratch.query, blank_grad, depth, partial + kFeatures + 1);
    add_scaled(scratch.grad, blank_probability, depth, partial + kFeatures + 1 + plan.padded_depth);
  }
  store_row(scratch.sums, depth, C(problem.scale), static_cast<T*>(problem.grad_query) + place * depth);
}

// Task: a block of queries.
template <typename T, typename C>
bool backward_queries(const ClusterProblem& problem, const QueryChunk& chunk, int64_t begin, int64_t end,
                      void* memory) {
  constexpr int N = kLanes<C>;
  const ClusterPlan plan = plan_call<T, C>(problem, true);
  const Index heads = problem.heads, blocks = blocks_of_image(problem);
  Index used, last_image = -1;
  QueryScratch<C> scratch(problem, plan, memory, used);
  for (Index block = begin; block < end; ++block) {
    const Index image = block / blocks;
    if (image != last_image) scratch.ids[0] = -1;
    last_image = image;
    C* partial = static_cast<C*>(problem.partial) + block * heads * plan.partial_size;
    for (Index i = 0; i < heads * plan.partial_size; ++i) partial[i] = 0;
    for (Index i = 0; i < heads * (kFeatures + 1) * N; ++i) scratch.bias_sums[i] = 0;
    for (Index i = 0; i < kQueryBlock; ++i) {
      const Index query = block % blocks * kQueryBlock + i;
      if (query >= problem.queries) break;
      if (!find_clusters(problem, plan, image, query, scratch)) return false;
      if (problem.bias_weight) find_features(problem, plan, image, query, scratch);
      C* probabilities = static_cast<C*>(problem.weights) +
                         ((block - chunk.first_block) * kQueryBlock + i) * heads * 2 * plan.row_slots;
      for (Index h = 0; h < heads; ++h) {
        backward_row<T, C>(problem, plan, image, query, h, scratch, probabilities + h * 2 * plan.row_slots,
                           partial + h * plan.partial_size);
      }
    }
    for (Index h = 0; h < heads; ++h) {
      for (int f = 0; f <= kFeatures; ++f) {
        partial[h * plan.partial_size + f] =
            sum_lanes<N, C>(load<N>(scratch.bias_sums + (h * (kFeatures + 1) + f) * N));
      }
    }
  }
  return true;
}

// For each cluster the queries of the chunk that see it, in their order.  Task: an image of the chunk.  The weights of
// an entry are counted in slots of a cluster and rows of a query; see backward_keys.
template <typename T, typename C>
void invert(const ClusterProblem& problem, const QueryChunk& chunk, int64_t begin, int64_t end) {
  const ClusterPlan plan = plan_call<T, C>(problem, true);
  const Index first_image = chunk.first_block / blocks_of_image(problem);
  for (Index i = begin; i < end; ++i) {
    const ChunkPart part(problem, chunk, first_image + i);
    int64_t* starts = problem.starts + i * (problem.clusters + 1);
    Entry* entries = static_cast<Entry*>(problem.entries) + part.place * problem.lists;
    for (Index c = 0; c <= problem.clusters; ++c) starts[c] = 0;
    for (Index query = part.begin; query < part.end; ++query) {
      for (Index j = 0; j < problem.lists; ++j) ++starts[cluster_id(problem, part.image, query, j)];
    }
    // The end of each list first; filling from behind leaves its start.
    for (Index c = 0, sum = 0; c <= problem.clusters; ++c) starts[c] = sum += starts[c];
    for (Index query = part.end - 1; query >= part.begin; --query) {
      for (Index j = problem.lists - 1; j >= 0; --j) {
        const Index place = part.place + query - part.begin;
        entries[--starts[cluster_id(problem, part.image, query, j)]] = {
            place * problem.heads * 2 * plan.row_slots + j * plan.slots, query};
      }
    }
  }
}

inline int64_t key_groups(const ClusterProblem& problem) {
  return problem.clusters * ((problem.cluster_size + kKeyGroup - 1) / kKeyGroup);
}

// Task: (image of the chunk, group of keys of a cluster).
template <typename T, typename C>
void backward_keys(const ClusterProblem& problem, const QueryChunk& chunk, int64_t begin, int64_t end, void* memory) {
  const ClusterPlan plan = plan_call<T, C>(problem, true);
  const Index size = problem.cluster_size, depth = plan.padded_depth, slots = plan.row_slots;
  const Index groups = key_groups(problem), groups_of_cluster = groups / problem.clusters;
  const Index first_image = chunk.first_block / blocks_of_image(problem);
  C* sums = static_cast<C*>(memory);
  const Rows* const rows[] = {&problem.query_rows, &problem.grad_rows};
  void* const kept[] = {problem.key_sums, problem.value_sums};
  void* const results[] = {problem.grad_key, problem.grad_value};
  for (Index task = begin; task < end; ++task) {
    const ChunkPart part(problem, chunk, first_image + task / groups);
    const Index cluster = task % groups / groups_of_cluster, slot = task % groups_of_cluster * kKeyGroup;
    const Index first_key = cluster * size + slot;
    Index keys = size - slot < kKeyGroup ? size - slot : kKeyGroup;
    if (keys > problem.keys - first_key) keys = problem.keys - first_key;
    if (keys <= 0) continue;
    const int64_t* starts = problem.starts + (task / groups) * (problem.clusters + 1);
    const Entry* entries = static_cast<const Entry*>(problem.entries) + part.place * problem.lists;
    for (Index h = 0; h < problem.heads; ++h) {
      for (int of_value = 0; of_value < 2; ++of_value) {
        const C* weights =
            static_cast<const C*>(problem.weights) + (h * 2 + (of_value ? 0 : 1)) * slots;
        const Rows& from = *rows[of_value];
        const C* channels = row_of<C>(from, part.image, 0, h);
        const Index place = (part.image * problem.keys + first_key) * problem.heads + h;
        C* total = kept[of_value] ? static_cast<C*>(kept[of_value]) + place * depth : sums;
        const Index stride = kept[of_value] ? problem.heads * depth : depth;
        if (part.is_first) {
          for (Index k = 0; k < keys; ++k) {
            for (Index d = 0; d < depth; ++d) total[k * stride + d] = 0;
          }
        }
        spread_rows(weights + slot, channels, from.row_stride, entries + starts[cluster],
                    starts[cluster + 1] - starts[cluster], keys, depth, total, stride);
        if (first_key == 0) {  // padded slots count as key 0
          const Index last = problem.clusters - 1;
          for (Index padded = problem.keys - last * size; padded < size; ++padded) {
            spread_rows(weights + padded, channels, from.row_stride, entries + starts[last],
                        starts[last + 1] - starts[last], Index{1}, depth, total, stride);
          }
        }
        if (!part.is_last) continue;
        const C factor = of_value ? C(1) : C(problem.scale);
        for (Index k = 0; k < keys; ++k) {
          store_row(total + k * stride, problem.depth, factor,
                    static_cast<T*>(results[of_value]) + (place + k * problem.heads) * problem.depth);
        }
      }
    }
  }
}
