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

}  // namespace aq
