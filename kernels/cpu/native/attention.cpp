#include "attention.h"

#include <algorithm>

#include "fp8.h"

namespace diptych {

namespace {

struct Piece {
    int64_t tokens, group, dim, position;  // of the first token
    int64_t rows() const { return tokens * group; }
};

// `head` counts those of the keys, then those of the values.
const uint8_t* row_at(const Look& look, const Cache& cache, const Segment& segment, int64_t position, int64_t head) {
    const int64_t block = segment.blocks[position / cache.block_size];
    const int64_t place = head * cache.block_size + position % cache.block_size;
    return cache.layer + block * cache.block_stride + place * look.head_dim * cache.width;
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

// A head's positions [from, from + 16), zeros from `to` on: beyond the end a block may hold anything. [16, dim]
const bf16* sixteen(const Look& look, const Cache& cache, const Segment& segment, int64_t head, int64_t from,
                    int64_t to, bf16* spare) {
    const int64_t dim = look.head_dim, here = std::clamp<int64_t>(to - from, 0, 16);
    std::memset(spare + here * dim, 0, (16 - here) * dim * sizeof(bf16));
    if (!here) return spare;
    const uint8_t* rows = row_at(look, cache, segment, from, head);
    if (cache.width == sizeof(fp8)) {
        widen_fp8(rows, here * dim, spare);
        return spare;
    }
    if (here == 16) return (const bf16*)rows;
    std::memcpy(spare, rows, here * dim * sizeof(bf16));
    return spare;
}

// 32 keys as a panel whose columns are keys: [dim / 2, 32, 2].
void rearrange_keys(const bf16* keys, int64_t dim, int64_t half, bf16* panel) {
    for (int64_t at = 0; at < dim; at += 32) {
        __m512i row[16];
        for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(keys + i * dim + at);
        transpose(row);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + (at / 2 + i) * 64 + half * 32, row[i]);
    }
}

// 32 values as panels whose inputs are keys: [dim / 32, 16, 32, 2].
void rearrange_values(const bf16* values, int64_t dim, int64_t half, bf16* panel) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t at = 0; at < dim; at += 32) {
        for (int64_t i = 0; i < 16; i += 2) {
            const __m512i even = _mm512_loadu_si512(values + i * dim + at);
            const __m512i odd = _mm512_loadu_si512(values + (i + 1) * dim + at);
            bf16* pair = panel + at * 32 + (half * 8 + i / 2) * 64;
            _mm512_storeu_si512(pair, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(pair + 32, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

// The keys and values of one split, 32 at a time. Many tiles of queries share what is rearranged once;
// for a single tile it is done on the way, in a place that stays in the first cache.
class Split {
  public:
    Split(const Look& look, const Cache& cache, const Segment& segment, int64_t kv_head, int64_t from, int64_t to,
          bool shared, Desk& desk)
        : look_(look), cache_(cache), segment_(segment), kv_head_(kv_head), from_(from), to_(to), shared_(shared),
          desk_(desk) {
        for (int64_t key = 0; shared && key < count(); key += 32) {
            arrange_keys(key, desk.keys.data() + key * look.head_dim);
            arrange_values(key, desk.values.data() + key * look.head_dim);
        }
    }

    bool shared() const { return shared_; }
    int64_t from() const { return from_; }
    int64_t count() const { return (to_ - from_ + 31) / 32 * 32; }

    const bf16* keys(int64_t key) const {
        if (shared_) return desk_.keys.data() + key * look_.head_dim;
        arrange_keys(key, desk_.keys.data());
        return desk_.keys.data();
    }

    const bf16* values(int64_t key) const {
        if (shared_) return desk_.values.data() + key * look_.head_dim;
        arrange_values(key, desk_.values.data());
        return desk_.values.data();
    }

  private:
    const bf16* at(int64_t key, int64_t head) const {
        return sixteen(look_, cache_, segment_, head, from_ + key, to_, desk_.spare.data());
    }
    void arrange_keys(int64_t key, bf16* to) const {
        for (int64_t half = 0; half < 2; ++half)
            rearrange_keys(at(key + half * 16, kv_head_), look_.head_dim, half, to);
    }
    void arrange_values(int64_t key, bf16* to) const {
        for (int64_t half = 0; half < 2; ++half)
            rearrange_values(at(key + half * 16, look_.kv_heads + kv_head_), look_.head_dim, half, to);
    }

    const Look& look_;
    const Cache& cache_;
    const Segment& segment_;
    const int64_t kv_head_, from_, to_;
    const bool shared_;
    Desk& desk_;
};

// All heads' keys and values of a block are one piece of memory: read in one go, they come three times
// as fast as head by head. The second cache keeps a split of them.
void read_ahead(const Look& look, const Cache& cache, const Segment& segment, int64_t from, int64_t to) {
    const int64_t size = 2 * look.kv_heads * cache.block_size * look.head_dim * cache.width;
    __m512i read = _mm512_setzero_si512();
    for (int64_t key = from; key < to; key += cache.block_size) {
        const uint8_t* block = cache.layer + segment.blocks[key / cache.block_size] * cache.block_stride;
        for (int64_t i = 0; i < size; i += 64) read = _mm512_or_si512(read, _mm512_loadu_si512(block + i));
    }
    asm volatile("" ::"v"(read));  // the loads are the purpose
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

// What rows [row, row + rows) of a KV head find in the first `count` keys of a split. The head's rows
// begin at `base`.
void visit(const Piece& piece, const Look& look, int64_t base, int64_t row, int rows, const Split& split,
           int64_t count, Desk& desk) {
    const bf16* query = desk.rows.data() + (base + row) * piece.dim;
    Sums sums;
    for (int64_t key = 0; key < count; key += 32) {
        multiply(query, piece.dim, rows, split.keys(key), piece.dim, sums);
        for (int i = 0; i < rows; ++i) {
            _mm512_storeu_ps(desk.scores.data() + i * kSplit + key, sums.of[i][0]);
            _mm512_storeu_ps(desk.scores.data() + i * kSplit + key + 16, sums.of[i][1]);
        }
    }
    float keep[kMostRows], add[kMostRows];
    for (int i = 0; i < rows; ++i) {
        const int64_t end = piece.position + (row + i) / piece.group + 1 - split.from();
        const int64_t from = look.window ? std::max<int64_t>(0, end - look.window) : 0;
        const Part part = share(desk.scores.data() + i * kSplit, desk.shares.data() + i * kSplit, count, from, end, look);
        float& maximum = desk.maximum[base + row + i];
        const float highest = std::max(maximum, part.maximum);
        keep[i] = exponential(maximum - highest);
        add[i] = exponential(part.maximum - highest);
        float& total = desk.total[base + row + i];
        total = total * keep[i] + part.total * add[i];
        maximum = highest;
    }
    const int64_t at_once = split.shared() ? count : 32;
    for (int64_t key = 0; key < count; key += at_once) {
        const bf16 *values = split.values(key), *shares = desk.shares.data() + key;
        for (int64_t at = 0; at < piece.dim; at += 32)
            multiply_on(shares, kSplit, rows, values + at * 32, 32 * piece.dim, at_once, desk.found[at / 32], key > 0);
    }
    for (int64_t at = 0; at < piece.dim; at += 32)
        for (int i = 0; i < rows; ++i)
            merge(desk.output.data() + (base + row + i) * piece.dim, desk.found[at / 32], i, at, keep[i], add[i]);
}

void make_room(Desk& desk, int64_t rows, int64_t dim) {
    desk.rows.resize(rows * dim);
    desk.spare.resize(16 * dim);
    desk.keys.resize(kSplit * dim);
    desk.values.resize(kSplit * dim);
    desk.shares.resize(kMostRows * kSplit);
    desk.scores.resize(kMostRows * kSplit);
    desk.found.resize(dim / 32);
    desk.output.assign(rows * dim, 0.0f);
    desk.total.assign(rows, 0.0f);
    desk.maximum.assign(rows, -FLT_MAX);
}

}  // namespace

void attend(const bf16* query, bf16* output, const Look& look, const Cache& cache, const Segment& segment,
            const Span& tokens, const Span& kv_heads, Desk& desk) {
    const int64_t group = look.heads / look.kv_heads, dim = look.head_dim;
    const Piece piece{tokens.last - tokens.first, group, dim, segment.start + tokens.first};
    const int64_t rows = piece.rows();
    make_room(desk, rows * (kv_heads.last - kv_heads.first), dim);
    // Rows of one KV head lie together: (KV head, token, head in group).
    const int64_t step = look.heads * dim;
    const int64_t from = (segment.first_row + tokens.first) * step + kv_heads.first * group * dim;
    const auto each = [&](auto work) {
        for (int64_t head = 0; head < kv_heads.last - kv_heads.first; ++head)
            for (int64_t token = 0; token < piece.tokens; ++token)
                work(from + token * step + head * group * dim, head * rows + token * group);
    };
    each([&](int64_t at, int64_t row) {
        std::memcpy(desk.rows.data() + row * dim, query + at, group * dim * sizeof(bf16));
    });
    const int64_t end = piece.position + piece.tokens;
    const int64_t first_key = look.window ? std::max<int64_t>(0, piece.position + 1 - look.window) : 0;
    for (int64_t at = first_key / kSplit * kSplit; at < end; at += kSplit) {
        const int64_t to = std::min(end, at + kSplit);
        if (kv_heads.last - kv_heads.first == look.kv_heads) read_ahead(look, cache, segment, at, to);
        for (int64_t head = kv_heads.first; head < kv_heads.last; ++head) {
            const Split split(look, cache, segment, head, at, to, rows > kMostRows, desk);
            const int64_t base = (head - kv_heads.first) * rows;
            // Rows before this split's first key see nothing of it.
            for (int64_t row = std::max<int64_t>(0, at - piece.position) * group; row < rows; row += kMostRows) {
                const int here = int(std::min<int64_t>(kMostRows, rows - row));
                const int64_t needed = piece.position + (row + here - 1) / group + 1 - at;
                const int64_t count = std::min(split.count(), (needed + 31) / 32 * 32);
                visit(piece, look, base, row, here, split, count, desk);
            }
        }
    }
    each([&](int64_t at, int64_t row) {
        for (int64_t i = 0; i < group * dim; i += 16) {
            const __m512 sum = _mm512_loadu_ps(desk.output.data() + row * dim + i);
            store_bf16(output + at + i, _mm512_div_ps(sum, _mm512_set1_ps(desk.total[row + i / dim])));
        }
    });
}

}  // namespace diptych
