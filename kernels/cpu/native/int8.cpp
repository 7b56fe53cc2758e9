#include "int8.h"

namespace diptych {

namespace {

constexpr int64_t kBytesGroup = 2 * 4 * kColumns + kColumns * kGroup;  // scales and minima in fp32, then quants
constexpr float kLeastScaled = 1e-30f;  // its inverse is finite; what is smaller counts as 0

// Four inputs of 16 columns in each half: byte 4 * column + input.
struct Quad {
    __m512i half[2];
};

// Per 32-bit lane: sum += four unsigned bytes times four signed ones.
inline void add_products(__m512i& sum, __m512i weights, __m512i inputs) {
#ifdef __AVX512VNNI__
    // Not the intrinsic: gcc 12 copies its sums from register to register and runs out of them.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
#endif
}

inline __m512 halves(const uint8_t* sixteen) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)sixteen)); }

// For each half, which words of two registers are its columns' first and second pairs of inputs.
// A register's words are [pair, half, column] with `columns` of them; the second register begins at word 32.
template <class At>
inline __m512i in_order(At at) {
    alignas(64) uint16_t words[32];
    for (int column = 0; column < 16; ++column)
        for (int pair = 0; pair < 2; ++pair) words[2 * column + pair] = uint16_t(at(column, pair));
    return _mm512_load_si512(words);
}

// Readers: `group` at every 32nd input, then `quad` for each four of them.

struct Q4Bytes {
    static constexpr bool kMinima = true;
    const uint8_t* at;
    __m512 scale[2], minimum[2];
    __m512i order[2];
    const __m512i four_bits = _mm512_set1_epi8(15);

    Q4Bytes(const uint8_t* panel) : at(panel) {
        for (int half = 0; half < 2; ++half)
            order[half] = in_order([&](int column, int pair) {
                return (column < 8 ? 0 : 32) + pair * 16 + half * 8 + column % 8;
            });
    }
    void group() {
        for (int half = 0; half < 2; ++half) {
            scale[half] = halves(at + 32 * half);
            minimum[half] = halves(at + 64 + 32 * half);
        }
        at += 128;
    }
    Quad quad() {
        const __m512i both = _mm512_loadu_si512(at);
        at += 64;
        const __m512i low = _mm512_and_si512(both, four_bits);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), four_bits);
        return {_mm512_permutex2var_epi16(low, order[0], high), _mm512_permutex2var_epi16(low, order[1], high)};
    }
};

// 128 is added to each quant, and taken from the sum by the rows' offsets.
struct Q8Bytes {
    static constexpr bool kMinima = false;
    const uint8_t* at;
    __m512 scale[2], minimum[2];
    __m512i order[2];
    const __m512i sign = _mm512_set1_epi8(-128);

    Q8Bytes(const uint8_t* panel) : at(panel) {
        for (int half = 0; half < 2; ++half)
            order[half] = in_order([&](int column, int pair) { return pair * 32 + half * 16 + column; });
    }
    void group() {
        scale[0] = halves(at);
        scale[1] = halves(at + 32);
        minimum[0] = minimum[1] = _mm512_setzero_ps();
        at += 64;
    }
    Quad quad() {
        const __m512i first = _mm512_xor_si512(_mm512_loadu_si512(at), sign);
        const __m512i second = _mm512_xor_si512(_mm512_loadu_si512(at + 64), sign);
        at += 128;
        return {_mm512_permutex2var_epi16(first, order[0], second), _mm512_permutex2var_epi16(first, order[1], second)};
    }
};

template <bool Minima>
struct WideBytes {
    static constexpr bool kMinima = Minima;
    const uint8_t* at;
    __m512 scale[2], minimum[2];

    WideBytes(const uint8_t* panel) : at(panel) {}
    void group() {
        const auto* numbers = (const float*)at;
        for (int half = 0; half < 2; ++half) {
            scale[half] = _mm512_loadu_ps(numbers + 16 * half);
            minimum[half] = _mm512_loadu_ps(numbers + 32 + 16 * half);
        }
        at += 4 * 64;
    }
    Quad quad() {
        const Quad quad{_mm512_loadu_si512(at), _mm512_loadu_si512(at + 64)};
        at += 128;
        return quad;
    }
};

template <class Reader>
void write_bytes(Reader reader, int64_t inputs, uint8_t* to) {
    for (int64_t group = 0; group < inputs / kGroup; ++group) {
        reader.group();
        auto* numbers = (float*)to;
        for (int half = 0; half < 2; ++half) {
            _mm512_storeu_ps(numbers + 16 * half, reader.scale[half]);
            _mm512_storeu_ps(numbers + 32 + 16 * half, reader.minimum[half]);
        }
        to += 4 * 64;
        for (int quad = 0; quad < kGroup / 4; ++quad, to += 128) {
            const Quad bytes = reader.quad();
            _mm512_storeu_si512(to, bytes.half[0]);
            _mm512_storeu_si512(to + 64, bytes.half[1]);
        }
    }
}

template <int Rows, class Reader>
void tile(const Int8Rows& x, Reader reader, Sums& sums) {
    const int64_t groups = x.inputs / kGroup;
    __m512 sum[Rows][2];
    for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
        reader.group();
        __m512i dot[Rows][2];
#pragma GCC unroll 6
        for (int row = 0; row < Rows; ++row)
            dot[row][0] = dot[row][1] =
                Reader::kMinima ? _mm512_setzero_si512() : _mm512_set1_epi32(x.offsets[row * groups + group]);
#pragma GCC unroll 8
        for (int quad = 0; quad < kGroup / 4; ++quad) {
            const Quad weights = reader.quad();
#pragma GCC unroll 6
            for (int row = 0; row < Rows; ++row) {
                int32_t four;
                std::memcpy(&four, x.numbers + row * x.inputs + group * kGroup + quad * 4, sizeof four);
                const __m512i input = _mm512_set1_epi32(four);
                add_products(dot[row][0], weights.half[0], input);
                add_products(dot[row][1], weights.half[1], input);
            }
        }
#pragma GCC unroll 6
        for (int row = 0; row < Rows; ++row) {
            const __m512 scale = _mm512_set1_ps(x.scales[row * groups + group]);
            const __m512 total = _mm512_set1_ps(x.totals[row * groups + group]);
            for (int half = 0; half < 2; ++half) {
                const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[row][half]), reader.scale[half]);
                sum[row][half] = _mm512_fmadd_ps(scaled, scale, sum[row][half]);
                if (Reader::kMinima) sum[row][half] = _mm512_fmadd_ps(reader.minimum[half], total, sum[row][half]);
            }
        }
    }
    for (int row = 0; row < Rows; ++row) {
        sums.of[row][0] = sum[row][0];
        sums.of[row][1] = sum[row][1];
    }
}

template <class Reader>
void tile_of(const Int8Rows& x, int rows, const Reader& reader, Sums& sums) {
    switch (rows) {
        case 1: return tile<1>(x, reader, sums);
        case 2: return tile<2>(x, reader, sums);
        case 3: return tile<3>(x, reader, sums);
        case 4: return tile<4>(x, reader, sums);
        case 5: return tile<5>(x, reader, sums);
        default: return tile<6>(x, reader, sums);
    }
}

const uint8_t* stored_at(const Product& product, int64_t panel) {
    return product.panels + panel * panel_bytes(product.format, product.inputs);
}

// Of 32 numbers of bf16, as its bits: NaN is above infinity, and that above all others.
inline uint16_t highest(__m512i magnitudes) {
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(magnitudes), _mm512_extracti64x4_epi64(magnitudes, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i ones = _mm_set1_epi16(-1);
    return uint16_t(~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, ones)), 0));
}

inline __m128i rounded(const bf16* x, __m512 inverse) {
    const __m512 scaled = _mm512_mul_ps(widen(_mm256_loadu_si256((const __m256i*)x)), inverse);
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(scaled));
}

}  // namespace

bool can_multiply_int8() {
#ifdef __AVX512VNNI__
    return true;  // this was compiled on the machine that runs it, for its processor
#else
    return false;
#endif
}

void Int8Room::round(const bf16* x, int64_t inputs, int64_t row) {
    const int64_t groups = inputs / kGroup;
    x += row * inputs;
    int8_t* numbers = numbers_.data() + row * inputs;
    for (int64_t group = 0; group < groups; ++group, x += kGroup, numbers += kGroup) {
        const __m512i magnitudes = _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi16(0x7fff));
        const float most = widen(highest(magnitudes));
        const bool counts = most >= kLeastScaled && most <= FLT_MAX;
        const __m512 inverse = _mm512_set1_ps(counts ? 127.0f / most : 0.0f);
        const __m128i first = rounded(x, inverse), second = rounded(x + 16, inverse);
        const __m256i all = _mm256_set_m128i(second, first);
        _mm256_storeu_si256((__m256i*)numbers, all);
        // Sums of absolute differences add unsigned bytes.
        const __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(all, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
        const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        const int32_t sum = int32_t(_mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1)) - 128 * int32_t(kGroup);
        const float scale = counts ? most / 127.0f : most <= FLT_MAX ? 0.0f : NAN;
        const int64_t at = row * groups + group;
        scales_[at] = scale;
        totals_[at] = scale * float(sum);
        offsets_[at] = -128 * sum;
    }
}

void widen_to_bytes(const Product& product, int64_t panel, uint8_t* to) {
    const uint8_t* stored = stored_at(product, panel);
    if (product.format == kQ8) write_bytes(Q8Bytes(stored), product.inputs, to);
    else write_bytes(Q4Bytes(stored), product.inputs, to);
}

void multiply_int8(const Int8Rows& x, int rows, const Product& product, const uint8_t* widened, Sums& sums) {
    if (product.format == kQ8) tile_of(x, rows, WideBytes<false>(widened), sums);
    else tile_of(x, rows, WideBytes<true>(widened), sums);
}

void multiply_int8_stored(const Int8Rows& x, int rows, const Product& product, int64_t panel, Sums& sums) {
    const uint8_t* stored = stored_at(product, panel);
    if (product.format == kQ8) tile_of(x, rows, Q8Bytes(stored), sums);
    else tile_of(x, rows, Q4Bytes(stored), sums);
}

}  // namespace diptych
