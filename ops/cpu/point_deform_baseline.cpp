// The point kernels for every processor of the platform.
#include "point_deform.h"

#define BOLTZ_MM_VECTOR_BYTES 16

namespace boltz_mm::baseline {
#include "point_deform_kernels.h"
}  // namespace boltz_mm::baseline
