// The kernels of weighted sums over neighbours on the CPU, forward and backward.  This file is included by one source
// for each instruction set, inside of a namespace of its own; see point_merge_avx2.cpp.
//
// Both directions take pairs (point, row of feat) from a stream, a few hundred at a time.  The weights of these pairs
// are found in vectors over the pairs, their features are added up in vectors over the channels.  Forward streams the
// neighbours of a block of points, backward the points that a block of rows belongs to: a row's gradient is added up by
// one task, in the order of the points, so that there are no atomics and the result is the same for every number of
// threads.

namespace {

#include "vectors.h"

#include "offset_weights.h"

constexpr int kInnerBlock = 4;
constexpr int kForwardVectors = BOLTZ_MM_VECTOR_BYTES == 64 ? 4 : 2;  // what the registers hold

// ------------------------------------------------------------------------------------------------------ forward ----

template <typename C>
struct ForwardScratch {
  Pairs<C> pairs;
  C* sums;  // [I, C] of the current point

  ForwardScratch(const MergeProblem& problem, void* memory, Index& used) {
    Carver carver{static_cast<char*>(memory)};
    pairs.carve(carver, problem.inner, false);
    sums = carver.take<C>(problem.inner * problem.channels);
    used = carver.used;
  }
};

template <typename T, typename C>
int64_t forward_scratch(const MergeProblem& problem) {
  Index used;
  ForwardScratch<C>(problem, nullptr, used);
  return used;
}

// The neighbours of consecutive points, in their order.
template <typename C>
class NeighbourStream {
 public:
  NeighbourStream(const MergeProblem& problem, Index b, Index begin, Index end)
      : problem_(problem), b_(b), point_(begin), end_(end),
        query_(of_image<C>(problem.query_pos, b, problem.query_batch_stride)),
        key_(of_image<C>(problem.key_pos, b, problem.key_batch_stride)),
        importance_(of_image<C>(problem.importance, b, problem.rows)) {}

  bool fill(Pairs<C>& pairs) {
    pairs.count = pairs.runs = 0;
    while (point_ < end_ && !pairs.full()) {
      Run& run = pairs.run[pairs.runs++];
      run = {point_, pairs.count, 0, slot_ == 0 && member_ == 0, false};
      while (slot_ < problem_.count && pairs.count < kPairs) take_from_cluster(pairs);
      run.end = pairs.count;
      run.last = slot_ == problem_.count;
      if (run.last) ++point_, slot_ = 0;
    }
    return pairs.runs > 0;
  }

 private:
  const MergeProblem& problem_;
  const Index b_;
  Index point_;
  const Index end_;
  Index slot_ = 0, member_ = 0;
  const C *query_, *key_, *importance_;

  void take_from_cluster(Pairs<C>& pairs) {
    const Index size = problem_.cluster_size;
    const Index start = cluster_of(problem_, b_, point_ * problem_.count + slot_) * size;
    const Index end = problem_.rows - start < size ? problem_.rows - start : size;
    if (problem_.given) {
      pairs.other[pairs.count] = start;
      read_weights(problem_, b_, point_, slot_, pairs);
      ++pairs.count;
      ++slot_;
      return;
    }
    for (; member_ < end && pairs.count < kPairs; ++member_, ++pairs.count) {
      const Index row = start + member_;
      pairs.other[pairs.count] = row;
      place(problem_, pairs, query_ + 2 * point_, key_ + 2 * row, importance_ ? importance_ + row : nullptr);
    }
    if (member_ == end) ++slot_, member_ = 0;
  }
};

// sums[i, c] (+)= sum over the pairs of a run of weights[i] * feat[c], for I values of i and all channels.
template <int I, int V, int N, typename T, typename C>
Index add_channels(const Pairs<C>& pairs, const Run& run, const C* weights, const T* feat, Index row_stride, Index begin,
                   Index channels, C* sums, bool first) {
  using Vec = Vector<C, N>;
  Index c = begin;
  for (; c + V * N <= channels; c += V * N) {
    Vec total[I][V];
    for (int i = 0; i < I; ++i) {
      for (int v = 0; v < V; ++v) total[i][v] = first ? Vec{} : load<N>(sums + i * channels + c + v * N);
    }
    for (Index p = run.begin; p < run.end; ++p) {
      const T* from = feat + pairs.other[p] * row_stride + c;
      Vec x[V];
      for (int v = 0; v < V; ++v) x[v] = load<N>(from + v * N);
      for (int i = 0; i < I; ++i) {
        const C weight = weights[i * kPairs + p];
        for (int v = 0; v < V; ++v) total[i][v] += x[v] * weight;
      }
    }
    for (int i = 0; i < I; ++i) {
      for (int v = 0; v < V; ++v) store<N>(sums + i * channels + c + v * N, total[i][v]);
    }
  }
  if constexpr (V > 1) {
    return add_channels<I, 1, N, T, C>(pairs, run, weights, feat, row_stride, c, channels, sums, first);
  } else if constexpr (N > 1) {
    return add_channels<I, 1, N / 2, T, C>(pairs, run, weights, feat, row_stride, c, channels, sums, first);
  } else {
    return c;
  }
}

template <int I, typename T, typename C>
void add_inner(const Pairs<C>& pairs, const Run& run, Index i, const T* feat, Index row_stride, Index channels, C* sums) {
  add_channels<I, kForwardVectors, kLanes<C>, T, C>(pairs, run, pairs.weights + i * kPairs, feat, row_stride, 0,
                                                    channels, sums + i * channels, run.first);
}

template <typename T, typename C>
void add_run(const Pairs<C>& pairs, const Run& run, Index inner, const T* feat, Index row_stride, Index channels,
             C* sums) {
  for (Index i = 0; i < inner; i += kInnerBlock) {
    switch (inner - i) {
      case 1:
        add_inner<1>(pairs, run, i, feat, row_stride, channels, sums);
        break;
      case 2:
        add_inner<2>(pairs, run, i, feat, row_stride, channels, sums);
        break;
      case 3:
        add_inner<3>(pairs, run, i, feat, row_stride, channels, sums);
        break;
      default:
        add_inner<kInnerBlock>(pairs, run, i, feat, row_stride, channels, sums);
    }
  }
}

template <typename T, typename C>
inline void store_row(const C* from, Index count, T* to) {
  constexpr int N = kLanes<C>;
  Index i = 0;
  for (; i + N <= count; i += N) store<N>(to + i, load<N>(from + i));
  for (; i < count; ++i) store<1>(to + i, load<1>(from + i));
}

template <typename T, typename C>
void forward(const MergeProblem& problem, int64_t begin, int64_t end, void* memory) {
  Index used;
  ForwardScratch<C> scratch(problem, memory, used);
  Pairs<C>& pairs = scratch.pairs;
  const Index blocks = (problem.points + kMergePoints - 1) / kMergePoints;
  const Index size = problem.inner * problem.channels;
  for (Index task = begin; task < end; ++task) {
    const Index b = task / blocks, first = task % blocks * kMergePoints;
    const Index last = first + kMergePoints < problem.points ? first + kMergePoints : problem.points;
    const T* feat = static_cast<const T*>(problem.feat) + b * problem.feat_batch_stride;
    NeighbourStream<C> stream(problem, b, first, last);
    while (stream.fill(pairs)) {
      if (!problem.given && pairs.count) compute_weights<C, false>(problem, pairs);
      for (Index r = 0; r < pairs.runs; ++r) {
        const Run& run = pairs.run[r];
        T* output = static_cast<T*>(problem.output) + (b * problem.points + run.owner) * size;
        if constexpr (sizeof(T) == sizeof(C)) {
          add_run(pairs, run, problem.inner, feat, problem.feat_row_stride, problem.channels, output);
        } else {
          add_run(pairs, run, problem.inner, feat, problem.feat_row_stride, problem.channels, scratch.sums);
          if (run.last) store_row(scratch.sums, size, output);
        }
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------- backward ----

template <typename C>
struct BackwardScratch {
  Pairs<C> pairs;
  C* row;   // [C] features of the current row
  C* grad;  // [C] their gradient
  C* sums;  // [I, kMergeSums, lanes] gradients of the parameters

  BackwardScratch(const MergeProblem& problem, void* memory, Index& used) {
    Carver carver{static_cast<char*>(memory)};
    pairs.carve(carver, problem.inner, true);
    row = carver.take<C>(problem.channels);
    grad = carver.take<C>(problem.channels);
    sums = carver.take<C>(problem.inner * kMergeSums * kLanes<C>);
    used = carver.used;
  }
};

template <typename T, typename C>
int64_t backward_scratch(const MergeProblem& problem) {
  Index used;
  BackwardScratch<C>(problem, nullptr, used);
  return used;
}

// The points to which consecutive rows belong, in their order.
template <typename C>
class PointStream {
 public:
  PointStream(const MergeProblem& problem, Index b, Index begin, Index end)
      : problem_(problem), b_(b), row_(begin), end_(end),
        starts_(problem.starts + b * problem.starts_batch_stride),
        entries_(problem.entries + b * problem.entries_batch_stride),
        query_(of_image<C>(problem.query_pos, b, problem.query_batch_stride)),
        key_(of_image<C>(problem.key_pos, b, problem.key_batch_stride)),
        importance_(of_image<C>(problem.importance, b, problem.rows)) {}

  bool fill(Pairs<C>& pairs) {
    pairs.count = pairs.runs = 0;
    while (row_ < end_ && !pairs.full()) {
      const Index cluster = row_ / problem_.cluster_size;
      const Index start = starts_[cluster], length = starts_[cluster + 1] - start;
      Run& run = pairs.run[pairs.runs++];
      run = {row_, pairs.count, 0, done_ == 0, false};
      for (; done_ < length && pairs.count < kPairs; ++done_, ++pairs.count) take(pairs, entries_[start + done_]);
      run.end = pairs.count;
      run.last = done_ == length;
      if (run.last) ++row_, done_ = 0;
    }
    return pairs.runs > 0;
  }

 private:
  const MergeProblem& problem_;
  const Index b_;
  Index row_;
  const Index end_;
  Index done_ = 0;
  const int64_t *starts_, *entries_;
  const C *query_, *key_, *importance_;

  void take(Pairs<C>& pairs, Index entry) {
    const Index point = entry / problem_.count;
    pairs.other[pairs.count] = point;
    if (problem_.given) {
      pairs.slot[pairs.count] = entry - point * problem_.count;
      read_weights(problem_, b_, point, pairs.slot[pairs.count], pairs);
    } else {
      place(problem_, pairs, query_ + 2 * point, key_ + 2 * row_, importance_ ? importance_ + row_ : nullptr);
    }
  }
};

// Not inlined: lanes are taken through memory, and the sums that are added up in a loop would be kept there.
template <int N, typename C>
__attribute__((noinline)) C sum_of_register(Vector<C, N> x) {
  return sum_lanes<N, C>(x);
}

// For one pair and I values of i: the products of the output's gradient with the features, and its weighted sum.
template <int I, int N, typename T, typename C>
inline __attribute__((always_inline)) void multiply_gradient(const T* grad_output, const C* row, const C* weights,
                                                             Index begin, Index channels, C* grad_row,
                                                             C* grad_weights) {
  using V = Vector<C, N>;
  V product[I] = {};
  C weight[I];
  for (int i = 0; i < I; ++i) weight[i] = weights[i * kPairs];
  Index c = begin;
  for (; c + N <= channels; c += N) {
    const V x = load<N>(row + c);
    V sum = load<N>(grad_row + c);
    for (int i = 0; i < I; ++i) {
      const V gradient = load<N>(grad_output + i * channels + c);
      product[i] += gradient * x;
      sum += gradient * weight[i];
    }
    store<N>(grad_row + c, sum);
  }
  if (c > begin) {
    for (int i = 0; i < I; ++i) grad_weights[i * kPairs] += sum_of_register<N, C>(product[i]);
  }
  if constexpr (N > 1) {
    if (c < channels) {
      multiply_gradient<I, N / 2, T, C>(grad_output, row, weights, c, channels, grad_row, grad_weights);
    }
  }
}

template <int I, typename T, typename C>
void multiply_run(const Pairs<C>& pairs, const Run& run, Index i, const T* grad_output, Index inner, Index channels,
                  const C* row, C* grad_row) {
  for (Index p = run.begin; p < run.end; ++p) {
    const T* gradient = grad_output + (pairs.other[p] * inner + i) * channels;
    const Index at = i * kPairs + p;
    for (int k = 0; k < I; ++k) pairs.grad[at + k * kPairs] = 0;
    multiply_gradient<I, kLanes<C>, T, C>(gradient, row, pairs.weights + at, 0, channels, grad_row, pairs.grad + at);
  }
}

template <typename T, typename C>
void multiply_all(const Pairs<C>& pairs, const Run& run, const T* grad_output, Index inner, Index channels, const C* row,
                  C* grad_row) {
  for (Index i = 0; i < inner; i += kInnerBlock) {
    switch (inner - i) {
      case 1:
        multiply_run<1>(pairs, run, i, grad_output, inner, channels, row, grad_row);
        break;
      case 2:
        multiply_run<2>(pairs, run, i, grad_output, inner, channels, row, grad_row);
        break;
      case 3:
        multiply_run<3>(pairs, run, i, grad_output, inner, channels, row, grad_row);
        break;
      default:
        multiply_run<kInnerBlock>(pairs, run, i, grad_output, inner, channels, row, grad_row);
    }
  }
}

template <typename C>
void write_grad_weights(const MergeProblem& problem, Index b, const Pairs<C>& pairs) {
  const Index inner = problem.inner;
  for (Index p = 0; p < pairs.count; ++p) {
    const Index at = (b * problem.points + pairs.other[p]) * problem.count + pairs.slot[p];
    C* to = static_cast<C*>(problem.grad_weights) + at * inner;
    for (Index i = 0; i < inner; ++i) to[i] = pairs.grad[i * kPairs + p];
  }
}

template <typename T, typename C>
const C* as_compute(const T* from, Index count, C* memory) {
  if constexpr (sizeof(T) == sizeof(C)) {
    return from;
  } else {
    constexpr int N = kLanes<C>;
    Index i = 0;
    for (; i + N <= count; i += N) store<N>(memory + i, load<N>(from + i));
    for (; i < count; ++i) store<1>(memory + i, load<1>(from + i));
    return memory;
  }
}

// The gradients of a run's pairs, and of its row of feat when all of them were seen.
template <typename T, typename C>
void backward_of_run(const MergeProblem& problem, Index b, const Run& run, const BackwardScratch<C>& scratch) {
  const Index inner = problem.inner, channels = problem.channels;
  const T* from = static_cast<const T*>(problem.feat) + b * problem.feat_batch_stride;
  const T* grad_output = static_cast<const T*>(problem.grad_output) + b * problem.points * inner * channels;
  const C* row = as_compute<T, C>(from + run.owner * problem.feat_row_stride, channels, scratch.row);
  if (run.first) {
    for (Index c = 0; c < channels; ++c) scratch.grad[c] = 0;
  }
  multiply_all(scratch.pairs, run, grad_output, inner, channels, row, scratch.grad);
  if (run.last) {
    T* to = static_cast<T*>(problem.grad_feat) + (b * problem.rows + run.owner) * channels;
    store_row(scratch.grad, channels, to);
  }
}

template <typename T, typename C>
void backward(const MergeProblem& problem, int64_t begin, int64_t end, void* memory) {
  constexpr int N = kLanes<C>;
  Index used;
  BackwardScratch<C> scratch(problem, memory, used);
  Pairs<C>& pairs = scratch.pairs;
  const Index blocks = (problem.rows + kMergeRows - 1) / kMergeRows;
  const Index sums = problem.given ? 0 : problem.inner * kMergeSums;
  for (Index task = begin; task < end; ++task) {
    const Index b = task / blocks, first = task % blocks * kMergeRows;
    const Index last = first + kMergeRows < problem.rows ? first + kMergeRows : problem.rows;
    C* grad_importance = static_cast<C*>(problem.grad_importance);
    if (grad_importance) grad_importance += b * problem.rows;
    C importance_sum = 0;
    for (Index i = 0; i < sums * N; ++i) scratch.sums[i] = 0;
    PointStream<C> stream(problem, b, first, last);
    while (stream.fill(pairs)) {
      if (sums && pairs.count) compute_weights<C, true>(problem, pairs);
      for (Index r = 0; r < pairs.runs; ++r) backward_of_run<T, C>(problem, b, pairs.run[r], scratch);
      if (problem.given) {
        write_grad_weights(problem, b, pairs);
        continue;
      }
      backward_of_weights(problem, pairs, scratch.sums);
      for (Index r = 0; grad_importance && r < pairs.runs; ++r) {
        const Run& run = pairs.run[r];
        importance_sum = run.first ? C(0) : importance_sum;
        for (Index p = run.begin; p < run.end; ++p) importance_sum += pairs.grad_scale[p];
        if (run.last) grad_importance[run.owner] = importance_sum;
      }
    }
    for (Index i = 0; i < sums; ++i) {
      problem.partial_sums[task * sums + i] = static_cast<double>(sum_lanes<N, C>(load<N>(scratch.sums + i * N)));
    }
  }
}

template <typename T, typename C>
constexpr MergeKernels make_kernels() {
  return {forward_scratch<T, C>, forward<T, C>, backward_scratch<T, C>, backward<T, C>};
}

}  // namespace

const MergeKernels merge_kernels[kValueTypes] = {
    make_kernels<double, double>(),
    make_kernels<float, float>(),
    make_kernels<BFloat16, float>(),
    make_kernels<Float16, float>(),
};
