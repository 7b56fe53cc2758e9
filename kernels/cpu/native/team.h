// Threads that work on one step together. Knows no maths.
//
// One team per engine. Its members sleep between steps. Within a step they meet often, so they wait
// for each other awake, but only for some microseconds: where threads outnumber cores, whoever is
// waited for needs the core.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace diptych {

class Team {
  public:
    explicit Team(int size);
    ~Team();
    Team(const Team&) = delete;

    int size() const { return size_; }

    // `work(member)` by everyone, the caller as member 0. Returns when all are done.
    void run(const std::function<void(int)>& work);

    // Within `run`, by all members: each piece is done by one of them, then they meet.
    template <class Work>
    void each(int64_t pieces, Work work) {
        if (size_ == 1) {
            for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
            return;
        }
        for (int64_t piece; (piece = next_.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(piece);
        meet();
    }

  private:
    void meet();
    void serve(int member);

    const int size_;
    const std::function<void(int)>* work_ = nullptr;
    bool ended_ = false;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> meeting_{0};
    alignas(64) std::atomic<uint32_t> step_{0};
    std::vector<std::thread> others_;
};

}  // namespace diptych
