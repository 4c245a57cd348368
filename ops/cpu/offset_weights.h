// The weights of pairs (point, neighbour) that follow from their offset, and back: five numbers of the offset, a linear
// layer, layer norm and GELU, in vectors over the pairs.  Include it after vectors.h, inside of the variant's
// namespace; see point_merge_kernels.h.

using Index = int64_t;

constexpr Index kPairs = 512;  // at a time; a multiple of the lanes of every vector

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

template <int N>
inline __attribute__((always_inline)) Vector<float, N> square_root(const Vector<float, N>& x) {
  Vector<float, N> result = x;
  for (int i = 0; i < N; ++i) result[i] = __builtin_sqrtf(x[i]);
  return result;
}

template <int N>
inline __attribute__((always_inline)) Vector<double, N> square_root(const Vector<double, N>& x) {
  Vector<double, N> result = x;
  for (int i = 0; i < N; ++i) result[i] = __builtin_sqrt(x[i]);
  return result;
}

// The error function within 2 units in the last place: a polynomial of x^2 near 0, further out 1 - exp(a polynomial),
// both fitted to it.
template <int N>
inline __attribute__((always_inline)) Vector<float, N> error_function(const Vector<float, N>& x) {
  using V = Vector<float, N>;
  const V size = x < 0.0f ? -x : x;
  const V square = x * x;
  V near = square * 8.34522507e-5f - 8.13743740e-4f;
  near = near * square + 5.20063423e-3f;
  near = near * square - 2.68592704e-2f;
  near = near * square + 1.12836942e-1f;
  near = near * square - 3.76126349e-1f;
  near = near * square + 1.28379166e-1f;
  near = near * x + x;
  const V t = size > 4.05f ? V{} + 4.05f : size;  // erf is 1 there; NaN stays
  V far = t * 1.16125184e-5f - 3.26624751e-4f;
  far = far * t + 3.65801807e-3f;
  far = far * t - 2.37950236e-2f;
  far = far * t + 1.06275208e-1f;
  far = far * t + 6.35128081e-1f;
  far = far * t + 1.12865424f;
  far = 1.0f - exp_negative<N>(V(-(far * t)));
  far = x < 0.0f ? -far : far;
  return size < 0.93f ? near : far;
}

template <int N>
inline __attribute__((always_inline)) Vector<double, N> error_function(const Vector<double, N>& x) {
  Vector<double, N> result = x;
  for (int i = 0; i < N; ++i) result[i] = __builtin_erf(x[i]);
  return result;
}

// Pairs in a row of the stream that share the point (forward) or the row of feat (backward).
struct Run {
  Index owner, begin, end;
  bool first, last;  // of the owner's pairs
};

// What is known of kPairs pairs; an array [I] of anything has kPairs elements for each i.
template <typename C>
struct Pairs {
  Index count = 0, runs = 0;
  Index* other;        // row of feat (forward), point (backward)
  Index* slot;         // of the point's list; where weights are given
  Run* run;
  C *dx, *dy, *scale;
  C* weights;          // [I]
  // Backward:
  C* normalized;       // [I]
  C* activation;       // [I] before importance
  C* slope;            // [I] of GELU
  C* grad;             // [I] of weights
  C* deviation;        // 1 / standard deviation
  C* grad_scale;

  void carve(Carver& carver, Index inner, bool backward) {
    other = carver.take<Index>(kPairs);
    slot = carver.take<Index>(kPairs);
    run = carver.take<Run>(kPairs);
    C** const single[] = {&dx, &dy, &scale, &deviation, &grad_scale};
    for (C** array : single) *array = carver.take<C>(kPairs);
    weights = carver.take<C>(kPairs * inner);
    if (!backward) return;
    C** const many[] = {&normalized, &activation, &slope, &grad};
    for (C** array : many) *array = carver.take<C>(kPairs * inner);
  }

  bool full() const { return count == kPairs || runs == kPairs; }
};

inline __attribute__((always_inline)) Index cluster_of(const MergeProblem& problem, Index b, Index entry) {
  const Index at = b * problem.nearest_batch_stride + entry;
  return problem.nearest_is_wide ? static_cast<const int64_t*>(problem.nearest)[at]
                                 : static_cast<const int32_t*>(problem.nearest)[at];
}

template <typename C>
inline __attribute__((always_inline)) C clamp(C x, C limit) {
  const C above = x < -limit ? -limit : x;
  return above > limit ? limit : above;
}

// Offset and importance of a new pair; positions are those of the pair's image.
template <typename C>
inline __attribute__((always_inline)) void place(const MergeProblem& problem, Pairs<C>& pairs, const C* query,
                                                 const C* key, const C* importance) {
  const C sign = static_cast<C>(problem.sign), limit = static_cast<C>(problem.max_offset);
  pairs.dx[pairs.count] = clamp<C>((key[0] - query[0]) * sign, limit);
  pairs.dy[pairs.count] = clamp<C>((key[1] - query[1]) * sign, limit);
  pairs.scale[pairs.count] = importance ? *importance : C(1);
}

template <typename C>
const C* of_image(const void* tensor, Index b, Index stride) {
  return tensor ? static_cast<const C*>(tensor) + b * stride : nullptr;
}

// The given weights of all pairs.
template <typename C>
inline __attribute__((always_inline)) void read_weights(const MergeProblem& problem, Index b, Index point, Index slot,
                                                        Pairs<C>& pairs) {
  const Index inner = problem.inner;
  const C* from = static_cast<const C*>(problem.weights) + ((b * problem.points + point) * problem.count + slot) * inner;
  for (Index i = 0; i < inner; ++i) pairs.weights[i * kPairs + pairs.count] = from[i];
}

// Fill up the last vector with copies of the last pair, so that nothing strange is computed there.
template <typename C>
void pad(Pairs<C>& pairs) {
  for (Index p = pairs.count; p % kLanes<C> != 0; ++p) {
    pairs.dx[p] = pairs.dx[p - 1];
    pairs.dy[p] = pairs.dy[p - 1];
    pairs.scale[p] = 0;
  }
}

template <typename C>
struct Five {
  Vector<C, kLanes<C>> x[5];
};

template <typename C>
inline __attribute__((always_inline)) Five<C> five_features(const Pairs<C>& pairs, Index p) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const V dx = load<N>(pairs.dx + p), dy = load<N>(pairs.dy + p);
  const V square = dx * dx + dy * dy;
  const V distance = square_root<N>(square);
  const auto is_zero = square == C(0);
  return {{dx, dy, distance, is_zero ? V{} : dy / distance, is_zero ? V{} : dx / distance}};
}

// The weights of all pairs from their offsets: GELU of the normalised linear layer, times importance.
template <typename C, bool kBackward>
void compute_weights(const MergeProblem& problem, Pairs<C>& pairs) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const Index inner = problem.inner;
  const C *weight = static_cast<const C*>(problem.weight), *bias = static_cast<const C*>(problem.bias);
  const C *gain = static_cast<const C*>(problem.norm_weight), *shift = static_cast<const C*>(problem.norm_bias);
  const C share = C(1) / static_cast<C>(inner), eps = static_cast<C>(problem.eps);
  pad(pairs);
  for (Index p = 0; p < pairs.count; p += N) {
    const Five<C> five = five_features(pairs, p);
    V sum{};
    for (Index i = 0; i < inner; ++i) {
      V hidden = V{} + bias[i];
      for (int f = 0; f < 5; ++f) hidden += five.x[f] * weight[i * 5 + f];
      store<N>(pairs.weights + i * kPairs + p, hidden);
      sum += hidden;
    }
    const V mean = sum * share;
    V variance{};
    for (Index i = 0; i < inner; ++i) {
      const V centred = load<N>(pairs.weights + i * kPairs + p) - mean;
      variance += centred * centred;
    }
    const V deviation = C(1) / square_root<N>(V(variance * share + eps));
    const V scale = load<N>(pairs.scale + p);
    if constexpr (kBackward) store<N>(pairs.deviation + p, deviation);
    for (Index i = 0; i < inner; ++i) {
      const Index at = i * kPairs + p;
      const V normalized = (load<N>(pairs.weights + at) - mean) * deviation;
      const V x = normalized * gain[i] + shift[i];
      const V share_below = C(0.5) * error_function<N>(V(x * C(0.70710678118654752))) + C(0.5);
      const V activation = x * share_below;
      store<N>(pairs.weights + at, V(activation * scale));
      if constexpr (kBackward) {
        const V density = exp_negative<N>(V(x * x * C(-0.5))) * C(0.39894228040143268);
        store<N>(pairs.normalized + at, normalized);
        store<N>(pairs.activation + at, activation);
        store<N>(pairs.slope + at, V(share_below + x * density));
      }
    }
  }
}

// From the gradients of all pairs' weights to those of the parameters (added to sums) and of importance.
template <typename C>
void backward_of_weights(const MergeProblem& problem, Pairs<C>& pairs, C* sums) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const Index inner = problem.inner;
  const C* gain = static_cast<const C*>(problem.norm_weight);
  const C share = C(1) / static_cast<C>(inner);
  for (Index i = 0; i < inner; ++i) {
    for (Index p = pairs.count; p % N != 0; ++p) pairs.grad[i * kPairs + p] = 0;
  }
  const auto add = [sums](Index i, Index which, const V& x) {
    C* to = sums + (i * kMergeSums + which) * N;
    store<N>(to, V(load<N>(to) + x));
  };
  for (Index p = 0; p < pairs.count; p += N) {
    const V scale = load<N>(pairs.scale + p);
    V grad_scale{}, mean{}, mean_product{};
    for (Index i = 0; i < inner; ++i) {
      const Index at = i * kPairs + p;
      const V grad = load<N>(pairs.grad + at), normalized = load<N>(pairs.normalized + at);
      grad_scale += grad * load<N>(pairs.activation + at);
      const V before_gelu = grad * scale * load<N>(pairs.slope + at);
      add(i, 6, V(before_gelu * normalized));
      add(i, 7, before_gelu);
      const V grad_normalized = before_gelu * gain[i];
      store<N>(pairs.grad + at, grad_normalized);
      mean += grad_normalized;
      mean_product += grad_normalized * normalized;
    }
    store<N>(pairs.grad_scale + p, grad_scale);
    mean *= share;
    mean_product *= share;
    const Five<C> five = five_features(pairs, p);
    const V deviation = load<N>(pairs.deviation + p);
    for (Index i = 0; i < inner; ++i) {
      const Index at = i * kPairs + p;
      const V grad = (load<N>(pairs.grad + at) - mean - load<N>(pairs.normalized + at) * mean_product) * deviation;
      for (int f = 0; f < 5; ++f) add(i, f, V(grad * five.x[f]));
      add(i, 5, grad);
    }
  }
}
