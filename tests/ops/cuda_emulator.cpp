// Runs the CUDA kernels of ops/cuda on the CPU: the same device functions, with the same plan, for every block, team
// and thread.  The threads of a team are contexts that take turns; they wait for each other where the kernels do, so
// that a missing barrier or an exchange that not all threads reach shows here too.  Loaded by test_cuda_emulated.py.

#include "../../ops/cuda/grid_backward.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace {

using namespace boltz_mm::cuda;

constexpr size_t kStackBytes = 64 << 10;

struct Barrier {
  int members, waiting = 0;
  unsigned round = 0;
};

// All threads of a team.
class Warps {
 public:
  explicit Warps(const Plan& plan)
      : lanes(plan.lanes), size(plan.team()), stacks_(size * kStackBytes), contexts_(size), exchange_(size),
        finished_(size) {
    team_.members = size;
    groups_.assign(plan.slices, Barrier{lanes});
    warps_.assign((size + kWarp - 1) / kWarp, Barrier{size < kWarp ? size : kWarp});
  }

  const int lanes, size;

  void run(const std::function<void(int)>& thread) {
    thread_ = &thread;
    for (current_ = 0; current_ < size; ++current_) {
      finished_[current_] = false;
      ucontext_t& context = contexts_[current_];
      getcontext(&context);
      context.uc_stack.ss_sp = stacks_.data() + current_ * kStackBytes;
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = &scheduler_;
      const uintptr_t self = reinterpret_cast<uintptr_t>(this);
      makecontext(&context, reinterpret_cast<void (*)()>(&Warps::enter), 2, static_cast<unsigned>(self >> 32),
                  static_cast<unsigned>(self));
    }
    for (int left = size; left > 0;) {
      const unsigned long before = progress_;
      for (current_ = 0; current_ < size; ++current_) {
        if (finished_[current_]) continue;
        swapcontext(&scheduler_, &contexts_[current_]);
        if (finished_[current_]) --left;
      }
      if (before == progress_) {
        std::fprintf(stderr, "the threads of a team wait for each other forever\n");
        std::abort();
      }
    }
  }

  void wait_team() { wait(team_); }
  void wait_group(int rank) { wait(groups_[rank / lanes]); }
  void wait_warp(int rank) { wait(warps_[rank / kWarp]); }
  double& exchange(int rank) { return exchange_[rank]; }

 private:
  std::vector<char> stacks_;
  std::vector<ucontext_t> contexts_;
  std::vector<double> exchange_;
  std::vector<bool> finished_;
  std::vector<Barrier> groups_, warps_;
  Barrier team_{};
  ucontext_t scheduler_;
  const std::function<void(int)>* thread_ = nullptr;
  int current_ = 0;
  unsigned long progress_ = 0;

  static void enter(unsigned high, unsigned low) {
    Warps* self = reinterpret_cast<Warps*>(static_cast<uintptr_t>(high) << 32 | low);
    const int rank = self->current_;
    (*self->thread_)(rank);
    self->finished_[rank] = true;
    ++self->progress_;
  }

  void wait(Barrier& barrier) {
    const unsigned round = barrier.round;
    ++progress_;
    if (++barrier.waiting == barrier.members) {
      barrier.waiting = 0;
      ++barrier.round;
      return;
    }
    while (barrier.round == round) swapcontext(&contexts_[current_], &scheduler_);
  }
};

class EmulatedTeam {
 public:
  int rank, size, lane, lanes, slice, slices;

  EmulatedTeam(Warps& warps, int rank, const Plan& plan)
      : rank(rank), size(plan.team()), lane(rank % plan.lanes), lanes(plan.lanes), slice(rank / plan.lanes),
        slices(plan.slices), warps_(warps) {}

  void sync_group() { warps_.wait_group(rank); }
  void sync_team() { warps_.wait_team(); }

  uint32_t ballot(bool yes) {
    warps_.exchange(rank) = yes;
    warps_.wait_group(rank);
    uint32_t bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= static_cast<uint32_t>(warps_.exchange(slice * lanes + i)) << i;
    warps_.wait_group(rank);
    return bits;
  }

  template <typename C>
  C group_xor(C x, int offset) {
    warps_.exchange(rank) = x;
    warps_.wait_group(rank);
    const C result = static_cast<C>(warps_.exchange(rank ^ offset));
    warps_.wait_group(rank);
    return result;
  }

  template <typename C>
  C warp_xor(C x, int offset) {
    warps_.exchange(rank) = x;
    warps_.wait_warp(rank);
    const C result = static_cast<C>(warps_.exchange(rank ^ offset));
    warps_.wait_warp(rank);
    return result;
  }

 private:
  Warps& warps_;
};

struct EmulatePass {
  const GridProblem& problem;
  const Plan& plan;

  template <typename Pass>
  int operator()(Pass) const {
    using Sample = typename Pass::Sample;
    using C = typename Pass::Compute;
    std::vector<Sample> samples(plan.team());
    std::vector<C> scratch(plan.team());
    Warps warps(plan);
    for (Index block = 0; block < plan.blocks; ++block) {
      for (int number = 0; number < plan.rows; ++number) {
        const Row row = locate_row(problem, plan.rows, block, number);
        if (row.query >= problem.queries) continue;
        warps.run([&](int rank) {
          EmulatedTeam team(warps, rank, plan);
          Pass::run(team, problem, row, samples.data() + team.slice * team.lanes, scratch.data());
        });
      }
    }
    return 0;
  }
};

template <typename T, typename C>
int emulate(const GridProblem& problem, const Plan& plan, bool backward) {
  constexpr int V = 16 / sizeof(T);
  const EmulatePass pass{problem, plan};
  if (backward) {
    return plan.vector == V ? choose_backward<V, T, C>(problem, pass) : choose_backward<1, T, C>(problem, pass);
  }
  return plan.vector == V ? choose_forward<V, T, C>(problem, pass) : choose_forward<1, T, C>(problem, pass);
}

}  // namespace

namespace {

int run_pass(const GridProblem& problem, ValueType type, const Plan& plan, bool backward) {
  switch (type) {
    case ValueType::float64:
      return emulate<double, double>(problem, plan, backward);
    case ValueType::float32:
      return emulate<float, float>(problem, plan, backward);
    case ValueType::bfloat16:
      return emulate<BFloat16, float>(problem, plan, backward);
    case ValueType::float16:
      return emulate<Float16, float>(problem, plan, backward);
  }
  return 1;
}

}  // namespace

// In place of the launches.
namespace boltz_mm::cuda {

const char* launch_forward(const GridProblem& problem, ValueType type, void*) {
  run_pass(problem, type, make_plan(problem, type, false), false);
  return nullptr;
}

const char* launch_backward(const GridProblem& problem, ValueType type, void*) {
  run_pass(problem, type, make_plan(problem, type, true), true);
  return nullptr;
}

}  // namespace boltz_mm::cuda

// Runs a pass; `plan_out` receives vector, lanes, slices, rows and blocks.  With slices > 0 the plan is overruled.
extern "C" int emulate_grid(const GridProblem* problem, int type, int backward, int slices, Index* plan_out) {
  const ValueType value_type = static_cast<ValueType>(type);
  Plan plan = make_plan(*problem, value_type, backward != 0);
  if (slices > 0) {
    plan.slices = slices;
    plan.rows = plan.team() > kWarp ? 1 : power_of_two_above(problem->queries, kThreads / plan.team());
    plan.blocks = problem->batch * ((problem->queries + plan.rows - 1) / plan.rows) * problem->heads;
  }
  const Index numbers[] = {plan.vector, plan.lanes, plan.slices, plan.rows, plan.blocks};
  std::memcpy(plan_out, numbers, sizeof(numbers));
  return run_pass(*problem, value_type, plan, backward != 0);
}
