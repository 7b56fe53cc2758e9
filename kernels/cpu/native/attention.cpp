#include "attention.h"

#include <algorithm>

namespace diptych {

namespace {

struct Piece {
    int64_t tokens, group, dim, position;  // of the first token
    int64_t rows() const { return tokens * group; }
};

const bf16* key_at(const Look& look, const Cache& cache, const Segment& segment, int64_t position, int64_t kv_head) {
    const int64_t block = segment.blocks[position / cache.block_size];
    const int64_t place = kv_head * cache.block_size + position % cache.block_size;
    return cache.layer + block * cache.block_stride + place * look.head_dim;
}

// 16 rows of 16 pairs each → 16 pairs of 16 rows each.
void transpose(__m512i (&row)[16]) {
    __m512i other[16];
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        other[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
        other[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
        other[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
        other[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        row[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        row[i + 4] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0x88);
        row[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
        row[i + 12] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0xdd);
    }
}

// Keys [from, to) as panels whose columns are keys, values as panels whose inputs are keys; up to
// a whole number of 32, with zeros: beyond the end a block may hold anything.
int64_t rearrange(const Look& look, const Cache& cache, const Segment& segment, int64_t kv_head, int64_t from,
                  int64_t to, Desk& desk) {
    const int64_t dim = look.head_dim, value_step = look.kv_heads * cache.block_size * dim;
    const int64_t count = (to - from + 31) / 32 * 32;
    for (int64_t key = 0; key < count; key += 16) {
        const int64_t here = std::clamp<int64_t>(to - from - key, 0, 16);
        const bf16* keys = here ? key_at(look, cache, segment, from + key, kv_head) : nullptr;
        const bf16* values = keys + value_step;
        bf16* panel = desk.keys.data() + key / 32 * 32 * dim + key % 32 * 2;
        for (int64_t at = 0; at < dim; at += 32) {
            __m512i row[16];
            for (int i = 0; i < 16; ++i)
                row[i] = i < here ? _mm512_loadu_si512(keys + i * dim + at) : _mm512_setzero_si512();
            transpose(row);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + (at / 2 + i) * 64, row[i]);
        }
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                             6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (int i = 0; i < 16; i += 2) {
            for (int64_t at = 0; at < dim; at += 32) {
                const __m512i even = i < here ? _mm512_loadu_si512(values + i * dim + at) : _mm512_setzero_si512();
                const __m512i odd =
                    i + 1 < here ? _mm512_loadu_si512(values + (i + 1) * dim + at) : _mm512_setzero_si512();
                bf16* pair = desk.values.data() + at / 32 * 32 * kSplit + (key + i) / 2 * 64;
                _mm512_storeu_si512(pair, _mm512_permutex2var_epi16(even, low, odd));
                _mm512_storeu_si512(pair + 32, _mm512_permutex2var_epi16(even, high, odd));
            }
        }
    }
    return count;
}

struct Part {
    float total, maximum;
};

// One row's scores of `count` keys into shares of them. It sees keys [from, to) of these.
Part share(float* scores, bf16* shares, int64_t count, int64_t from, int64_t to, const Look& look) {
    const __m512 scale = _mm512_set1_ps(look.scale);
    __m512 highest = _mm512_set1_ps(-FLT_MAX);
    for (int64_t key = 0; key < count; key += 16) {
        const __mmask16 seen = first_lanes(to - key) & ~first_lanes(from - key);
        __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + key), scale);
        if (look.soft_cap > 0) {
            const __m512 cap = _mm512_set1_ps(look.soft_cap);
            score = _mm512_mul_ps(hyperbolic_tangent(_mm512_div_ps(score, cap)), cap);
        }
        _mm512_storeu_ps(scores + key, score);
        highest = _mm512_mask_max_ps(highest, seen, highest, score);
    }
    const float maximum = _mm512_reduce_max_ps(highest);
    __m512 total = _mm512_setzero_ps();
    for (int64_t key = 0; key < count; key += 16) {
        const __mmask16 seen = first_lanes(to - key) & ~first_lanes(from - key);
        const __m512 less = _mm512_sub_ps(_mm512_loadu_ps(scores + key), _mm512_set1_ps(maximum));
        const __m512 part = _mm512_maskz_mov_ps(seen, exponential(less));
        total = _mm512_add_ps(total, part);
        store_bf16(shares + key, part);
    }
    return {_mm512_reduce_add_ps(total), maximum};
}

void merge(float* output, const Sums& sums, int row, int64_t at, float keep, float add) {
    for (int half = 0; half < 2; ++half) {
        float* to = output + at + half * 16;
        const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(keep));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(sums.of[row][half], _mm512_set1_ps(add), old));
    }
}

// What rows [row, row + rows) find in one split.
void visit(const bf16* query, const Piece& piece, const Look& look, int64_t row, int rows, int64_t split,
           int64_t count, Desk& desk) {
    Sums sums;
    for (int64_t panel = 0; panel < count / 32; ++panel) {
        multiply(query + row * piece.dim, piece.dim, rows, desk.keys.data() + panel * 32 * piece.dim, piece.dim, sums);
        for (int i = 0; i < rows; ++i) {
            _mm512_storeu_ps(desk.scores.data() + i * kSplit + panel * 32, sums.of[i][0]);
            _mm512_storeu_ps(desk.scores.data() + i * kSplit + panel * 32 + 16, sums.of[i][1]);
        }
    }
    float keep[kMostRows], add[kMostRows];
    for (int i = 0; i < rows; ++i) {
        const int64_t position = piece.position + (row + i) / piece.group;
        const int64_t from = look.window ? std::max<int64_t>(0, position + 1 - look.window - split) : 0;
        const Part part = share(desk.scores.data() + i * kSplit, desk.shares.data() + i * kSplit, count, from,
                                position + 1 - split, look);
        float& maximum = desk.maximum[row + i];
        const float highest = std::max(maximum, part.maximum);
        keep[i] = exponential(maximum - highest);
        add[i] = exponential(part.maximum - highest);
        desk.total[row + i] = desk.total[row + i] * keep[i] + part.total * add[i];
        maximum = highest;
    }
    for (int64_t at = 0; at < piece.dim; at += 32) {
        multiply(desk.shares.data(), kSplit, rows, desk.values.data() + at * kSplit, count, sums);
        for (int i = 0; i < rows; ++i) merge(desk.output.data() + (row + i) * piece.dim, sums, i, at, keep[i], add[i]);
    }
}

void make_room(Desk& desk, int64_t rows, int64_t dim) {
    desk.keys.resize(kSplit * dim);
    desk.values.resize(kSplit * dim);
    desk.shares.resize(kMostRows * kSplit);
    desk.scores.resize(kMostRows * kSplit);
    desk.output.assign(rows * dim, 0.0f);
    desk.total.assign(rows, 0.0f);
    desk.maximum.assign(rows, -FLT_MAX);
}

}  // namespace

void attend(const bf16* query, bf16* output, const Look& look, const Cache& cache, const Segment& segment,
            int64_t first, int64_t last, int64_t kv_head, Desk& desk) {
    const int64_t group = look.heads / look.kv_heads, dim = look.head_dim;
    const Piece piece{last - first, group, dim, segment.start + first};
    make_room(desk, piece.rows(), dim);
    // Rows of one KV head lie together: (token, head in group).
    static thread_local std::vector<bf16> rows;
    rows.resize(piece.rows() * dim);
    const int64_t step = look.heads * dim, from = (segment.first_row + first) * step + kv_head * group * dim;
    for (int64_t token = 0; token < piece.tokens; ++token)
        std::memcpy(rows.data() + token * group * dim, query + from + token * step, group * dim * 2);
    const int64_t end = piece.position + piece.tokens;
    const int64_t first_key = look.window ? std::max<int64_t>(0, piece.position + 1 - look.window) : 0;
    for (int64_t split = first_key / kSplit * kSplit; split < end; split += kSplit) {
        const int64_t count = rearrange(look, cache, segment, kv_head, split, std::min(end, split + kSplit), desk);
        // Rows before this split's first key see nothing of it.
        int64_t row = std::max<int64_t>(0, split - piece.position) * group;
        for (; row < piece.rows(); row += kMostRows) {
            const int here = int(std::min<int64_t>(kMostRows, piece.rows() - row));
            const int64_t needed = piece.position + (row + here - 1) / group + 1 - split;
            visit(rows.data(), piece, look, row, here, split, std::min(count, (needed + 31) / 32 * 32), desk);
        }
    }
    for (int64_t token = 0; token < piece.tokens; ++token) {
        for (int64_t i = 0; i < group * dim; i += 16) {
            const int64_t row = token * group + i / dim;
            const __m512 sum = _mm512_loadu_ps(desk.output.data() + token * group * dim + i);
            store_bf16(output + from + token * step + i, _mm512_div_ps(sum, _mm512_set1_ps(desk.total[row])));
        }
    }
}

}  // namespace diptych
