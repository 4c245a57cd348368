// Clusters along a space-filling curve on the CPU: keys, a stable sort and the means of the clusters in one call; see
// boltz_mm/ops/clustering.py for the rule, ../registration.cpp for the schema.

#include "../include/curves.h"
#include "../include/stable_call.h"
#include "rounding.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

namespace boltz_mm {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

struct Entry {
  uint64_t key;
  int64_t token;
};

struct Point {
  float x, y;
};

// Centres of the cells before and behind an anchor cell, and its own place.
struct Anchor {
  float place;
  Point previous, following;
};

// Stable ascending sort, least significant digit first; returns the array that holds the result.
Entry* sort_entries(Entry* entries, Entry* other, int64_t count) {
  uint64_t differing = 0;
  for (int64_t i = 1; i < count; ++i) differing |= entries[i].key ^ entries[0].key;
  std::array<int64_t, kDigits> places;
  for (int shift = 0; shift < 64; shift += kDigitBits) {
    if ((differing >> shift) % kDigits == 0) continue;
    places.fill(0);
    for (int64_t i = 0; i < count; ++i) ++places[(entries[i].key >> shift) % kDigits];
    int64_t before = 0;
    for (int64_t& place : places) before += std::exchange(place, before);
    for (int64_t i = 0; i < count; ++i) other[places[(entries[i].key >> shift) % kDigits]++] = entries[i];
    std::swap(entries, other);
  }
  return entries;
}

uint64_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

float squared_distance(Point a, Point b) {
  const float x = a.x - b.x, y = a.y - b.y;
  return rounded(x * x) + rounded(y * y);
}

class Clustering {
 public:
  Clustering(int64_t tokens, int64_t cluster_size, int64_t height, int64_t width, Curve curve, bool anchors)
      : tokens_(tokens), cluster_size_(cluster_size),
        grid_(anchors ? anchor_grid(tokens, cluster_size, height, width, curve) : AnchorGrid{0, 0}) {
    if (grid_.rows == 0) {
      canvas_ = curve_grid(curve, height, width);
      return;
    }
    cell_ = {static_cast<float>(static_cast<double>(width) / grid_.columns),
             static_cast<float>(static_cast<double>(height) / grid_.rows)};
    lay_anchors(curve);
  }

  bool has_anchors() const { return grid_.rows > 0; }

  // The places of the tokens of an image along the curve.
  void rank(const Point* pos, Entry* entries) const {
    for (int64_t i = 0; i < tokens_; ++i) {
      entries[i] = {static_cast<uint64_t>(curve_value(canvas_, static_cast<int64_t>(pos[i].x),
                                                      static_cast<int64_t>(pos[i].y))),
                    i};
    }
  }

  // How much nearer each token is to the previous cell than to the next one; returns the largest ratio.
  float compare(const Point* pos, Entry* entries) const {
    float largest = 0;
    for (int64_t i = 0; i < tokens_; ++i) {
      const int64_t column = std::min(static_cast<int64_t>(pos[i].x / cell_.x), grid_.columns - 1);
      const int64_t row = std::min(static_cast<int64_t>(pos[i].y / cell_.y), grid_.rows - 1);
      const int64_t cell = row * grid_.columns + column;
      const Anchor& anchor = anchors_[cell];
      const float ratio =
          squared_distance(pos[i], anchor.previous) / (squared_distance(pos[i], anchor.following) + 1e-5f);
      largest = std::max(largest, ratio);
      entries[i] = {bits_of(ratio), cell};
    }
    return largest;
  }

  // From ratios to keys, whose bits ascend with them.
  void combine(float largest, Entry* entries) const {
    const float scale = largest + 1.0f;
    for (int64_t i = 0; i < tokens_; ++i) {
      const uint32_t bits = static_cast<uint32_t>(entries[i].key);
      float ratio;
      std::memcpy(&ratio, &bits, sizeof(ratio));
      entries[i] = {bits_of(rounded(anchors_[entries[i].token].place * scale) + ratio), i};
    }
  }

  void finish(const Point* pos, const Entry* sorted, int64_t* order, Point* ordered, Point* means) const {
    for (int64_t i = 0; i < tokens_; ++i) {
      order[i] = sorted[i].token;
      ordered[i] = pos[sorted[i].token];
    }
    for (int64_t first = 0; first < tokens_; first += cluster_size_) {
      const int64_t end = std::min(first + cluster_size_, tokens_);
      Point sum{0, 0};
      for (int64_t i = first; i < end; ++i) {
        sum.x += ordered[i].x;
        sum.y += ordered[i].y;
      }
      const float members = static_cast<float>(end - first);
      *means++ = {sum.x / members, sum.y / members};
    }
  }

 private:
  int64_t tokens_, cluster_size_;
  AnchorGrid grid_;
  CurveGrid canvas_{};
  Point cell_{};
  std::vector<Anchor> anchors_;  // by cell

  Point centre(int64_t cell) const {
    const float x = static_cast<float>(cell % grid_.columns), y = static_cast<float>(cell / grid_.columns);
    return {rounded(x * cell_.x) + cell_.x / 2 - 0.5f, rounded(y * cell_.y) + cell_.y / 2 - 0.5f};
  }

  void lay_anchors(Curve curve) {
    const int64_t cells = grid_.rows * grid_.columns;
    const CurveGrid along = curve_grid(curve, grid_.rows, grid_.columns);
    std::vector<Entry> entries(2 * cells);
    for (int64_t cell = 0; cell < cells; ++cell) {
      const int64_t value = curve_value(along, cell % grid_.columns, cell / grid_.columns);
      entries[cell] = {static_cast<uint64_t>(value), cell};
    }
    const Entry* sorted = sort_entries(entries.data(), entries.data() + cells, cells);
    anchors_.resize(cells);
    for (int64_t place = 0; place < cells; ++place) {
      Anchor& anchor = anchors_[sorted[place].token];
      anchor.place = static_cast<float>(place);
      anchor.previous = place > 0 ? centre(sorted[place - 1].token) : beyond(sorted[0].token, sorted[1].token);
      anchor.following = place + 1 < cells ? centre(sorted[place + 1].token)
                                           : beyond(sorted[cells - 1].token, sorted[cells - 2].token);
    }
  }

  // The centre that an end of the curve would go on to.
  Point beyond(int64_t end, int64_t inner) const {
    const Point at = centre(end), before = centre(inner);
    return {at.x - (before.x - at.x), at.y - (before.y - at.y)};
  }
};

std::tuple<Tensor, Tensor, Tensor> space_filling_order(Tensor pos, int64_t cluster_size, int64_t height, int64_t width,
                                                       int64_t curve, bool anchors, bool per_image) {
  STD_TORCH_CHECK(pos.scalar_type() == ScalarType::Float && pos.dim() == 3 && pos.size(2) == 2 && pos.is_cpu(),
                  "pos must be float32 of shape [B, N, 2] on the CPU");
  STD_TORCH_CHECK(cluster_size >= 1, "cluster_size must be at least 1, got ", cluster_size);
  STD_TORCH_CHECK(height >= 1 && width >= 1, "canvas must be a (height, width) of at least 1, got (", height, ", ",
                  width, ")");
  STD_TORCH_CHECK(curve >= 0 && curve <= 2, "curve must be 0, 1 or 2, got ", curve);
  pos = torch::stable::contiguous(pos);
  const int64_t batch = pos.size(0), tokens = pos.size(1), count = (tokens + cluster_size - 1) / cluster_size;
  Tensor order = torch::stable::new_empty(pos, {batch, tokens}, ScalarType::Long);
  Tensor ordered = torch::stable::new_empty(pos, {batch, tokens, 2});
  Tensor means = torch::stable::new_empty(pos, {batch, count, 2});
  if (batch * tokens == 0) return {order, ordered, means};

  const float* numbers = pos.const_data_ptr<float>();
  const float right = static_cast<float>(width), bottom = static_cast<float>(height);
  bool inside = true;
  for (int64_t i = 0; i < batch * tokens * 2; i += 2) {
    inside &= numbers[i] >= 0 && numbers[i] < right && numbers[i + 1] >= 0 && numbers[i + 1] < bottom;
  }
  STD_TORCH_CHECK(inside, "pos must lie on the canvas, 0 <= x < ", width, " and 0 <= y < ", height);

  const Clustering clustering(tokens, cluster_size, height, width, static_cast<Curve>(curve), anchors);
  const Scratch memory(pos, batch * 2 * tokens * static_cast<int64_t>(sizeof(Entry)));
  Entry* entries = reinterpret_cast<Entry*>(memory.data());
  const Point* points = static_cast<const Point*>(pos.const_data_ptr());
  int64_t* order_to = order.mutable_data_ptr<int64_t>();
  Point *ordered_to = static_cast<Point*>(ordered.mutable_data_ptr()),
        *means_to = static_cast<Point*>(means.mutable_data_ptr());
  std::vector<float> largest(batch);
  run_tasks(pos, batch, 1, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t image = begin; image < end; ++image) {
      Entry* own = entries + image * 2 * tokens;
      if (clustering.has_anchors()) {
        largest[image] = clustering.compare(points + image * tokens, own);
      } else {
        clustering.rank(points + image * tokens, own);
      }
    }
  });
  if (!per_image) std::fill(largest.begin(), largest.end(), *std::max_element(largest.begin(), largest.end()));
  run_tasks(pos, batch, 1, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t image = begin; image < end; ++image) {
      Entry* own = entries + image * 2 * tokens;
      if (clustering.has_anchors()) clustering.combine(largest[image], own);
      const Entry* sorted = sort_entries(own, own + tokens, tokens);
      clustering.finish(points + image * tokens, sorted, order_to + image * tokens, ordered_to + image * tokens,
                        means_to + image * count);
    }
  });
  return {order, ordered, means};
}

}  // namespace
}  // namespace boltz_mm

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CPU, library) {
  library.impl("space_filling_order", TORCH_BOX(&boltz_mm::space_filling_order));
}
