// The kernels of cluster attention for x86-64 processors with AVX2 and FMA.
#include "cluster_attention.h"

#ifdef BOLTZ_MM_X86_VARIANTS

#define BOLTZ_MM_VECTOR_BYTES 32

// To the end of the file, because templates are compiled there.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace boltz_mm::avx2 {
#include "cluster_attention_kernels.h"
}  // namespace boltz_mm::avx2

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
