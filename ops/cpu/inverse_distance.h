// Powers and logarithms of squared distances in vectors, and sums of the lanes of four vectors.  Include it after
// vectors.h, inside of the variant's namespace.
//
// float32 numbers are raised in float64, so that the result is the exact one rounded, up to 1e-9 of its last place.

template <int N>
using Doubles = Vector<double, N>;
template <int N>
using DoubleBits = Vector<uint64_t, N>;

// log2 of numbers >= 0 that were float32; -1023 for 0 and 1024 for infinity, which is far enough out for both.
template <int N>
inline __attribute__((always_inline)) Doubles<N> log2_of(const Doubles<N>& x) {
  using V = Doubles<N>;
  using Bits = DoubleBits<N>;
  const Bits bits = bit_cast<Bits>(x);
  // 1023 more than the exponent for a mantissa in [sqrt(1/2), sqrt(2)).
  const Bits biased = (bits + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu)) >> 52;
  const V exponent = bit_cast<V>(Bits(biased | 0x4330000000000000u)) - (4503599627370496.0 + 1023.0);
  const V mantissa = bit_cast<V>(Bits(bits - (biased << 52) + 0x3ff0000000000000u));
  const V s = (mantissa - 1) / (mantissa + 1), z = s * s;
  V p = z * 0.22195308321368667 + 0.2623081892525388;  // 2 / ln(2) / (2 k + 1), k = 6, 5, ...
  p = p * z + 0.3205988979753252;
  p = p * z + 0.41219858311113243;
  p = p * z + 0.5770780163555854;
  p = p * z + 0.9617966939259757;
  p = p * z + 2.8853900817779268;
  const V result = exponent + s * p;
  return x == x ? result : x;
}

// 2^y; 0 and infinity in float32 for y out of its range.
template <int N>
inline __attribute__((always_inline)) Doubles<N> exp2_of(Doubles<N> y) {
  using V = Doubles<N>;
  using Bits = DoubleBits<N>;
  y = y < -1000.0 ? V{} - 1000.0 : y;
  y = y > 1000.0 ? V{} + 1000.0 : y;
  const V shifted = y + 6755399441055744.0;  // rounds to an integer, which stands in the low bits of the sum
  const V r = (y - (shifted - 6755399441055744.0)) * 0.6931471805599453;
  V p = r * (1 / 40320.0) + 1 / 5040.0;
  p = p * r + 1 / 720.0;
  p = p * r + 1 / 120.0;
  p = p * r + 1 / 24.0;
  p = p * r + 1 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * bit_cast<V>(Bits((bit_cast<Bits>(shifted) << 52) + 0x3ff0000000000000u));
}

// Calls function on the two halves of a vector of float32, in float64.
template <int N, typename Function>
inline __attribute__((always_inline)) Vector<float, N> in_double(const Vector<float, N>& x, const Function& function) {
  using Half = Vector<float, N / 2>;
  Half halves[2], results[2];
  __builtin_memcpy(halves, &x, sizeof(x));
  for (int i = 0; i < 2; ++i) {
    const Doubles<N / 2> wide = function(Doubles<N / 2>(__builtin_convertvector(halves[i], Doubles<N / 2>)));
    results[i] = __builtin_convertvector(wide, Half);
  }
  Vector<float, N> result;
  __builtin_memcpy(&result, results, sizeof(result));
  return result;
}

// An exponent; 1, 2 and 3 are taken by multiplication, which is off by 1 unit in the last place at most.
struct Power {
  double value;
  int whole;

  explicit Power(double power) : value(power), whole(power == 1 ? 1 : power == 2 ? 2 : power == 3 ? 3 : 0) {}
};

template <int N, typename C>
inline __attribute__((always_inline)) bool raise_whole(const Vector<C, N>& x, Power power, Vector<C, N>& result) {
  if (power.whole == 0) return false;
  result = power.whole == 1 ? x : power.whole == 2 ? Vector<C, N>(x * x) : Vector<C, N>(x * x * x);
  return true;
}

// Powers of numbers >= 0.
template <int N>
inline __attribute__((always_inline)) Vector<float, N> raise(const Vector<float, N>& x, Power power) {
  Vector<float, N> result;
  if (raise_whole<N, float>(x, power, result)) return result;
  const double exponent = power.value;
  return in_double<N>(x, [exponent](const Doubles<N / 2>& wide) {
    return exp2_of<N / 2>(Doubles<N / 2>(log2_of<N / 2>(wide) * exponent));
  });
}

template <int N>
inline __attribute__((always_inline)) Vector<double, N> raise(const Vector<double, N>& x, Power power) {
  Vector<double, N> result;
  if (raise_whole<N, double>(x, power, result)) return result;
  for (int i = 0; i < N; ++i) result[i] = __builtin_pow(x[i], power.value);
  return result;
}

// Natural logarithms of numbers > 0.
template <int N>
inline __attribute__((always_inline)) Vector<float, N> logarithm(const Vector<float, N>& x) {
  return in_double<N>(x, [](const Doubles<N / 2>& wide) {
    return Doubles<N / 2>(log2_of<N / 2>(wide) * 0.6931471805599453);
  });
}

template <int N>
inline __attribute__((always_inline)) Vector<double, N> logarithm(const Vector<double, N>& x) {
  Vector<double, N> result;
  for (int i = 0; i < N; ++i) result[i] = __builtin_log(x[i]);
  return result;
}

template <int... LANES, typename V>
inline __attribute__((always_inline)) V pick(const V& a, const V& b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, LANES...);
#else
  using Int = typename IntegerOf<typename std::remove_cv<typename std::remove_reference<decltype(a[0])>::type>::type>::type;
  return __builtin_shuffle(a, b, Vector<Int, 4>{LANES...});
#endif
}

// Add the sums of the lanes of four vectors to four numbers, in a fixed order.
template <int N, typename C>
inline __attribute__((always_inline)) void sum_lanes_of_four(const Vector<C, N> (&v)[4], C (&sums)[4]) {
  if constexpr (N < 4) {
    for (int i = 0; i < 4; ++i) sums[i] += sum_lanes<N, C>(v[i]);
  } else if constexpr (N == 4) {
    using V = Vector<C, 4>;
    const V first = pick<0, 4, 1, 5>(v[0], v[1]) + pick<2, 6, 3, 7>(v[0], v[1]);
    const V second = pick<0, 4, 1, 5>(v[2], v[3]) + pick<2, 6, 3, 7>(v[2], v[3]);
    store<4>(sums, V(load<4>(sums) + (pick<0, 1, 4, 5>(first, second) + pick<2, 3, 6, 7>(first, second))));
  } else {
    Vector<C, N / 2> halves[4];
    for (int i = 0; i < 4; ++i) {
      Vector<C, N / 2> parts[2];
      __builtin_memcpy(parts, &v[i], sizeof(parts));
      halves[i] = parts[0] + parts[1];
    }
    sum_lanes_of_four<N / 2, C>(halves, sums);
  }
}
