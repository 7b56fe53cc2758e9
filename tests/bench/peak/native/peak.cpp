// Products that touch no memory: what an engine's products could reach if reading cost nothing.
#include <immintrin.h>

#include <chrono>
#include <cstdint>

namespace {

constexpr int kChains = 16;  // more than latency times issue width, fewer than the registers

double seconds_since(std::chrono::steady_clock::time_point begun) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

}  // namespace

// Seconds for `steps` x 16 products of 16 x 2 bf16 each: 64 operations a product.
extern "C" double peak_bf16(int64_t steps) {
    __m512 sums[kChains];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    __m512bh left = (__m512bh)_mm512_set1_epi16(0x3f80), right = left;
    const auto begun = std::chrono::steady_clock::now();
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
        for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_dpbf16_ps(sums[chain], left, right);
        asm volatile("" : "+v"(left));  // or the compiler would do it once
    }
    const double seconds = seconds_since(begun);
    for (auto& sum : sums) asm volatile("" ::"v"(sum));
    return seconds;
}
