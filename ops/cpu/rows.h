// Rows of numbers: scratch memory, softmax, conversion, and loops over channels.  Include it after vectors.h, inside of
// the variant's namespace.

using Index = int64_t;

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

template <typename C>
inline Index padded(Index count) {
  return (count + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// Softmax of count numbers; row has room for padded(count).
template <typename C>
void softmax_row(const C* logits, Index count, C* row) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const Index size = padded<C>(count);
  for (Index i = 0; i < count; ++i) row[i] = logits[i];
  for (Index i = count; i < size; ++i) row[i] = -__builtin_inf();
  V top = load<N>(row);
  for (Index i = N; i < size; i += N) {
    const V v = load<N>(row + i);
    top = v > top ? v : top;
  }
  C largest = top[0];
  for (int i = 1; i < N; ++i) largest = top[i] > largest ? top[i] : largest;
  V sum = {};
  for (Index i = 0; i < size; i += N) {
    const V e = exp_negative<N>(V(load<N>(row + i) - largest));
    store<N>(row + i, e);
    sum += e;
  }
  const C scale = 1 / sum_lanes<N, C>(sum);
  for (Index i = 0; i < size; i += N) store<N>(row + i, V(load<N>(row + i) * scale));
}

// Calls body.template run<vectors, lanes>(channel) until all channels are covered: first four vectors at a time in
// 128 bytes, then one, then half of one, down to single channels.
template <int VECTORS, int N, typename Body>
inline __attribute__((always_inline)) void for_channels(const Body& body, Index channel, Index depth) {
  while (channel + VECTORS * N <= depth) {
    body.template run<VECTORS, N>(channel);
    channel += VECTORS * N;
  }
  if (channel == depth) return;
  if constexpr (VECTORS > 1) {
    for_channels<1, N>(body, channel, depth);
  } else if constexpr (N > 1) {
    for_channels<1, N / 2>(body, channel, depth);
  }
}

constexpr int kVectors = 128 / BOLTZ_MM_VECTOR_BYTES;

template <typename From, typename To>
struct ConvertRow {
  const From* from;
  To* to;

  template <int VECTORS, int N>
  inline __attribute__((always_inline)) void run(Index channel) const {
    store<N>(to + channel, load<N>(from + channel));
  }
};

// Copy a row between the value type and the compute type.
template <int N, typename From, typename To>
inline void convert_row(const From* from, Index depth, To* to) {
  for_channels<1, N>(ConvertRow<From, To>{from, to}, 0, depth);
}
