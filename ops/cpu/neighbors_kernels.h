// The search for nearest neighbours, compiled once for each instruction set: include it inside of the variant's
// namespace, after BOLTZ_MM_VECTOR_BYTES was defined and <immintrin.h> included.

#include "rounding.h"

// A key holds the bits of a distance, which ascend with it, and below them the index, which breaks ties.
inline float distance_of(uint64_t key) {
  const uint32_t bits = static_cast<uint32_t>(key >> 32);
  float distance;
  __builtin_memcpy(&distance, &bits, sizeof(distance));
  return distance;
}

inline uint64_t key_of(float squared, int32_t index) {
  const float distance = __builtin_sqrtf(squared);
  uint32_t bits;
  __builtin_memcpy(&bits, &distance, sizeof(bits));
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(index);
}

inline float squared_distance(float x, float y) { return rounded(x * x) + rounded(y * y); }

// Squared distances of some points to (x, y); bit i of the result tells whether that of point i is at most the limit.
#if defined(__x86_64__) && BOLTZ_MM_VECTOR_BYTES == 64
constexpr int kAtOnce = 16;
inline uint32_t look_at(const float* xs, const float* ys, float x, float y, float limit, float* squared) {
  const __m512 dx = _mm512_sub_ps(_mm512_set1_ps(x), _mm512_loadu_ps(xs));
  const __m512 dy = _mm512_sub_ps(_mm512_set1_ps(y), _mm512_loadu_ps(ys));
  const __m512 sum = _mm512_add_ps(rounded(_mm512_mul_ps(dx, dx)), rounded(_mm512_mul_ps(dy, dy)));
  _mm512_storeu_ps(squared, sum);
  return _mm512_cmp_ps_mask(sum, _mm512_set1_ps(limit), _CMP_LE_OQ);
}
#elif defined(__x86_64__) && BOLTZ_MM_VECTOR_BYTES == 32
constexpr int kAtOnce = 8;
inline uint32_t look_at(const float* xs, const float* ys, float x, float y, float limit, float* squared) {
  const __m256 dx = _mm256_sub_ps(_mm256_set1_ps(x), _mm256_loadu_ps(xs));
  const __m256 dy = _mm256_sub_ps(_mm256_set1_ps(y), _mm256_loadu_ps(ys));
  const __m256 sum = _mm256_add_ps(rounded(_mm256_mul_ps(dx, dx)), rounded(_mm256_mul_ps(dy, dy)));
  _mm256_storeu_ps(squared, sum);
  return _mm256_movemask_ps(_mm256_cmp_ps(sum, _mm256_set1_ps(limit), _CMP_LE_OQ));
}
#elif defined(__x86_64__)
constexpr int kAtOnce = 4;
inline uint32_t look_at(const float* xs, const float* ys, float x, float y, float limit, float* squared) {
  const __m128 dx = _mm_sub_ps(_mm_set1_ps(x), _mm_loadu_ps(xs));
  const __m128 dy = _mm_sub_ps(_mm_set1_ps(y), _mm_loadu_ps(ys));
  const __m128 sum = _mm_add_ps(_mm_mul_ps(dx, dx), _mm_mul_ps(dy, dy));
  _mm_storeu_ps(squared, sum);
  return _mm_movemask_ps(_mm_cmple_ps(sum, _mm_set1_ps(limit)));
}
#else
constexpr int kAtOnce = 1;
inline uint32_t look_at(const float* xs, const float* ys, float x, float y, float limit, float* squared) {
  *squared = squared_distance(x - *xs, y - *ys);
  return *squared <= limit;
}
#endif

// The k nearest of the points that one query has seen, in order.
class Nearest {
 public:
  Nearest(const Buckets& buckets, float x, float y, int64_t k, uint64_t* best)
      : buckets_(buckets), x_(x), y_(y), k_(k), best_(best) {
    for (int64_t i = 0; i < k; ++i) best[i] = ~uint64_t{0};
  }

  void see_all() {
    // A block of 3 x 3 buckets, and then the nearest side of it, as long as something there can be as near.
    const int32_t column = buckets_.column(x_), row = buckets_.row(y_);
    int32_t left = column > 0 ? column - 1 : 0, right = column + 1 < buckets_.columns ? column + 1 : column;
    int32_t top = row > 0 ? row - 1 : 0, bottom = row + 1 < buckets_.rows ? row + 1 : row;
    see(row, left, right);
    if (top < row) see(top, left, right);
    if (bottom > row) see(bottom, left, right);
    for (;;) {
      const bool more_left = left > 0, more_right = right + 1 < buckets_.columns;
      const bool more_above = top > 0, more_below = bottom + 1 < buckets_.rows;
      const float to_left = more_left ? x_ - buckets_.largest_x[left - 1] : kFar;
      const float to_right = more_right ? buckets_.smallest_x[right + 1] - x_ : kFar;
      const float to_top = more_above ? y_ - buckets_.largest_y[top - 1] : kFar;
      const float to_bottom = more_below ? buckets_.smallest_y[bottom + 1] - y_ : kFar;
      const float across = to_left < to_right ? to_left : to_right, along = to_top < to_bottom ? to_top : to_bottom;
      const float nearest = across < along ? across : along;
      if (nearest * nearest > limit_) return;
      if (more_left && nearest == to_left) {
        --left;
        for (int32_t at = top; at <= bottom; ++at) see(at, left, left);
      } else if (more_right && nearest == to_right) {
        ++right;
        for (int32_t at = top; at <= bottom; ++at) see(at, right, right);
      } else if (more_above && nearest == to_top) {
        see(--top, left, right);
      } else if (more_below) {
        see(++bottom, left, right);
      } else {
        return;
      }
    }
  }

 private:
  static constexpr float kFar = __builtin_inff();
  const Buckets& buckets_;
  const float x_, y_;
  const int64_t k_;
  uint64_t* const best_;
  float limit_ = __builtin_inff();  // no point of a larger squared distance can be among the k nearest

  // Look at the points of some buckets of a row, which lie side by side.
  void see(int32_t row, int32_t left, int32_t right) {
    const int32_t* starts = buckets_.starts + static_cast<int64_t>(row) * buckets_.columns;
    const int32_t end = starts[right + 1];
    alignas(64) float squared[kAtOnce];
    for (int32_t first = starts[left]; first < end; first += kAtOnce) {
      uint32_t near = look_at(buckets_.x + first, buckets_.y + first, x_, y_, limit_, squared);
      if (end - first < kAtOnce) near &= (1u << (end - first)) - 1u;
      for (; near != 0; near &= near - 1) {
        const int lane = __builtin_ctz(near);
        if (squared[lane] <= limit_) insert(key_of(squared[lane], buckets_.index[first + lane]));
      }
    }
  }

  void insert(uint64_t key) {
    int64_t at = k_ - 1;
    if (key >= best_[at]) return;
    for (; at > 0 && best_[at - 1] > key; --at) best_[at] = best_[at - 1];
    best_[at] = key;
    if (best_[k_ - 1] == ~uint64_t{0}) return;
    // A root that is rounded to the k-th distance belongs to a square below this: the relative error of a root and of
    // a square is at most 2^-24.
    const float farthest = distance_of(best_[k_ - 1]);
    limit_ = farthest * farthest * (1.0f + 0x1p-21f);
  }
};

inline void search(const NeighborSearch& problem, int64_t begin, int64_t end, uint64_t* best) {
  for (int64_t at = begin; at < end; ++at) {
    const Buckets& buckets = problem.buckets[at / problem.queries];
    Nearest(buckets, problem.query[2 * at], problem.query[2 * at + 1], problem.k, best).see_all();
    for (int64_t i = 0; i < problem.k; ++i) {
      const int64_t to = at * problem.k + i;
      const uint32_t index = static_cast<uint32_t>(best[i]);
      if (problem.long_index) {
        static_cast<int64_t*>(problem.index)[to] = index;
      } else {
        static_cast<int32_t*>(problem.index)[to] = static_cast<int32_t>(index);
      }
      if (problem.distance) problem.distance[to] = distance_of(best[i]);
    }
  }
}

const SearchNeighbors search_neighbors = search;
