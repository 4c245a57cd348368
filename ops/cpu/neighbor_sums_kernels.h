// Products with the rows that an index names, weighted sums of these rows, and sums of rows by the index.  A part of
// cluster_attention_kernels.h, whose loops over rows it shares.

inline Index neighbor(const NeighborProblem& problem, Index image, Index query, Index k) {
  const Index at = (image * problem.queries + query) * problem.count + k;
  return problem.wide_index ? static_cast<const int64_t*>(problem.index)[at]
                            : static_cast<const int32_t*>(problem.index)[at];
}

inline int64_t padded_for(const NeighborProblem& problem, int64_t lanes) {
  return (problem.depth + lanes - 1) / lanes * lanes;
}

template <typename C>
int64_t neighbor_scratch(const NeighborProblem& problem) {
  const Index addresses = problem.count * sizeof(void*), numbers = (problem.count + kLanes<C>) * sizeof(C);
  return addresses + numbers + padded_for(problem, kLanes<C>) * sizeof(C) + 256;
}

// Addresses of a row's neighbours for head 0; false where the index is out of range.
template <typename C>
inline bool find_neighbors(const NeighborProblem& problem, Index image, Index query, const C** at) {
  const C* first = row_of<C>(problem.table, image, 0, 0);
  bool good = true;
  for (Index k = 0; k < problem.count; ++k) {
    const Index id = neighbor(problem, image, query, k);
    good &= id >= 0 && id < problem.length;
    at[k] = first + id * problem.table.row_stride;
  }
  return good;
}

template <typename C>
bool neighbor_products(const NeighborProblem& problem, int64_t begin, int64_t end, void* memory) {
  Carver carver{static_cast<char*>(memory)};
  const C** at = carver.take<const C*>(problem.count);
  for (Index row = begin; row < end; ++row) {
    const Index image = row / problem.queries, query = row % problem.queries;
    if (!find_neighbors(problem, image, query, at)) return false;
    for (Index h = 0; h < problem.heads; ++h) {
      C* to = static_cast<C*>(problem.output) +
              ((image * problem.heads + h) * problem.queries + query) * problem.count;
      for (Index k = 0; k < problem.count; ++k) to[k] = 0;
      multiply_single_rows(row_of<C>(problem.rows, image, query, h), at, h * problem.table.head_stride,
                           problem.count, problem.depth, to);
    }
  }
  return true;
}

template <typename C>
bool neighbor_sums(const NeighborProblem& problem, int64_t begin, int64_t end, void* memory) {
  Carver carver{static_cast<char*>(memory)};
  const C** at = carver.take<const C*>(problem.count);
  const Index depth = padded_to_vectors<C>(problem.depth);
  C* sums = carver.take<C>(depth);
  for (Index row = begin; row < end; ++row) {
    const Index image = row / problem.queries, query = row % problem.queries;
    if (!find_neighbors(problem, image, query, at)) return false;
    for (Index h = 0; h < problem.heads; ++h) {
      const Index place = (image * problem.heads + h) * problem.queries + query;
      add_weighted_rows(static_cast<const C*>(problem.weights) + place * problem.count, at,
                        h * problem.table.head_stride, problem.count, depth, sums);
      store_row(sums, problem.depth, C(1), static_cast<C*>(problem.output) + place * problem.depth);
    }
  }
  return true;
}

inline bool neighbor_invert(const NeighborProblem& problem, int64_t image) {
  Entry* entries = static_cast<Entry*>(problem.entries);
  for (Index row = 0; row <= problem.length; ++row) problem.starts[row] = 0;
  for (Index query = 0; query < problem.queries; ++query) {
    for (Index k = 0; k < problem.count; ++k) {
      const Index id = neighbor(problem, image, query, k);
      if (id < 0 || id >= problem.length) return false;
      ++problem.starts[id];
    }
  }
  for (Index row = 0, sum = 0; row <= problem.length; ++row) problem.starts[row] = sum += problem.starts[row];
  for (Index query = problem.queries - 1; query >= 0; --query) {
    for (Index k = problem.count - 1; k >= 0; --k) {
      entries[--problem.starts[neighbor(problem, image, query, k)]] = {query * problem.count + k, query};
    }
  }
  return true;
}

template <typename C>
void neighbor_spread(const NeighborProblem& problem, int64_t image, int64_t begin, int64_t end, void* memory) {
  const Index depth = padded_to_vectors<C>(problem.depth);
  C* sums = static_cast<C*>(memory);
  for (Index row = begin; row < end; ++row) {
    const Index first = problem.starts[row], count = problem.starts[row + 1] - first;
    for (Index h = 0; h < problem.heads; ++h) {
      const Index head = image * problem.heads + h;
      for (Index d = 0; d < depth; ++d) sums[d] = 0;
      spread_rows(static_cast<const C*>(problem.weights) + head * problem.queries * problem.count,
                  row_of<C>(problem.rows, image, 0, h), problem.rows.row_stride,
                  static_cast<const Entry*>(problem.entries) + first, count, Index{1}, depth, sums, depth);
      C* to = static_cast<C*>(problem.output) + (head * problem.length + row) * problem.depth;
      store_row(sums, problem.depth, C(1), to);
    }
  }
}

template <typename C>
constexpr NeighborKernels make_neighbor_kernels() {
  return {padded_to_vectors<C>, neighbor_scratch<C>, sizeof(Entry),   copy_rows<C, C, NeighborProblem>,
          neighbor_products<C>, neighbor_sums<C>,    neighbor_invert, neighbor_spread<C>};
}
