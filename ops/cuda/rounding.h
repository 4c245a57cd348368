// Arithmetic of one rounding per operation, which no compiler may fuse: the same on a device and, for the tests, on a
// CPU (compiled with -ffp-contract=off).

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BOLTZ_MM_ROUNDED __device__ __forceinline__
#define BOLTZ_MM_UNROLLED _Pragma("unroll")
#else
#define BOLTZ_MM_ROUNDED inline
#define BOLTZ_MM_UNROLLED
#endif

namespace boltz_mm::cuda {

BOLTZ_MM_ROUNDED float multiply(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

BOLTZ_MM_ROUNDED float add(float a, float b) {
#ifdef __CUDACC__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

BOLTZ_MM_ROUNDED float subtract(float a, float b) { return add(a, -b); }

BOLTZ_MM_ROUNDED float divide(float a, float b) {
#ifdef __CUDACC__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

BOLTZ_MM_ROUNDED float root(float a) {
#ifdef __CUDACC__
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

BOLTZ_MM_ROUNDED uint32_t bits_of(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof(bits));
  return bits;
}

BOLTZ_MM_ROUNDED float float_of(uint32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof(number));
  return number;
}

BOLTZ_MM_ROUNDED float squared_length(float x, float y) { return add(multiply(x, x), multiply(y, y)); }

}  // namespace boltz_mm::cuda
