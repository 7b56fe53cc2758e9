// One panel of a product for many rows, in either way of multiplying. Knows no team.
#pragma once

#include <algorithm>
#include <vector>

#include "int8.h"
#include "product.h"

namespace diptych {

constexpr int64_t kBlockRows = 252;  // of a large product: their inputs stay in the second cache

// What is multiplied: rows of bf16 [rows, inputs], or the same rows in 8 bits.
struct Inputs {
    const bf16* numbers;
    const Int8Rows* rounded;  // null: bf16

    int most_rows() const { return rounded ? kMostInt8Rows : kMostRows; }
};

// A panel's weights while rows are multiplied with them: as they lie, or written down where several tiles read them.
class PanelOf {
  public:
    PanelOf(const Product& product, const Inputs& x, int64_t panel, bool write, bf16* scratch)
        : product_(product), x_(x), panel_(panel) {
        if (write && x.rounded) {
            widen_to_bytes(product, panel, (uint8_t*)scratch);
            wide_ = scratch;
        } else if (write) {
            wide_ = widened(product, panel, scratch);
        }
    }

    void multiply_rows(int64_t first, int rows, Sums& sums) const {
        if (x_.rounded) {
            const Int8Rows some = x_.rounded->from(first);
            if (wide_) multiply_int8(some, rows, product_, (const uint8_t*)wide_, sums);
            else multiply_int8_stored(some, rows, product_, panel_, sums);
            return;
        }
        const bf16* some = x_.numbers + first * product_.inputs;
        if (wide_) multiply(some, product_.inputs, rows, wide_, product_.inputs, sums);
        else multiply_stored(some, product_.inputs, rows, product_, panel_, sums);
    }

  private:
    const Product& product_;
    const Inputs& x_;
    const int64_t panel_;
    const bf16* wide_ = nullptr;
};

inline void add_bias(const Product& product, int64_t panel, int rows, Sums& sums) {
    for (int half = 0; half < 2; ++half) {
        const __m512 bias = _mm512_loadu_ps(product.bias + panel * kColumns + half * 16);
        for (int row = 0; row < rows; ++row) sums.of[row][half] = _mm512_add_ps(sums.of[row][half], bias);
    }
}

// How many bf16 numbers of scratch a panel of so many inputs takes, with what aligning it costs.
constexpr int64_t scratch_size(int64_t inputs) { return inputs * kColumns + 32; }

// store(row, sums of the panel's 32 columns) for rows [first, last). scratch: [scratch_size(inputs)]
template <class Store>
void multiply_panel(const Product& product, const Inputs& x, int64_t panel, int64_t first, int64_t last,
                    std::vector<bf16>& scratch, Store store) {
    const int64_t most = x.most_rows(), tiles = (last - first + most - 1) / most;
    // A load that crosses a cache line costs two.
    auto* aligned = (bf16*)((uintptr_t(scratch.data()) + 63) / 64 * 64);
    const PanelOf weights(product, x, panel, tiles > 1, aligned);
    Sums sums;
    for (int64_t tile = 0, row = first; tile < tiles; ++tile) {
        const int here = int((last - row + tiles - tile - 1) / (tiles - tile));
        weights.multiply_rows(row, here, sums);
        if (product.bias) add_bias(product, panel, here, sums);
        for (int i = 0; i < here; ++i, ++row) store(row, sums.of[i]);
    }
}

// The 32 columns' numbers of a row, as many as there are, into `to` [rows, columns].
inline void store_columns(const Product& product, int64_t panel, int64_t row, const __m512* sums, float* to) {
    for (int half = 0; half < 2; ++half) {
        const int64_t column = panel * kColumns + half * 16;
        _mm512_mask_storeu_ps(to + row * product.columns + column, first_lanes(product.columns - column), sums[half]);
    }
}

}  // namespace diptych
