#include "team.h"

#include <immintrin.h>

namespace diptych {

namespace {
constexpr int kAwake = 2000;  // looks before a member sleeps: about 30 microseconds
}

Team::Team(int size) : size_(size) {
    for (int member = 1; member < size; ++member) others_.emplace_back([this, member] { serve(member); });
}

Team::~Team() {
    ended_ = true;
    step_.fetch_add(1, std::memory_order_release);
    step_.notify_all();
    for (auto& other : others_) other.join();
}

void Team::run(const std::function<void(int)>& work) {
    work_ = &work;
    if (size_ > 1) {
        step_.fetch_add(1, std::memory_order_release);
        step_.notify_all();
    }
    work(0);
    if (size_ > 1) meet();
}

void Team::serve(int member) {
    for (uint32_t seen = 0;; ++seen) {
        step_.wait(seen, std::memory_order_acquire);
        if (ended_) return;
        (*work_)(member);
        meet();
    }
}

void Team::meet() {
    const uint32_t meeting = meeting_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        next_.store(0, std::memory_order_relaxed);
        meeting_.store(meeting + 1, std::memory_order_release);
        meeting_.notify_all();
        return;
    }
    for (int look = 0; look < kAwake; ++look) {
        if (meeting_.load(std::memory_order_acquire) != meeting) return;
        _mm_pause();
    }
    meeting_.wait(meeting, std::memory_order_acquire);
}

}  // namespace diptych
