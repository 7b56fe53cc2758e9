// A decoder's layers, from tokens to logits, in one call. Knows no request and no file.
//
// Between layers a row is fp32; what is multiplied is bf16, or 8 bits where that is asked for. Every phase of a layer is cut into
// pieces that the team's members take as they come, and none of the cuts shows in the result.
#include <algorithm>
#include <memory>

#include "attention.h"
#include "panel_rows.h"
#include "rows.h"
#include "team.h"

using namespace diptych;

extern "C" {

enum Gate : int64_t { kSilu = 0, kGelu = 1, kTanhGelu = 2 };

struct DiptychShape {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, gate;
    int64_t int8;  // whether the layers' activations are multiplied in 8 bits, where the weights are
    float epsilon, attention_scale, attention_soft_cap, logit_soft_cap, embedding_scale;
};

struct DiptychLayer {
    const float *attention_norm, *query_norm, *key_norm, *attention_end_norm, *mlp_norm, *mlp_end_norm;
    Product qkv, output, gate_up, down;
    const float* rope;  // [positions, 2, head_dim]
    int64_t window;
};

struct DiptychEnds {
    const bf16* embedding;  // [vocabulary, hidden]
    const float* norm;
    Product head;
};

struct DiptychStep {
    uint8_t* arena;  // [blocks, layers, 2, kv_heads, block_size, head_dim]
    int64_t block_size, width;  // of a number, in bytes: 2 are bf16, 1 is fp8
    const int64_t* tokens;
    int64_t rows;
    const Segment* segments;
    int64_t segment_count;
    const int64_t* wanted;  // rows whose logits are wanted
    int64_t wanted_count;
    float* logits;     // [wanted, vocabulary]
    int64_t* highest;  // [wanted] the token with the highest logit, the first among equals
    uint8_t* finite;   // [wanted] whether all of the row's are
};
}

namespace {

struct Task {
    const Segment* segment;
    Span tokens, kv_heads;
    int64_t work() const { return (segment->start + tokens.last) * (tokens.last - tokens.first) * (kv_heads.last - kv_heads.first); }
};

class Decoder {
  public:
    Decoder(const DiptychShape& shape, const DiptychLayer* layers, const DiptychEnds& ends, int threads)
        : shape_(shape), layers_(layers, layers + shape.layers), ends_(ends), team_(threads), desks_(threads) {
        int64_t widest = ends.head.inputs;
        for (const auto& layer : layers_)
            widest = std::max({widest, layer.qkv.inputs, layer.output.inputs, layer.down.inputs});
        for (auto& desk : desks_) desk.panel.resize(scratch_size(widest));
    }

    void step(const DiptychStep& step) {
        make_room(step);
        team_.run([&](int member) { forward(step, desks_[member]); });
    }

    // The products alone, on whatever is in the buffers: what a step costs at least.
    void products(const DiptychStep& step) {
        make_room(step);
        team_.run([&](int member) {
            Desk& desk = desks_[member];
            for (const auto& layer : layers_) {
                multiply_into(layer.qkv, normed_.data(), step.rows, qkv_.data(), desk);
                add(layer.output, found_.data(), nullptr, step.rows, desk);
                gate(layer, step.rows, desk);
                add(layer.down, gated_.data(), nullptr, step.rows, desk);
            }
            multiply_into(ends_.head, normed_.data(), step.wanted_count, step.logits, desk);
        });
    }

  private:
    void make_room(const DiptychStep& step) {
        const int64_t rows = std::max(step.rows, step.wanted_count);
        const auto& s = shape_;
        hidden_.resize(rows * s.hidden);
        normed_.resize(rows * s.hidden);
        ended_.resize(rows * s.hidden);
        qkv_.resize(rows * (s.heads + 2 * s.kv_heads) * s.head_dim);
        query_.resize(rows * s.heads * s.head_dim);
        found_.resize(rows * s.heads * s.head_dim);
        gated_.resize(rows * s.intermediate);
        if (s.int8) rounded_.resize(rows, std::max({s.hidden, s.heads * s.head_dim, s.intermediate}));
        tasks_.clear();
        home_.resize(rows);
        for (int64_t i = 0; i < step.segment_count; ++i) {
            const Segment& segment = step.segments[i];
            for (int64_t token = 0; token < segment.count; ++token) home_[segment.first_row + token] = &segment;
            // A single token's heads stay together, unless members would be left without a task.
            const int64_t heads = segment.count == 1 && (team_.size() == 1 || step.rows >= 2 * team_.size()) ? s.kv_heads : 1;
            for (int64_t first = 0; first < segment.count; first += kTokens)
                for (int64_t head = 0; head < s.kv_heads; head += heads)
                    tasks_.push_back({&segment, {first, std::min(segment.count, first + kTokens)}, {head, head + heads}});
        }
        // The longest first: who is left over at the end has little to do.
        std::sort(tasks_.begin(), tasks_.end(), [](const Task& one, const Task& other) {
            return one.work() > other.work();
        });
    }

    void forward(const DiptychStep& step, Desk& desk) {
        const auto& s = shape_;
        team_.each(pieces(step.rows), [&](int64_t piece) { each_row(piece, step.rows, [&](int64_t row) { embed(step, row); }); });
        const int64_t layer_size = 2 * s.kv_heads * step.block_size * s.head_dim * step.width;
        for (int64_t index = 0; index < s.layers; ++index) {
            const DiptychLayer& layer = layers_[index];
            const Cache cache{step.arena + index * layer_size, layer_size * s.layers, step.block_size, step.width};
            norm(layer.attention_norm, step.rows);
            multiply_into(layer.qkv, normed_.data(), step.rows, qkv_.data(), desk);
            team_.each(pieces(step.rows), [&](int64_t piece) {
                each_row(piece, step.rows, [&](int64_t row) {
                    step.width == sizeof(fp8) ? place<fp8>(layer, cache, row) : place<bf16>(layer, cache, row);
                });
            });
            const Look look{s.heads, s.kv_heads, s.head_dim, s.attention_scale, s.attention_soft_cap, layer.window};
            team_.each(int64_t(tasks_.size()), [&](int64_t at) {
                const Task& task = tasks_[at];
                attend(query_.data(), found_.data(), look, cache, *task.segment, task.tokens, task.kv_heads, desk);
            });
            add(layer.output, found_.data(), layer.attention_end_norm, step.rows, desk);
            norm(layer.mlp_norm, step.rows);
            gate(layer, step.rows, desk);
            add(layer.down, gated_.data(), layer.mlp_end_norm, step.rows, desk);
        }
        team_.each(pieces(step.wanted_count), [&](int64_t piece) {
            each_row(piece, step.wanted_count, [&](int64_t row) {
                rms_norm(hidden_.data() + step.wanted[row] * s.hidden, ends_.norm, s.hidden, s.epsilon,
                         normed_.data() + row * s.hidden);
            });
        });
        multiply_into(ends_.head, normed_.data(), step.wanted_count, step.logits, desk);
        team_.each(step.wanted_count, [&](int64_t row) {
            float* logits = step.logits + row * s.vocabulary;
            if (s.logit_soft_cap > 0) squeeze(logits);
            step.highest[row] = look_at(logits, step.finite[row]);
        });
    }

    int64_t look_at(const float* logits, uint8_t& finite) const {
        __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        __m512i at = _mm512_setzero_si512();
        for (int64_t i = 0; i < shape_.vocabulary; i += 16) {
            const __mmask16 here = first_lanes(shape_.vocabulary - i);
            const __m512 part = _mm512_mask_loadu_ps(highest, here, logits + i);
            const __mmask16 higher = _mm512_cmp_ps_mask(part, highest, _CMP_GT_OQ);
            highest = _mm512_mask_mov_ps(highest, higher, part);
            at = _mm512_mask_mov_epi32(at, higher, _mm512_set1_epi32(int(i)));
            // Zero times a number is zero; times an infinity or a NaN, a NaN that stays in the sum.
            sum = _mm512_mask3_fmadd_ps(part, _mm512_setzero_ps(), sum, here);
        }
        finite = _mm512_reduce_add_ps(sum) == 0.0f;
        const __mmask16 equal = _mm512_cmp_ps_mask(highest, _mm512_set1_ps(_mm512_reduce_max_ps(highest)), _CMP_EQ_OQ);
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        return equal ? _mm512_mask_reduce_min_epi32(equal, _mm512_add_epi32(at, lanes)) : 0;
    }

    static int64_t pieces(int64_t rows) { return (rows + 3) / 4; }

    template <class Work>
    static void each_row(int64_t piece, int64_t rows, Work work) {
        for (int64_t row = piece * 4; row < std::min(rows, piece * 4 + 4); ++row) work(row);
    }

    void embed(const DiptychStep& step, int64_t row) {
        const bf16* from = ends_.embedding + step.tokens[row] * shape_.hidden;
        const __m512 scale = _mm512_set1_ps(shape_.embedding_scale);
        for (int64_t i = 0; i < shape_.hidden; i += 16) {
            const __m512 wide = widen(_mm256_loadu_si256((const __m256i*)(from + i)));
            _mm512_storeu_ps(hidden_.data() + row * shape_.hidden + i, _mm512_mul_ps(wide, scale));
        }
    }

    void norm(const float* weight, int64_t rows) {
        team_.each(pieces(rows), [&](int64_t piece) {
            each_row(piece, rows, [&](int64_t row) {
                const int64_t at = row * shape_.hidden;
                rms_norm(hidden_.data() + at, weight, shape_.hidden, shape_.epsilon, normed_.data() + at);
            });
        });
    }

    // A row's queries, keys and values: normed and turned, the latter two into the cache.
    template <class Number>
    void place(const DiptychLayer& layer, const Cache& cache, int64_t row) {
        const auto& s = shape_;
        const Segment& segment = *home_[row];
        const int64_t position = segment.start + row - segment.first_row, dim = s.head_dim;
        const float* table = layer.rope + position * 2 * dim;
        float* head = qkv_.data() + row * (s.heads + 2 * s.kv_heads) * dim;
        for (int64_t i = 0; i < s.heads; ++i, head += dim) {
            if (layer.query_norm) rms_norm(head, layer.query_norm, dim, s.epsilon, head);
            turn(head, table, dim, query_.data() + (row * s.heads + i) * dim);
        }
        const int64_t block = segment.blocks[position / cache.block_size];
        Number* to = (Number*)(cache.layer + block * cache.block_stride) + position % cache.block_size * dim;
        for (int64_t i = 0; i < s.kv_heads; ++i, head += dim, to += cache.block_size * dim) {
            if (layer.key_norm) rms_norm(head, layer.key_norm, dim, s.epsilon, head);
            turn(head, table, dim, to);
        }
        for (int64_t i = 0; i < s.kv_heads; ++i, head += dim, to += cache.block_size * dim)
            for (int64_t k = 0; k < dim; k += 16) store(to + k, _mm512_loadu_ps(head + k));
    }

    // store(row, panel, sums of its 32 columns) for every row and panel.
    template <class Store>
    void multiply_all(const Product& product, const bf16* x, int64_t rows, Desk& desk, Store store) {
        // The last product decides between tokens that are nearly alike: never in 8 bits.
        const bool int8 = shape_.int8 && is_int8(product) && &product != &ends_.head;
        if (int8)
            team_.each(pieces(rows), [&](int64_t piece) {
                each_row(piece, rows, [&](int64_t row) { rounded_.round(x, product.inputs, row); });
            });
        const Int8Rows rounded = rounded_.rows(product.inputs);
        const Inputs inputs{x, int8 ? &rounded : nullptr};
        const int64_t panels = product.panel_count(), blocks = (rows + kBlockRows - 1) / kBlockRows;
        team_.each(panels * blocks, [&](int64_t piece) {
            const int64_t panel = piece % panels, first = piece / panels * kBlockRows;
            multiply_panel(product, inputs, panel, first, std::min(rows, first + kBlockRows), desk.panel,
                           [&](int64_t row, const __m512* sums) { store(row, panel, sums); });
        });
    }

    void multiply_into(const Product& product, const bf16* x, int64_t rows, float* to, Desk& desk) {
        multiply_all(product, x, rows, desk, [&](int64_t row, int64_t panel, const __m512* sums) {
            store_columns(product, panel, row, sums, to);
        });
    }

    // hidden += product, normed first where the model does so.
    void add(const Product& product, const bf16* x, const float* end_norm, int64_t rows, Desk& desk) {
        const int64_t size = shape_.hidden;
        if (!end_norm) {
            multiply_all(product, x, rows, desk, [&](int64_t row, int64_t panel, const __m512* sums) {
                float* to = hidden_.data() + row * size + panel * kColumns;
                for (int half = 0; half < 2; ++half, to += 16)
                    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sums[half]));
            });
            return;
        }
        multiply_into(product, x, rows, ended_.data(), desk);
        team_.each(rows, [&](int64_t row) {
            float *ended = ended_.data() + row * size, *hidden = hidden_.data() + row * size;
            rms_norm(ended, end_norm, size, shape_.epsilon, ended);
            for (int64_t i = 0; i < size; i += 16)
                _mm512_storeu_ps(hidden + i, _mm512_add_ps(_mm512_loadu_ps(hidden + i), _mm512_loadu_ps(ended + i)));
        });
    }

    // A panel of it is 16 columns of the gate and the same 16 of what goes through.
    void gate(const DiptychLayer& layer, int64_t rows, Desk& desk) {
        multiply_all(layer.gate_up, normed_.data(), rows, desk, [&](int64_t row, int64_t panel, const __m512* sums) {
            store_bf16(gated_.data() + row * shape_.intermediate + panel * 16, _mm512_mul_ps(opened(sums[0]), sums[1]));
        });
    }

    __m512 opened(__m512 x) const {
        const __m512 one = _mm512_set1_ps(1.0f);
        if (shape_.gate == kSilu) {
            const __m512 less = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(87.0f));
            return _mm512_div_ps(x, _mm512_add_ps(one, exponential(less)));
        }
        __m512 turned;
        if (shape_.gate == kTanhGelu) {
            const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
            const __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
            turned = hyperbolic_tangent(_mm512_mul_ps(inner, _mm512_set1_ps(0.7978845608028654f)));
        } else {
            alignas(64) float each[16];
            _mm512_store_ps(each, x);
            for (float& number : each) number = std::erf(number * 0.70710678f);
            turned = _mm512_load_ps(each);
        }
        return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), _mm512_add_ps(one, turned));
    }

    void squeeze(float* logits) {
        const __m512 cap = _mm512_set1_ps(shape_.logit_soft_cap);
        for (int64_t i = 0; i < shape_.vocabulary; i += 16) {
            const __mmask16 here = first_lanes(shape_.vocabulary - i);
            const __m512 part = _mm512_div_ps(_mm512_maskz_loadu_ps(here, logits + i), cap);
            _mm512_mask_storeu_ps(logits + i, here, _mm512_mul_ps(hyperbolic_tangent(part), cap));
        }
    }

    const DiptychShape shape_;
    const std::vector<DiptychLayer> layers_;
    const DiptychEnds ends_;
    Team team_;
    std::vector<Desk> desks_;
    std::vector<float> hidden_, qkv_, ended_;
    std::vector<bf16> normed_, query_, found_, gated_;
    Int8Room rounded_;
    std::vector<Task> tasks_;
    std::vector<const Segment*> home_;
};

}  // namespace

extern "C" {

void* diptych_decoder(const DiptychShape* shape, const DiptychLayer* layers, const DiptychEnds* ends, int64_t threads) {
    return new Decoder(*shape, layers, *ends, int(threads));
}

void diptych_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

void diptych_step(void* decoder, const DiptychStep* step) { static_cast<Decoder*>(decoder)->step(*step); }

void diptych_products(void* decoder, const DiptychStep* step) { static_cast<Decoder*>(decoder)->products(*step); }
}
