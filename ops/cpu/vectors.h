// Small vectors of a fixed number of lanes, in the vector extension of GCC and clang, for kernels that are compiled
// once for each instruction set.  A single lane is a plain number, so that the same template handles left-over
// channels.  Include it inside of the variant's namespace, after BOLTZ_MM_VECTOR_BYTES was defined; it must not bring
// functions of the standard library with it, which the linker could share between instruction sets.

template <typename C, int N>
struct VectorOf {
  typedef C type __attribute__((vector_size(N * sizeof(C))));
};
template <typename C>
struct VectorOf<C, 1> {
  using type = C;
};
template <typename C, int N>
using Vector = typename VectorOf<C, N>::type;

template <typename C>
constexpr int kLanes = BOLTZ_MM_VECTOR_BYTES / sizeof(C);

template <typename C>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

// Storage types of the 16-bit formats.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
inline __attribute__((always_inline)) To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <int N>
inline __attribute__((always_inline)) Vector<uint32_t, N> load_bits(const void* from) {
  if constexpr (N == 1) {
    uint16_t bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return bits;
  } else {
    Vector<uint16_t, N> bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return __builtin_convertvector(bits, Vector<uint32_t, N>);
  }
}

// Load N elements of a storage type as numbers of the compute type.
template <int N>
inline __attribute__((always_inline)) Vector<float, N> load(const float* from) {
  Vector<float, N> to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}

template <int N>
inline __attribute__((always_inline)) Vector<double, N> load(const double* from) {
  Vector<double, N> to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}

template <int N>
inline __attribute__((always_inline)) Vector<float, N> load(const BFloat16* from) {
  return bit_cast<Vector<float, N>>(Vector<uint32_t, N>(load_bits<N>(from) << 16));
}

template <int N>
inline __attribute__((always_inline)) Vector<float, N> load(const Float16* from) {
  using Bits = Vector<uint32_t, N>;
  const Bits half = load_bits<N>(from);
  const Bits magnitude = (half & 0x7fffu) << 13;
  // 2^112 moves the exponent from the bias of float16 to that of float32, subnormals included.
  const Bits scaled = bit_cast<Bits>(Vector<float, N>(bit_cast<Vector<float, N>>(magnitude) * 0x1p112f));
  const Bits special = magnitude >= 0x0f800000u ? Bits{} + 0x7f800000u : Bits{};
  return bit_cast<Vector<float, N>>(Bits(scaled | special | ((half & 0x8000u) << 16)));
}

// Store N numbers, or masks and indices of the same width.
template <int N>
inline __attribute__((always_inline)) void store(float* to, const Vector<float, N>& from) {
  __builtin_memcpy(to, &from, sizeof(from));
}

template <int N>
inline __attribute__((always_inline)) void store(double* to, const Vector<double, N>& from) {
  __builtin_memcpy(to, &from, sizeof(from));
}

template <int N>
inline __attribute__((always_inline)) void store(int32_t* to, const Vector<int32_t, N>& from) {
  __builtin_memcpy(to, &from, sizeof(from));
}

template <int N>
inline __attribute__((always_inline)) void store(int64_t* to, const Vector<int64_t, N>& from) {
  __builtin_memcpy(to, &from, sizeof(from));
}

inline uint16_t round_to_bfloat16(float number) {
  const uint32_t bits = bit_cast<uint32_t>(number);
  if (number != number) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t round_to_float16(float number) {
  const uint32_t bits = bit_cast<uint32_t>(number);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the hardware round at 2^-24
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

template <int N>
inline void store(BFloat16* to, const Vector<float, N>& from) {
  float numbers[N];
  __builtin_memcpy(numbers, &from, sizeof(numbers));
  for (int i = 0; i < N; ++i) to[i].bits = round_to_bfloat16(numbers[i]);
}

template <int N>
inline void store(Float16* to, const Vector<float, N>& from) {
  float numbers[N];
  __builtin_memcpy(numbers, &from, sizeof(numbers));
  for (int i = 0; i < N; ++i) to[i].bits = round_to_float16(numbers[i]);
}

// Sum of the lanes, in a fixed order.  By value, so that a caller's sum in a loop needs no address and stays in a
// register.
template <int N, typename C>
inline __attribute__((always_inline)) C sum_lanes(const Vector<C, N> v) {
  if constexpr (N == 1) {
    return v;
  } else if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    Vector<C, N / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return sum_lanes<N / 2, C>(low + high);
  }
}

// The larger of the lanes; of those that are not NaN, unless NaN is among the first of its comparisons.
template <int N, typename C>
inline __attribute__((always_inline)) C max_lanes(const Vector<C, N> v) {
  if constexpr (N == 1) {
    return v;
  } else if constexpr (N == 2) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    Vector<C, N / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return max_lanes<N / 2, C>(Vector<C, N / 2>(low > high ? low : high));
  }
}

// exp of numbers <= 0; 0 below -87, NaN stays NaN.  Error about 1 unit in the last place.
template <int N>
inline __attribute__((always_inline)) Vector<float, N> exp_negative(const Vector<float, N>& x) {
  using V = Vector<float, N>;
  using Bits = Vector<uint32_t, N>;
  // Adding 1.5 * 2^23 rounds x / ln 2 to an integer, which stands in the low bits of the sum.
  const V shifted = x * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits exponent = (bit_cast<Bits>(shifted) << 23) + 0x3f800000u;
  const V result = p * bit_cast<V>(exponent);
  return x < -87.0f ? V{} : result;
}

template <int N>
inline __attribute__((always_inline)) Vector<double, N> exp_negative(const Vector<double, N>& x) {
  if constexpr (N == 1) {
    return __builtin_exp(x);
  } else {
    Vector<double, N> result = x;
    for (int i = 0; i < N; ++i) result[i] = __builtin_exp(x[i]);
    return result;
  }
}
