// From rows of weights, as files have them, to panels.
#include <cstring>

#include "product.h"

using namespace diptych;

namespace {

// What rows are made of; the last three are llama.cpp's blocks of 32.
enum Source : int64_t { kRowBf16 = 0, kRowQ8_0 = 1, kRowQ4_1 = 2, kRowQ4_0 = 3 };

uint16_t half_of(float number) { return uint16_t(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(number), 0), 0)); }
float float_of(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

uint16_t half_at(const uint8_t* bytes) {
    uint16_t half;
    std::memcpy(&half, bytes, sizeof half);
    return half;
}

// Where, of the 32 numbers of a pair of inputs in 16 columns, column `column` has input `odd`.
int lane(int column, int odd) { return 2 * (column % 8) + odd; }

void pack_bf16(const uint8_t* const* rows, int64_t inputs, uint8_t* to) {
    auto* out = (bf16*)to;
    for (int column = 0; column < kColumns; ++column) {
        const auto* row = (const bf16*)rows[column];
        for (int64_t k = 0; k < inputs; ++k) out[(k / 2 * kColumns + column) * 2 + k % 2] = row ? row[k] : 0;
    }
}

void pack_q8(const uint8_t* const* rows, int64_t group, uint8_t* to) {
    auto* scales = (uint16_t*)to;
    for (int column = 0; column < kColumns; ++column) {
        const uint8_t* block = rows[column] ? rows[column] + group * 34 : nullptr;
        scales[column] = block ? half_at(block) : 0;
        for (int k = 0; k < kGroup; ++k) {
            const int sixteen = (k / 2 * 2 + column / 16) * 2 + column % 16 / 8;
            to[64 + sixteen * 16 + lane(column, k % 2)] = block ? block[2 + k] : 0;
        }
    }
}

void pack_q4(const uint8_t* const* rows, int64_t source, int64_t group, uint8_t* to) {
    auto* scales = (uint16_t*)to;
    std::memset(to, 0, 128 + 16 * kGroup);
    const int64_t size = source == kRowQ4_1 ? 20 : 18;
    for (int column = 0; column < kColumns; ++column) {
        if (!rows[column]) continue;
        const uint8_t* block = rows[column] + group * size;
        scales[column] = half_at(block);
        // Q4_0 is (quant - 8) * scale, and eight times a number of fp16 is one, if not too large.
        scales[kColumns + column] =
            source == kRowQ4_1 ? half_at(block + 2) : half_of(-8.0f * float_of(scales[column]));
        const uint8_t* quants = block + size - 16;
        for (int k = 0; k < kGroup; ++k) {
            const uint8_t quant = k < 16 ? quants[k] & 15 : quants[k - 16] >> 4;
            const int sixteen = k / 2 * 2 + column / 16;
            to[128 + sixteen * 16 + lane(column, k % 2)] |= quant << (column % 16 < 8 ? 0 : 4);
        }
    }
}

}  // namespace

extern "C" {

int64_t diptych_panel_bytes(int64_t format, int64_t inputs) { return panel_bytes(format, inputs); }

// rows: [panels * 32] where each column's weights lie, null for none.
void diptych_pack(int64_t source, const uint8_t* const* rows, int64_t panels, int64_t inputs, uint8_t* to) {
    const int64_t format = source == kRowBf16 ? kBf16 : source == kRowQ8_0 ? kQ8 : kQ4;
    const int64_t groups = inputs / kGroup, group_bytes = panel_bytes(format, kGroup);
    for (int64_t panel = 0; panel < panels; ++panel, rows += kColumns) {
        if (source == kRowBf16) {
            pack_bf16(rows, inputs, to);
            to += panel_bytes(format, inputs);
            continue;
        }
        for (int64_t group = 0; group < groups; ++group, to += group_bytes) {
            if (source == kRowQ8_0) pack_q8(rows, group, to);
            else pack_q4(rows, source, group, to);
        }
    }
}
}
