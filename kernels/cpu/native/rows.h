// What happens to one row at a time: normalisation and rotary positions.
#pragma once

#include "fp8.h"

namespace diptych {

// `size` is a multiple of 16. Each in place or into another place, in fp32.
inline float inverse_root_mean_square(const float* x, int64_t size, float epsilon) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 part = _mm512_loadu_ps(x + i);
        sum = _mm512_fmadd_ps(part, part, sum);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(size) + epsilon);
}

inline __m512 normed(const float* x, const float* weight, __m512 scale) {
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x), scale), _mm512_loadu_ps(weight));
}

inline void rms_norm(const float* x, const float* weight, int64_t size, float epsilon, bf16* to) {
    const __m512 scale = _mm512_set1_ps(inverse_root_mean_square(x, size, epsilon));
    for (int64_t i = 0; i < size; i += 16) store_bf16(to + i, normed(x + i, weight + i, scale));
}

inline void rms_norm(const float* x, const float* weight, int64_t size, float epsilon, float* to) {
    const __m512 scale = _mm512_set1_ps(inverse_root_mean_square(x, size, epsilon));
    for (int64_t i = 0; i < size; i += 16) _mm512_storeu_ps(to + i, normed(x + i, weight + i, scale));
}

// A head, turned by its position and rounded. table: cosines [dim], then sines [dim].
template <class Number>
void turn(const float* head, const float* table, int64_t dim, Number* to) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const __m512 low = _mm512_loadu_ps(head + i), high = _mm512_loadu_ps(head + half + i);
        const __m512 cosine = _mm512_loadu_ps(table + i), sine = _mm512_loadu_ps(table + dim + i);
        store(to + i, _mm512_fmsub_ps(low, cosine, _mm512_mul_ps(high, sine)));
        store(to + half + i, _mm512_fmadd_ps(high, cosine, _mm512_mul_ps(low, sine)));
    }
}

}  // namespace diptych
