// Threads of a call's own, where XLA lends none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace aq {

class OwnThreads {
 public:
  explicit OwnThreads(int64_t count) : count_(std::max<int64_t>(1, count)) {}
  ~OwnThreads() {
    for (std::thread& thread : threads_) thread.join();
  }
  OwnThreads(const OwnThreads&) = delete;

  int64_t num_threads() const { return count_; }

  template <class Work>
  void Schedule(Work&& work) {
    try {
      threads_.emplace_back(std::forward<Work>(work));
    } catch (const std::system_error&) {  // there may be no more threads: the caller does the work
    }
  }

 private:
  int64_t count_;
  std::vector<std::thread> threads_;
};

// As for XLA's threads in ffi.h; but starting one takes 0.1 ms, so that each gets 0.4 ms of work, or more.
inline int64_t threads_for_elements(const OwnThreads& pool, int64_t count) {
  return std::clamp<int64_t>(count >> 20, 1, pool.num_threads());
}

}  // namespace aq
