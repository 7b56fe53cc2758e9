// fp8 in a KV cache: e4m3 without scales, as in kernels/reference/fp8.py. Knows no tensor.
//
// It has no infinity: what is larger than 448 becomes 448, and what isn't finite NaN.
#pragma once

#include "numbers.h"

namespace diptych {

using fp8 = uint8_t;

// Rounds to the nearest, ties to even.
inline __m128i narrow_fp8(__m512 wide) {
    const __m512i bits = _mm512_castps_si512(wide);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __mmask16 finite = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    const __m512i size = _mm512_min_epi32(magnitude, _mm512_set1_epi32(0x43e00000));  // 448
    // 20 bits of the mantissa go, and 120 of the exponent's bias.
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(size, 20), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff - (120 << 23)));
    const __m512i normal = _mm512_srli_epi32(_mm512_add_epi32(size, half), 20);
    // Below 2^-6 numbers are 2^-9 apart, as fp32 is at 2^14: the sum rounds them.
    const __m512i sum = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(size), _mm512_set1_ps(16384.0f)));
    const __m512i small = _mm512_sub_epi32(sum, _mm512_set1_epi32(0x46800000));
    const __mmask16 is_small = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(0x3c800000));
    const __m512i number = _mm512_mask_mov_epi32(normal, is_small, small);
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
    return _mm512_cvtepi32_epi8(_mm512_or_si512(sign, _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7f), finite, number)));
}

// 32 of them in bf16, which has them all.
inline __m512i widen_fp8(__m256i narrow) {
    const __m512i bits = _mm512_cvtepu8_epi16(narrow);
    const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi16(0x7f));
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
    // 0 to 7 times 2^-9
    const __m512i small = _mm512_broadcast_i32x4(
        _mm_set_epi16(0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0));
    const __mmask32 is_small = _mm512_cmplt_epi16_mask(size, _mm512_set1_epi16(8));
    const __mmask32 is_none = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f));
    __m512i number = _mm512_mask_permutexvar_epi16(normal, is_small, size, small);
    number = _mm512_mask_mov_epi16(number, is_none, _mm512_set1_epi16(0x7fc0));
    return _mm512_or_si512(number, _mm512_slli_epi16(_mm512_sub_epi16(bits, size), 8));
}

// `count` is a multiple of 32.
inline void widen_fp8(const fp8* from, int64_t count, bf16* to) {
    for (int64_t i = 0; i < count; i += 32)
        _mm512_storeu_si512(to + i, widen_fp8(_mm256_loadu_si256((const __m256i*)(from + i))));
}

inline void store(fp8* to, __m512 wide) { _mm_storeu_si128((__m128i*)to, narrow_fp8(wide)); }
inline void store(bf16* to, __m512 wide) { store_bf16(to, wide); }

}  // namespace diptych
