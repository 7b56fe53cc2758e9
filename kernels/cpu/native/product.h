// Products of bf16 activations with weights in panels. Knows formats, not layers.
//
// A panel is 32 columns of the result: for each pair of inputs (k, k + 1) the 32 columns' pairs of
// bf16, side by side, as the processor's bf16 dot product wants them. Stored in 4 or 8 bits, a panel
// is widened on its way: the numbers that are multiplied are the bf16 numbers all the same, so the
// format changes no bit of the result. Each number of the result is one sum over k, in order,
// whatever the other rows are: a row's bits don't depend on its batch.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace diptych {

enum Format : int64_t { kBf16 = 0, kQ8 = 1, kQ4 = 2 };

constexpr int64_t kColumns = 32;  // of a panel
constexpr int64_t kGroup = 32;    // inputs that share a scale
constexpr int kMostRows = 12;     // of a tile: 24 sums, the weights and an input fill the registers

struct Product {
    const uint8_t* panels;
    const float* bias;  // one a column, or null
    int64_t inputs;
    int64_t columns;
    int64_t format;

    int64_t panel_count() const { return (columns + kColumns - 1) / kColumns; }
};

int64_t panel_bytes(int64_t format, int64_t inputs);

// `panel` of the weights, widened into `to` [inputs / 2, 32, 2], or as it lies if it is bf16.
const bf16* widened(const Product& product, int64_t panel, bf16* to);

// sums[row][half], of rows [0, rows) of `x`, rows <= kMostRows.
struct Sums {
    __m512 of[kMostRows][2];
};
void multiply(const bf16* x, int64_t stride, int rows, const bf16* panel, int64_t inputs, Sums& sums);

// The same, of a panel whose groups of 32 inputs lie `step` numbers apart; on from what the sums are, or from 0.
void multiply_on(const bf16* x, int64_t stride, int rows, const bf16* panel, int64_t step, int64_t inputs, Sums& sums,
                 bool go_on);

// As `widened` and `multiply`, without writing the panel down.
void multiply_stored(const bf16* x, int64_t stride, int rows, const Product& product, int64_t panel, Sums& sums);

}  // namespace diptych
