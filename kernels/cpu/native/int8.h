// Products of activations in 8 bits with weights stored in 4 or 8 bits. Knows formats, not layers.
//
// A row's activations are rounded to whole numbers in groups of 32 inputs, a scale each, as the
// weights are: `weight = scale * quant + minimum` (Q4_1's and Q8_0's own form). Products within a group
// are whole numbers whose sum is exact; the groups' sums are added in fp32, in order. So a row's
// bits depend on nothing but the row, and no weight is rounded.
#pragma once

#include <cstdint>
#include <vector>

#include "product.h"

namespace diptych {

constexpr int kMostInt8Rows = 6;  // of a tile: 12 sums of a group, 12 of all before it, the weights and an input

// Rows of activations. Of each group of 32: 32 numbers, then what a group's sum needs of it.
struct Int8Rows {
    const int8_t* numbers;    // [rows, inputs]
    const float* scales;      // [rows, groups]
    const float* totals;      // [rows, groups] scale times the sum of its numbers: what a minimum multiplies
    const int32_t* offsets;   // [rows, groups] -128 times the sum of its numbers
    int64_t inputs;

    Int8Rows from(int64_t row) const {
        const int64_t groups = row * (inputs / kGroup);
        return {numbers + row * inputs, scales + groups, totals + groups, offsets + groups, inputs};
    }
};

// Room for such rows.
class Int8Room {
  public:
    void resize(int64_t rows, int64_t most_inputs) {
        numbers_.resize(rows * most_inputs);
        scales_.resize(rows * (most_inputs / kGroup));
        totals_.resize(scales_.size());
        offsets_.resize(scales_.size());
    }

    // `row` of x [rows, inputs], rounded into its place. What is not finite makes its group's scale NaN.
    void round(const bf16* x, int64_t inputs, int64_t row);

    Int8Rows rows(int64_t inputs) const {
        return {numbers_.data(), scales_.data(), totals_.data(), offsets_.data(), inputs};
    }

  private:
    std::vector<int8_t> numbers_;
    std::vector<float> scales_, totals_;
    std::vector<int32_t> offsets_;
};

// Whether this processor has the instruction, and `product` is stored in what it multiplies.
bool can_multiply_int8();
inline bool is_int8(const Product& product) { return product.format != kBf16; }

// `panel` of the weights in bytes, as `multiply_int8` reads them. Into `to` [inputs / 32, 1280].
void widen_to_bytes(const Product& product, int64_t panel, uint8_t* to);

// sums[row][half] of the first `rows` of `x`, rows <= kMostInt8Rows: of a widened panel, or of one as it lies.
void multiply_int8(const Int8Rows& x, int rows, const Product& product, const uint8_t* widened, Sums& sums);
void multiply_int8_stored(const Int8Rows& x, int rows, const Product& product, int64_t panel, Sums& sums);

}  // namespace diptych
