// The floating-point types that operators store.

#pragma once

namespace boltz_mm {

enum class ValueType : int { float64, float32, bfloat16, float16 };
constexpr int kValueTypes = 4;

}  // namespace boltz_mm
