// The search for nearest neighbours for every processor of the platform.
#include "neighbors.h"

#define BOLTZ_MM_VECTOR_BYTES 16

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace boltz_mm::baseline {
#include "neighbors_kernels.h"
}  // namespace boltz_mm::baseline
