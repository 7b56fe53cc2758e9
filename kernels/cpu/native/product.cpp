#include "product.h"

namespace diptych {

namespace {

constexpr int64_t kQ8Group = 64 + 32 * kGroup;       // scales in fp16, then quants
constexpr int64_t kQ4Group = 64 + 64 + 16 * kGroup;  // scales, minima, then quants

struct Pair {
    __m512i half[2];  // 16 columns each
};

// Lane by lane, the scale of a column twice: a column's two inputs lie side by side.
struct Spread {
    __m512 low, high;
};

inline Spread spread(const uint8_t* sixteen) {
    const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)sixteen));
    const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return {_mm512_permutexvar_ps(low, wide),
            _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), wide)};
}

inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Readers: `group` at every 32nd input, then `pair` for each two of them.

struct Bf16Reader {
    const bf16 *at = nullptr, *next;
    int64_t step;  // from group to group
    Bf16Reader(const uint8_t* panel, int64_t step = kGroup * kColumns) : next((const bf16*)panel), step(step) {}
    void group() {
        at = next;
        next += step;
    }
    Pair pair() {
        Pair pair{_mm512_loadu_si512(at), _mm512_loadu_si512(at + 32)};
        at += 64;
        return pair;
    }
};

struct Q8Reader {
    const uint8_t* at;
    Spread scale[2];
    Q8Reader(const uint8_t* panel) : at(panel) {}
    void group() {
        scale[0] = spread(at);
        scale[1] = spread(at + 32);
        at += 64;
    }
    static __m512 number(const uint8_t* sixteen) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)sixteen)));
    }
    Pair pair() {
        Pair pair;
        for (int half = 0; half < 2; ++half, at += 32) {
            pair.half[half] = rounded(_mm512_mul_ps(number(at), scale[half].low),
                                      _mm512_mul_ps(number(at + 16), scale[half].high));
        }
        return pair;
    }
};

struct Q4Reader {
    const uint8_t* at;
    Spread scale[2], least[2];
    const __m512 numbers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    Q4Reader(const uint8_t* panel) : at(panel) {}
    void group() {
        scale[0] = spread(at);
        scale[1] = spread(at + 32);
        least[0] = spread(at + 64);
        least[1] = spread(at + 96);
        at += 128;
    }
    Pair pair() {
        Pair pair;
        for (int half = 0; half < 2; ++half, at += 16) {
            // A permutation looks at four bits of each lane: no need to mask the others.
            const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
            const __m512 low = _mm512_permutexvar_ps(both, numbers);
            const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), numbers);
            // scale * quant is exact, so the sum is rounded once, as where it is computed in two steps.
            pair.half[half] = rounded(_mm512_fmadd_ps(low, scale[half].low, least[half].low),
                                      _mm512_fmadd_ps(high, scale[half].high, least[half].high));
        }
        return pair;
    }
};

template <int Rows, class Reader>
void tile(const bf16* x, int64_t stride, Reader reader, int64_t inputs, Sums& sums, bool go_on) {
    __m512 low[Rows], high[Rows];
    for (int row = 0; row < Rows; ++row) {
        low[row] = go_on ? sums.of[row][0] : _mm512_setzero_ps();
        high[row] = go_on ? sums.of[row][1] : _mm512_setzero_ps();
    }
    for (int64_t start = 0; start < inputs; start += kGroup) {
        reader.group();
        for (int64_t k = start; k < start + kGroup; k += 2) {
            const Pair weights = reader.pair();
#pragma GCC unroll 12
            for (int row = 0; row < Rows; ++row) {
                uint32_t two;
                std::memcpy(&two, x + row * stride + k, sizeof two);
                const __m512bh input = (__m512bh)_mm512_set1_epi32(int(two));
                low[row] = _mm512_dpbf16_ps(low[row], input, (__m512bh)weights.half[0]);
                high[row] = _mm512_dpbf16_ps(high[row], input, (__m512bh)weights.half[1]);
            }
        }
    }
    for (int row = 0; row < Rows; ++row) {
        sums.of[row][0] = low[row];
        sums.of[row][1] = high[row];
    }
}

template <class Reader>
void tile_of(const bf16* x, int64_t stride, int rows, const Reader& reader, int64_t inputs, Sums& sums,
             bool go_on = false) {
    switch (rows) {
        case 1: return tile<1>(x, stride, reader, inputs, sums, go_on);
        case 2: return tile<2>(x, stride, reader, inputs, sums, go_on);
        case 3: return tile<3>(x, stride, reader, inputs, sums, go_on);
        case 4: return tile<4>(x, stride, reader, inputs, sums, go_on);
        case 5: return tile<5>(x, stride, reader, inputs, sums, go_on);
        case 6: return tile<6>(x, stride, reader, inputs, sums, go_on);
        case 7: return tile<7>(x, stride, reader, inputs, sums, go_on);
        case 8: return tile<8>(x, stride, reader, inputs, sums, go_on);
        case 9: return tile<9>(x, stride, reader, inputs, sums, go_on);
        case 10: return tile<10>(x, stride, reader, inputs, sums, go_on);
        case 11: return tile<11>(x, stride, reader, inputs, sums, go_on);
        default: return tile<12>(x, stride, reader, inputs, sums, go_on);
    }
}

template <class Reader>
void write_down(const uint8_t* panel, int64_t inputs, bf16* to) {
    Reader reader(panel);
    for (int64_t start = 0; start < inputs; start += kGroup) {
        reader.group();
        for (int64_t k = 0; k < kGroup; k += 2, to += 64) {
            const Pair pair = reader.pair();
            _mm512_storeu_si512(to, pair.half[0]);
            _mm512_storeu_si512(to + 32, pair.half[1]);
        }
    }
}

}  // namespace

int64_t panel_bytes(int64_t format, int64_t inputs) {
    const int64_t group = format == kBf16 ? kGroup * kColumns * 2 : format == kQ8 ? kQ8Group : kQ4Group;
    return inputs / kGroup * group;
}

const bf16* widened(const Product& product, int64_t panel, bf16* to) {
    const uint8_t* stored = product.panels + panel * panel_bytes(product.format, product.inputs);
    if (product.format == kBf16) return (const bf16*)stored;
    if (product.format == kQ8) write_down<Q8Reader>(stored, product.inputs, to);
    else write_down<Q4Reader>(stored, product.inputs, to);
    return to;
}

void multiply(const bf16* x, int64_t stride, int rows, const bf16* panel, int64_t inputs, Sums& sums) {
    tile_of(x, stride, rows, Bf16Reader((const uint8_t*)panel), inputs, sums);
}

void multiply_on(const bf16* x, int64_t stride, int rows, const bf16* panel, int64_t step, int64_t inputs, Sums& sums,
                 bool go_on) {
    tile_of(x, stride, rows, Bf16Reader((const uint8_t*)panel, step), inputs, sums, go_on);
}

void multiply_stored(const bf16* x, int64_t stride, int rows, const Product& product, int64_t panel, Sums& sums) {
    const uint8_t* stored = product.panels + panel * panel_bytes(product.format, product.inputs);
    switch (product.format) {
        case kBf16: return tile_of(x, stride, rows, Bf16Reader(stored), product.inputs, sums);
        case kQ8: return tile_of(x, stride, rows, Q8Reader(stored), product.inputs, sums);
        default: return tile_of(x, stride, rows, Q4Reader(stored), product.inputs, sums);
    }
}

}  // namespace diptych
