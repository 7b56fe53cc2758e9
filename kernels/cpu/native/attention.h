// What queries find in a paged KV cache. Knows block tables, not sequences.
//
// As in kernels/reference/attention.py: keys are visited in splits of 256 positions from position 0
// on, each split's softmax is whole in itself, and the parts are merged in order. So a query's
// result has the same bits whatever rows came with it. Scores and sums are fp32; probabilities are
// rounded to bf16 before they meet the values. What lies in fp8 is widened to bf16, which changes no number.
#pragma once

#include <cstdint>
#include <vector>

#include "product.h"

namespace diptych {

constexpr int64_t kSplit = 256;
constexpr int64_t kTokens = 64;  // of a piece of a chunk: they share a split's keys, rearranged once

struct Look {
    int64_t heads, kv_heads, head_dim;
    float scale, soft_cap;  // 0: no cap
    int64_t window;         // keys each query sees, its own included; 0: all
};

// One layer of the cache: [blocks, 2, kv_heads, block_size, head_dim], a block every `block_stride` bytes, in numbers
// of `width` bytes: 2 are bf16, 1 is fp8.
struct Cache {
    uint8_t* layer;
    int64_t block_stride, block_size, width;
};

// Some tokens of one sequence, at positions start, start + 1, ...
struct Segment {
    const int32_t* blocks;
    int64_t first_row, start, count;
};

// Scratch of one member of a team.
struct Desk {
    std::vector<bf16> rows, spare, keys, values, shares, panel;
    std::vector<float> scores, output, total, maximum;
    std::vector<Sums> found;
};

struct Span {
    int64_t first, last;
};

// What some tokens of the segment find, the heads of some KV heads. query, output: [rows, heads, head_dim].
void attend(const bf16* query, bf16* output, const Look& look, const Cache& cache, const Segment& segment,
            const Span& tokens, const Span& kv_heads, Desk& desk);

}  // namespace diptych
