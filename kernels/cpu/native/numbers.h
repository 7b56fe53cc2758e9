// Sixteen numbers at a time: bf16, fp16 and the exponential. Knows no tensor.
#pragma once

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace diptych {

using bf16 = uint16_t;

inline float widen(bf16 number) {
    uint32_t bits = uint32_t(number) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// Rounds to the nearest, ties to even.
inline __m256i narrow(__m512 wide) { return (__m256i)_mm512_cvtneps_pbh(wide); }

inline __m512 widen(__m256i narrow) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline void store_bf16(bf16* to, __m512 wide) { _mm256_storeu_si256((__m256i*)to, narrow(wide)); }

inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1);
}

// e to the x, for x <= 88; below -87 it is 0, of NaN it is NaN. Relative error about 2e-7 (Cephes' polynomial).
inline __m512 exponential(__m512 x) {
    const __m512 least = _mm512_set1_ps(-87.0f);
    const __mmask16 alive = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
    const __m512 safe = _mm512_max_ps(least, x);
    const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(safe, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), safe);
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3981999507e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3334519073e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1665795894e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666665459e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.0000001201e-1f));
    sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_mov_ps(alive, _mm512_scalef_ps(sum, whole));
}

inline float exponential(float x) { return _mm512_cvtss_f32(exponential(_mm512_set1_ps(x))); }

// Through e^2x, kept where that is finite.
inline __m512 hyperbolic_tangent(__m512 x) {
    const __m512 inside = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(30.0f)), _mm512_set1_ps(-30.0f));
    const __m512 squared = exponential(_mm512_add_ps(inside, inside));
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(_mm512_sub_ps(squared, one), _mm512_add_ps(squared, one));
}

}  // namespace diptych
