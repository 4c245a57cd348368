// The kernels of cluster attention for x86-64 processors with AVX-512 (F, BW, DQ and VL).
#include "cluster_attention.h"

#ifdef BOLTZ_MM_X86_VARIANTS

#define BOLTZ_MM_VECTOR_BYTES 64

// To the end of the file, because templates are compiled there.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace boltz_mm::avx512 {
#include "cluster_attention_kernels.h"
}  // namespace boltz_mm::avx512

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
