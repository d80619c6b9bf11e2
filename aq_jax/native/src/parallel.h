// Items of work, shared between the caller and the threads of a pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace aq {

// Run f(item) for every item. The caller works too, and waits only for items that others have begun: a thread of the
// pool that comes late finds none left and touches nothing.
template <class Pool, class Function>
void parallel(Pool& pool, int64_t items, const Function& f) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  const int64_t others = std::min<int64_t>(items, pool.num_threads()) - 1;
  if (others <= 0) {
    for (int64_t i = 0; i < items; ++i) f(i);
    return;
  }
  auto state = std::make_shared<State>();
  auto work = [state, items, &f] {
    for (int64_t i; (i = state->next.fetch_add(1)) < items;) {
      f(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < others; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (state->done.load(std::memory_order_acquire) < items) std::this_thread::yield();
}

}  // namespace aq
