// What a thread of each clustering kernel does; see neighbors_device.h for `Atomics`.

#pragma once

#include "clustering.h"
#include "rounding.h"

namespace boltz_mm::cuda {

BOLTZ_MM_ROUNDED int64_t cells_of(const ClusterProblem& problem) { return problem.grid.height * problem.grid.width; }

BOLTZ_MM_ROUNDED void value_cell(const ClusterProblem& problem, int64_t cell) {
  problem.value[cell] = curve_value(problem.grid, cell % problem.grid.width, cell / problem.grid.width);
}

// The cell of a coordinate; what is outside of the canvas, or not a number, counts to the nearest cell.
BOLTZ_MM_ROUNDED float inside(float at, int64_t length) {
  return at > 0 ? fminf(at, static_cast<float>(length - 1)) : 0.0f;
}

BOLTZ_MM_ROUNDED void value_token(const ClusterProblem& problem, int64_t at) {
  const float x = inside(problem.pos[2 * at], problem.width), y = inside(problem.pos[2 * at + 1], problem.height);
  problem.value[at] = curve_value(problem.grid, static_cast<int64_t>(x), static_cast<int64_t>(y));
}

struct Centre {
  float x, y;
};

BOLTZ_MM_ROUNDED float centre_along(int64_t cell, float size) {
  return subtract(add(multiply(static_cast<float>(cell), size), divide(size, 2)), 0.5f);
}

BOLTZ_MM_ROUNDED Centre centre_of(const ClusterProblem& problem, int64_t place) {
  const int64_t cell = problem.along[place];
  return {centre_along(cell % problem.grid.width, problem.cell_width),
          centre_along(cell / problem.grid.width, problem.cell_height)};
}

// The centre that an end of the curve would go on to.
BOLTZ_MM_ROUNDED Centre beyond(const Centre& end, const Centre& inner) {
  return {subtract(end.x, subtract(inner.x, end.x)), subtract(end.y, subtract(inner.y, end.y))};
}

BOLTZ_MM_ROUNDED void lay_anchor(const ClusterProblem& problem, int64_t place) {
  const Centre own = centre_of(problem, place);
  const bool first = place == 0, last = place == cells_of(problem) - 1;
  const Centre before = centre_of(problem, first ? place + 1 : place - 1);
  const Centre behind = centre_of(problem, last ? place - 1 : place + 1);
  const Centre previous = first ? beyond(own, before) : before, following = last ? beyond(own, behind) : behind;
  problem.anchors[problem.along[place]] = {static_cast<float>(place), previous.x, previous.y, following.x, following.y};
}

BOLTZ_MM_ROUNDED int64_t cell_along(float at, float size, int64_t count) {
  const int64_t cell = static_cast<int64_t>(divide(at, size));
  return cell < count ? cell : count - 1;
}

// How much nearer a token is to the previous cell than to the next one.  Returns the bits of the ratio, which ascend
// with it.
BOLTZ_MM_ROUNDED uint32_t compare_token(const ClusterProblem& problem, int64_t at) {
  const float x = problem.pos[2 * at], y = problem.pos[2 * at + 1];
  const float kept_x = x >= 0 && x < problem.width ? x : inside(x, problem.width);
  const float kept_y = y >= 0 && y < problem.height ? y : inside(y, problem.height);
  const int64_t column = cell_along(kept_x, problem.cell_width, problem.grid.width);
  const int64_t row = cell_along(kept_y, problem.cell_height, problem.grid.height);
  const Anchor anchor = problem.anchors[row * problem.grid.width + column];
  const float before = squared_length(subtract(kept_x, anchor.previous_x), subtract(kept_y, anchor.previous_y));
  const float behind = squared_length(subtract(kept_x, anchor.following_x), subtract(kept_y, anchor.following_y));
  problem.place[at] = anchor.place;
  problem.ratio[at] = divide(before, add(behind, 1e-5f));
  return bits_of(problem.ratio[at]);
}

BOLTZ_MM_ROUNDED uint32_t* largest_of(const ClusterProblem& problem, int64_t at) {
  return problem.largest + (problem.per_image ? at / problem.tokens : 0);
}

BOLTZ_MM_ROUNDED void combine_token(const ClusterProblem& problem, int64_t at) {
  const float scale = add(float_of(*largest_of(problem, at)), 1.0f);
  problem.key[at] = add(multiply(problem.place[at], scale), problem.ratio[at]);
}

// Sorts the positions of a cluster's tokens, and takes their mean.
BOLTZ_MM_ROUNDED void finish_cluster(const ClusterProblem& problem, int64_t number) {
  const int64_t image = number / problem.clusters, first = number % problem.clusters * problem.cluster_size;
  const int64_t rest = problem.tokens - first, members = rest < problem.cluster_size ? rest : problem.cluster_size;
  const int64_t offset = image * problem.tokens;
  float sum_x = 0, sum_y = 0;
  for (int64_t i = offset + first; i < offset + first + members; ++i) {
    const int64_t from = offset + problem.order[i];
    const float x = problem.pos[2 * from], y = problem.pos[2 * from + 1];
    problem.ordered[2 * i] = x;
    problem.ordered[2 * i + 1] = y;
    sum_x = add(sum_x, x);
    sum_y = add(sum_y, y);
  }
  problem.means[2 * number] = divide(sum_x, static_cast<float>(members));
  problem.means[2 * number + 1] = divide(sum_y, static_cast<float>(members));
}

}  // namespace boltz_mm::cuda
