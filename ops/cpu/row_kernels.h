// Inner loops over rows of channels, for kernels that are compiled once for each instruction set: products of a row
// with panels of rows, weighted sums of rows, and sums of weighted rows for several keys at a time.  Include it after
// vectors.h, inside of the variant's namespace.
//
// A panel is P rows, transposed: [D][P].  Rows that are added up are padded to whole vectors.

using Index = int64_t;

constexpr int kMostPanels = 6;     // at a time
constexpr int kVectorRegisters = BOLTZ_MM_VECTOR_BYTES == 64 ? 32 : 16;

template <typename C>
inline Index padded_to_vectors(Index count) {
  return (count + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// to[g * P + p] += row . (row p of the panel at panels[g] + shift)
template <typename C, int P, int G>
inline void multiply_panels(const C* row, const C* const* panels, Index shift, Index depth, C* to) {
  using V = Vector<C, P>;
  constexpr int U = G <= 2 ? 4 : G <= 4 ? 2 : 1;  // chains of additions for each panel, that they overlap
  V sums[G][U] = {};
  const C* at[G];
  for (int g = 0; g < G; ++g) at[g] = panels[g] + shift;
  Index d = 0;
  for (; d + U <= depth; d += U) {
    for (int u = 0; u < U; ++u) {
      for (int g = 0; g < G; ++g) sums[g][u] += row[d + u] * load<P>(at[g] + (d + u) * P);
    }
  }
  for (; d < depth; ++d) {
    for (int g = 0; g < G; ++g) sums[g][0] += row[d] * load<P>(at[g] + d * P);
  }
  for (int g = 0; g < G; ++g) {
    V sum = sums[g][0];
    for (int u = 1; u < U; ++u) sum += sums[g][u];
    store<P>(to + g * P, V(load<P>(to + g * P) + sum));
  }
}

template <typename C, int P>
void multiply_all_panels(const C* row, const C* const* panels, Index shift, Index count, Index depth, C* to) {
  Index done = 0;
  for (; count - done >= kMostPanels; done += kMostPanels) {
    multiply_panels<C, P, kMostPanels>(row, panels + done, shift, depth, to + done * P);
  }
  switch (count - done) {
    case 5:
      return multiply_panels<C, P, 5>(row, panels + done, shift, depth, to + done * P);
    case 4:
      return multiply_panels<C, P, 4>(row, panels + done, shift, depth, to + done * P);
    case 3:
      return multiply_panels<C, P, 3>(row, panels + done, shift, depth, to + done * P);
    case 2:
      return multiply_panels<C, P, 2>(row, panels + done, shift, depth, to + done * P);
    case 1:
      return multiply_panels<C, P, 1>(row, panels + done, shift, depth, to + done * P);
    default:
      return;
  }
}

template <typename C>
inline C multiply_rows(const C* a, const C* b, Index depth) {
  constexpr int N = kLanes<C>;
  Vector<C, N> sum = {};
  Index d = 0;
  for (; d + N <= depth; d += N) sum += load<N>(a + d) * load<N>(b + d);
  C result = sum_lanes<N, C>(sum);
  for (; d < depth; ++d) result += a[d] * b[d];
  return result;
}

// to[k] += row . (row at rows[k] + shift)
template <typename C>
void multiply_single_rows(const C* row, const C* const* rows, Index shift, Index count, Index depth, C* to) {
  for (Index k = 0; k < count; ++k) to[k] += multiply_rows(row, rows[k] + shift, depth);
}

// The width of a panel for clusters of a size: the fewest panels, then the least padding; 1 stands for no panels.
template <typename C>
Index panel_width(Index cluster_size) {
  if (cluster_size == 1) return 1;
  Index best = kLanes<C>;
  for (Index width = kLanes<C> / 2; width >= 2 && width * 4 >= kLanes<C>; width /= 2) {
    if ((cluster_size + width - 1) / width <= (cluster_size + best - 1) / best) best = width;
  }
  return best;
}

// to[k] += row . (row k), for keys in panels of a width, or for single rows.
template <typename C>
inline void multiply(Index width, const C* row, const C* const* panels, Index shift, Index count, Index depth, C* to) {
  constexpr int N = kLanes<C>;
  if (width == N) return multiply_all_panels<C, N>(row, panels, shift, count, depth, to);
  if constexpr (N >= 4) {
    if (width == N / 2) return multiply_all_panels<C, N / 2>(row, panels, shift, count, depth, to);
  }
  if constexpr (N >= 8) {
    if (width == N / 4) return multiply_all_panels<C, N / 4>(row, panels, shift, count, depth, to);
  }
  multiply_single_rows(row, panels, shift, count, depth, to);
}

// VN vectors of the sum over k of weights[k] * (row at rows[k] + shift)
template <typename C, int VN>
inline void add_rows(const C* weights, const C* const* rows, Index shift, Index count, C* to) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  constexpr int U = VN >= 4 ? 2 : VN == 1 ? 8 : 4;  // chains of additions for each vector
  V sums[U][VN] = {};
  Index k = 0;
  for (; k + U <= count; k += U) {
    for (int u = 0; u < U; ++u) {
      for (int v = 0; v < VN; ++v) sums[u][v] += weights[k + u] * load<N>(rows[k + u] + shift + v * N);
    }
  }
  for (; k < count; ++k) {
    for (int v = 0; v < VN; ++v) sums[0][v] += weights[k] * load<N>(rows[k] + shift + v * N);
  }
  for (int v = 0; v < VN; ++v) {
    V sum = sums[0][v];
    for (int u = 1; u < U; ++u) sum += sums[u][v];
    store<N>(to + v * N, sum);
  }
}

// to = sum over k of weights[k] * (row at rows[k] + shift), of `depth` channels, a multiple of the lanes
template <typename C>
void add_weighted_rows(const C* weights, const C* const* rows, Index shift, Index count, Index depth, C* to) {
  constexpr int N = kLanes<C>;
  Index first = 0;
  for (; depth - first >= 4 * N; first += 4 * N) add_rows<C, 4>(weights, rows, shift + first, count, to + first);
  switch ((depth - first) / N) {
    case 3:
      return add_rows<C, 3>(weights, rows, shift + first, count, to + first);
    case 2:
      return add_rows<C, 2>(weights, rows, shift + first, count, to + first);
    case 1:
      return add_rows<C, 1>(weights, rows, shift + first, count, to + first);
    default:
      return;
  }
}

// An entry of a list of queries: where its weights for the keys of a cluster begin, and the number of its row.
struct Entry {
  Index weights, row;
};

// to[k] += sum over entries of weights[entry.weights + k] * (row entry.row), for K keys and VN vectors of channels
template <typename C, int K, int VN>
inline void spread_tile(const C* weights, const C* rows, Index row_stride, const Entry* entries, Index count, C* to,
                        Index to_stride) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  V sums[K][VN];
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < VN; ++v) sums[k][v] = load<N>(to + k * to_stride + v * N);
  }
  for (Index e = 0; e < count; ++e) {
    const C* weight = weights + entries[e].weights;
    const C* row = rows + entries[e].row * row_stride;
    V channels[VN];
    for (int v = 0; v < VN; ++v) channels[v] = load<N>(row + v * N);
    for (int k = 0; k < K; ++k) {
      for (int v = 0; v < VN; ++v) sums[k][v] += weight[k] * channels[v];
    }
  }
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < VN; ++v) store<N>(to + k * to_stride + v * N, sums[k][v]);
  }
}

template <typename C, int K>
inline void spread_keys(const C* weights, const C* rows, Index row_stride, const Entry* entries, Index count,
                        Index depth, C* to, Index to_stride) {
  constexpr int N = kLanes<C>;
  Index first = 0;
  for (; depth - first >= 2 * N; first += 2 * N) {
    spread_tile<C, K, 2>(weights, rows + first, row_stride, entries, count, to + first, to_stride);
  }
  if (first < depth) spread_tile<C, K, 1>(weights, rows + first, row_stride, entries, count, to + first, to_stride);
}

// to[k] += sum over entries of weights[entry.weights + k] * (row entry.row), of `depth` channels in whole vectors
template <typename C>
void spread_rows(const C* weights, const C* rows, Index row_stride, const Entry* entries, Index count, Index keys,
                 Index depth, C* to, Index to_stride) {
  constexpr int kMost = kVectorRegisters / 4;
  Index k = 0;
  for (; keys - k >= kMost; k += kMost) {
    spread_keys<C, kMost>(weights + k, rows, row_stride, entries, count, depth, to + k * to_stride, to_stride);
  }
  for (; keys - k >= 2; k += 2) {
    spread_keys<C, 2>(weights + k, rows, row_stride, entries, count, depth, to + k * to_stride, to_stride);
  }
  if (k < keys) spread_keys<C, 1>(weights + k, rows, row_stride, entries, count, depth, to + k * to_stride, to_stride);
}

// Channels of any storage type as numbers times a factor; the rest of the last vector becomes 0.
template <typename T, typename C>
inline void load_row(const T* from, Index depth, C factor, C* to) {
  constexpr int N = kLanes<C>;
  Index d = 0;
  for (; d + N <= depth; d += N) store<N>(to + d, Vector<C, N>(load<N>(from + d) * factor));
  if (d == depth) return;
  const Index end = d + N;
  for (; d < depth; ++d) to[d] = load<1>(from + d) * factor;
  for (; d < end; ++d) to[d] = 0;
}

template <typename T>
inline void store_one(T* to, float number) {
  store<1>(to, number);
}
inline void store_one(float* to, float number) { *to = number; }
inline void store_one(double* to, double number) { *to = number; }

template <typename T, typename C>
inline void store_row(const C* from, Index depth, C factor, T* to) {
  constexpr int N = kLanes<C>;
  Index d = 0;
  for (; d + N <= depth; d += N) store<N>(to + d, Vector<C, N>(load<N>(from + d) * factor));
  for (; d < depth; ++d) store_one(to + d, from[d] * factor);
}

// 1 / sqrt(s) for s >= 0, finite where s is 0, and sqrt(s); both to about 1 unit in the last place.
template <int N>
inline Vector<float, N> inverse_root(const Vector<float, N>& s) {
  using V = Vector<float, N>;
  using Bits = Vector<uint32_t, N>;
  V y = bit_cast<V>(Bits(0x5f3759dfu - (bit_cast<Bits>(s) >> 1)));
  for (int i = 0; i < 3; ++i) y *= 1.5f - 0.5f * s * y * y;
  return y;
}

template <int N>
inline Vector<double, N> inverse_root(const Vector<double, N>& s) {
  using V = Vector<double, N>;
  using Bits = Vector<uint64_t, N>;
  V y = bit_cast<V>(Bits(0x5fe6eb50c7b537a9ull - (bit_cast<Bits>(s) >> 1)));
  for (int i = 0; i < 4; ++i) y *= 1.5 - 0.5 * s * y * y;
  return y;
}
