// A single product, and numbers of a cache, for whoever measures or checks them: by one thread, without a decoder.
#include "fp8.h"
#include "panel_rows.h"

using namespace diptych;

extern "C" {

// `count` is a multiple of 32.
void diptych_narrow_fp8(const float* x, int64_t count, fp8* to) {
    for (int64_t i = 0; i < count; i += 16) store(to + i, _mm512_loadu_ps(x + i));
}

void diptych_widen_fp8(const fp8* x, int64_t count, bf16* to) { widen_fp8(x, count, to); }

int64_t diptych_can_multiply_int8() { return can_multiply_int8(); }

// x: [rows, inputs]  to: [rows, columns]. `int8` needs panels of 4 or 8 bits.
void diptych_multiply(const Product* product, const bf16* x, int64_t rows, int64_t int8, float* to) {
    std::vector<bf16> scratch(scratch_size(product->inputs));
    Int8Room room;
    Int8Rows rounded{};
    if (int8) {
        room.resize(rows, product->inputs);
        for (int64_t row = 0; row < rows; ++row) room.round(x, product->inputs, row);
        rounded = room.rows(product->inputs);
    }
    const Inputs inputs{x, int8 ? &rounded : nullptr};
    for (int64_t panel = 0; panel < product->panel_count(); ++panel)
        for (int64_t first = 0; first < rows; first += kBlockRows)
            multiply_panel(*product, inputs, panel, first, std::min(rows, first + kBlockRows), scratch,
                           [&](int64_t row, const __m512* sums) { store_columns(*product, panel, row, sums, to); });
}
}
