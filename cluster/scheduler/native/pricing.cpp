// One request on each worker, priced, and the cheapest way: cluster.scheduler.costs, rule and ways in one call.
//
// Operation for operation what numpy does there, in the same order and without contraction, so that both choose the
// same way for the same costs to the last bit; NaN spreads as numpy spreads it. Columns have one double a worker.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
enum Kind { NEAR, FAR };
enum How { LOCAL, MIXED, REMOTE };  // in the order of their names: of equals the first one wins
enum Rule { AUTO, ONLY_REMOTE, ONLY_LOCAL };

// As cluster.scheduler.native_pricing writes them: COLUMNS, the rule's constants and what is asked.
struct Columns {
    const double *beside, *token, *pair, *step_tokens, *fetch, *fetch_token, *exposed, *exposed_token;
    const double *idle_at, *rows, *row, *context, *context_tokens, *room_tokens, *tie;
    const double *block_tokens, *most_tokens, *host, *prefill, *decode, *mixed, *alive;
    const double *step, *kind_step, *kind_token, *kind_pair;
    const int64_t *order, *starts;
};

struct Weights {
    double within, beyond, usual_within, usual_jump, usual_beyond, no_wait;
};

struct Asked {
    int64_t slots, hosts, hosted, rank, rule;
    int64_t prefills, decodes, mixed;                   // workers of each pool
    int64_t block_size;                                 // 0: they differ
    int64_t held, promised;                             // depths that follow: tokens, and a bit per slot
    double prompt_tokens, context, answer_tokens, now;
    double least_step_tokens, shortest_context;
    double ttft, itl, usual;                            // NaN: nobody promised anything
    double late[3];                                     // by How
};

// Rows of what is found, as cluster.scheduler.native_pricing reads them.
enum Row {
    WAIT, REUSED, FETCHED, FETCH, PROMPT, COMPUTE, FIRST_TOKEN, TRANSFER, ROOM = TRANSFER + 2, STEP, GROWTH, ROWS,
    MISSING, PREFILL, DECODE, LOCALLY = DECODE + 2, MIXEDLY, WORK
};

struct Answer {
    double cost, how, prefill, decode, holder, second, fetches, waits_for_room, lender;
    double wait, first_token, compute, reused, fetched, uncached, lacked, step, gap;
};

// numpy's maximum and minimum: NaN if either is.
inline double most(double a, double b) { return a != a || a > b ? a : b; }
inline double least(double a, double b) { return a != a || a < b ? a : b; }

// Python's and numpy's remainder.
inline double remainder_of(double a, double b) {
    double rest = std::fmod(a, b);
    return rest != 0.0 && (b < 0.0) != (rest < 0.0) ? rest + b : rest;
}

// numpy's argmin: the first NaN, else the first least. In lanes, or each step waits for the one before it.
template <typename Value>
int64_t argmin(int64_t count, Value value) {
    constexpr int64_t LANES = 8;
    double lanes[LANES];
    int unordered = 0;
    for (double &lane : lanes) lane = INF;
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) {
            double one = value(at + lane);
            unordered |= one != one;
            lanes[lane] = one < lanes[lane] ? one : lanes[lane];
        }
    double lowest = INF;
    for (double lane : lanes) lowest = lane < lowest ? lane : lowest;
    for (; at < count; ++at) {
        double one = value(at);
        unordered |= one != one;
        lowest = one < lowest ? one : lowest;
    }
    for (int64_t place = 0; place < count; ++place) {
        double one = value(place);
        if (unordered ? one != one : one == lowest) return place;
    }
    return 0;
}

inline int64_t least_of(int64_t count, const double *values) {
    return argmin(count, [=](int64_t at) { return values[at]; });
}

inline int64_t most_of(int64_t count, const double *values) {
    return argmin(count, [=](int64_t at) { return -values[at]; });
}

// Depths as a column; returns what follows them.
const char *spread(const char *depths, int64_t count, int64_t slots, double *tokens) {
    std::memset(tokens, 0, slots * sizeof(double));
    int64_t words = (slots + 63) / 64;
    for (int64_t depth = 0; depth < count; ++depth) {
        double reach;
        std::memcpy(&reach, depths, sizeof reach);
        depths += sizeof reach;
        for (int64_t word = 0; word < words; ++word, depths += sizeof(uint64_t)) {
            uint64_t bits;
            std::memcpy(&bits, depths, sizeof bits);
            for (; bits; bits &= bits - 1) tokens[64 * word + __builtin_ctzll(bits)] = reach;
        }
    }
    return depths;
}

struct Way {
    double cost;
    int how;
    int64_t prefill, decode;  // prefill is -1 when decode computes the prompt
};

// As Python orders tuples.
bool is_before(const Way &a, const Way &b) {
    if (a.cost != b.cost) return a.cost < b.cost;
    if (a.how != b.how) return a.how < b.how;
    if (a.prefill != b.prefill) return a.prefill < b.prefill;
    return a.decode < b.decode;
}

class Pricing {
   public:
    Pricing(const Weights &weights, const Columns &fleet, const Asked &asked, double *found)
        : weights_(weights), fleet_(fleet), asked_(asked), slots_(asked.slots), found_(found) {}

    void estimate(const char *depths) {
        reuse(depths);
        find_fetches();
        compute();
        decode();
    }

    void sides() {
        // Where rows aren't needed any more than here they are where results come to lie.
        double *computing = row(PREFILL), *decoding = row(DECODE), *both = row(LOCALLY);
        compute_cost(computing);
        decode_cost(decoding);
        const double *step = row(STEP), *rows = row(ROWS), *prompt = row(PROMPT), *wait = row(WAIT);
        for (int64_t i = 0; i < slots_; ++i) {
            decoding[i] += fleet_.tie[i];
            double decodes = (asked_.answer_tokens - 1.0) * step[i];
            double harm = rows[i] * prompt[i] * decodes / (decodes + wait[i] + weights_.no_wait);
            both[i] = computing[i] + decoding[i] + harm;
        }
        const double *senders = asked_.prefills ? fleet_.prefill : fleet_.mixed;
        const double *receivers = asked_.prefills && !asked_.decodes ? fleet_.mixed : fleet_.decode;
        bool bounded = asked_.context > asked_.shortest_context;
        double *near = row(DECODE), *far = near + slots_, *local = both, *mixed = row(MIXEDLY);
        const double *transfer = row(TRANSFER);
        for (int64_t i = 0; i < slots_; ++i) {
            double sends = senders[i], receives = receivers[i], alone = fleet_.decode[i], both_pools = fleet_.mixed[i];
            if (bounded) {
                double too_long = fleet_.most_tokens[i] >= asked_.context ? 0.0 : INF;
                sends += fleet_.most_tokens[i] >= asked_.prompt_tokens ? 0.0 : INF;
                receives += too_long, alone += too_long, both_pools += too_long;
            }
            double joins = decoding[i] + wait[i] + receives, together = both[i];
            computing[i] = computing[i] + fleet_.tie[i] + sends;
            near[i] = transfer[i] + joins;
            far[i] = transfer[slots_ + i] + joins;
            local[i] = together + alone;
            mixed[i] = asked_.mixed ? together + both_pools : both_pools;
        }
    }

    Way best_way() {
        Way best{INF, REMOTE + 1, -1, -1};
        bool any = false;
        auto offer = [&](const Way &way) {
            if (!any || is_before(way, best)) best = way;
            any = true;
        };
        if (asked_.rule != ONLY_REMOTE) {
            int64_t slot = least_of(slots_, row(LOCALLY));
            offer({row(LOCALLY)[slot] + asked_.late[LOCAL], LOCAL, -1, slot});
            if (asked_.mixed) {
                slot = least_of(slots_, row(MIXEDLY));
                offer({row(MIXEDLY)[slot] + asked_.late[MIXED], MIXED, -1, slot});
            }
        }
        if (asked_.rule != ONLY_LOCAL) pairs(offer);
        return best;
    }

    void tell(const Way &way, Answer &told) const {
        int64_t decode = way.decode, computes = way.prefill < 0 ? decode : way.prefill;
        told.cost = way.cost, told.how = way.how, told.prefill = way.prefill, told.decode = decode;
        told.holder = holder_, told.second = second_, told.fetches = fetches_, told.waits_for_room = waits_for_room_;
        told.lender = computes == holder_ ? second_ : holder_;
        told.wait = row(WAIT)[computes], told.first_token = row(FIRST_TOKEN)[computes];
        told.compute = row(COMPUTE)[computes], told.reused = row(REUSED)[computes];
        told.fetched = fetches_ ? row(FETCHED)[computes] : 0.0;
        told.uncached = row(MISSING)[computes], told.lacked = row(MISSING)[decode], told.step = row(STEP)[decode];
        told.gap = way.prefill < 0 ? 0.0 : row(TRANSFER)[kind(computes, decode) * slots_ + decode];
        if (waits_for_room_) told.gap += row(ROOM)[decode];
    }

   private:
    double *row(int which) const { return found_ + which * slots_; }

    int kind(int64_t a, int64_t b) const { return fleet_.host[a] == fleet_.host[b] ? NEAR : FAR; }

    // ---- costs.estimate --------------------------------------------------------------------------

    void reuse(const char *depths) {
        double *held = row(FETCH), *promised = row(FETCHED), *reused = row(REUSED), *missing = row(MISSING);
        depths = spread(depths, asked_.held, slots_, held);
        for (int64_t i = 0; i < slots_; ++i) reused[i] = held[i];
        if (asked_.promised) {
            spread(depths, asked_.promised, slots_, promised);
            for (int64_t i = 0; i < slots_; ++i) {
                if (!asked_.block_size) promised[i] -= remainder_of(promised[i], fleet_.block_tokens[i]);
                reused[i] = most(held[i], promised[i]);
            }
        }
        for (int64_t i = 0; i < slots_; ++i) {
            reused[i] -= fleet_.block_tokens[i] * (reused[i] >= asked_.prompt_tokens);
            missing[i] = asked_.prompt_tokens - reused[i];
        }
    }

    double whole(double tokens, double block) const {
        tokens = asked_.prompt_tokens - 1.0 < tokens ? asked_.prompt_tokens - 1.0 : tokens;
        return tokens - remainder_of(tokens, block);
    }

    void find_fetches() {
        double *held = row(FETCH), *fetched = row(FETCHED), *price = row(FETCH);
        const double *reused = row(REUSED);
        for (int64_t i = 0; i < slots_; ++i) held[i] *= fleet_.alive[i];
        holder_ = most_of(slots_, held);
        double top = held[holder_];
        if (!top) {
            holder_ = second_ = -1;
            return;
        }
        held[holder_] = 0.0;
        second_ = most_of(slots_, held);
        double next = held[second_], reach = whole(top, asked_.block_size);
        bool any = false;
        for (int64_t i = 0; i < slots_; ++i) {
            fetched[i] = (asked_.block_size ? reach : whole(top, fleet_.block_tokens[i])) - reused[i];
            if (i == holder_) fetched[i] = whole(next, fleet_.block_tokens[i]) - reused[i];
            fetched[i] = most(fetched[i], 0.0);
            any |= fetched[i] != 0.0;
        }
        if (!any) return;
        any = false;
        double host = fleet_.host[holder_];
        for (int64_t i = 0; i < slots_; ++i) {
            int64_t at = i + (asked_.hosts == 1 || fleet_.host[i] == host ? 0 : slots_);
            double costs = fleet_.fetch[at] + fleet_.fetch_token[at] * fetched[i];
            double saved = fetched[i] * (fleet_.token[i] + fleet_.pair[i] * (reused[i] + 0.5 * fetched[i]));
            bool pays = costs < saved;
            any |= pays;
            fetched[i] *= pays;
            price[i] = costs * pays;
        }
        fetches_ = any;
    }

    void compute() {
        double *wait = row(WAIT), *prompt = row(PROMPT), *compute = row(COMPUTE), *first_token = row(FIRST_TOKEN);
        double *work = row(WORK);
        const double *missing = row(MISSING), *fetched = row(FETCHED), *fetch = row(FETCH);
        const double *idle_at = fleet_.idle_at + asked_.rank * slots_;
        bool chunked = asked_.prompt_tokens > asked_.least_step_tokens;
        for (int64_t i = 0; i < slots_; ++i) {
            double computed = fetches_ ? missing[i] - fetched[i] : missing[i];
            prompt[i] = computed * (fleet_.token[i] + fleet_.pair[i] * (asked_.prompt_tokens - computed * 0.5));
            double steps = chunked ? 1.0 + std::floor((computed - 1.0) / fleet_.step_tokens[i]) : 1.0;
            compute[i] = steps * fleet_.beside[i] + prompt[i];
            double pairs = asked_.prompt_tokens - computed * 0.5;
            work[i] = steps * (fleet_.beside[i] - fleet_.step[i] + fleet_.kind_step[i]) +
                      computed * (fleet_.kind_token[i] + fleet_.kind_pair[i] * pairs);
            wait[i] = most(idle_at[i] - asked_.now, 0.0);
            first_token[i] = wait[i] + compute[i];
            if (fetches_) first_token[i] += fetch[i];
        }
    }

    void decode() {
        double *growth = row(GROWTH), *step = row(STEP), *rows = row(ROWS), *near = row(TRANSFER), *far = near + slots_;
        const double *missing = row(MISSING), *exposed = fleet_.exposed, *exposed_token = fleet_.exposed_token;
        double context = asked_.prompt_tokens + 0.5 * asked_.answer_tokens;
        for (int64_t i = 0; i < slots_; ++i) {
            growth[i] = fleet_.row[i] + fleet_.context[i] * context;
            step[i] = fleet_.beside[i] + growth[i];
            rows[i] = fleet_.rows[i];
            near[i] = exposed[i] + exposed_token[i] * missing[i];
            far[i] = exposed[slots_ + i] + exposed_token[slots_ + i] * missing[i];
        }
        double room = fleet_.room_tokens[least_of(slots_, fleet_.room_tokens)];
        if (room >= missing[most_of(slots_, missing)] + asked_.answer_tokens) return;
        waits_for_room_ = true;
        double *waits = row(ROOM);
        for (int64_t i = 0; i < slots_; ++i) {
            double lacking = missing[i] + asked_.answer_tokens - fleet_.room_tokens[i];
            double there = most(fleet_.context_tokens[i], fleet_.block_tokens[i]);
            waits[i] = most(lacking, 0.0) / there * asked_.answer_tokens * step[i];
        }
    }

    // ---- rule ------------------------------------------------------------------------------------

    double weighed(double seconds, double wish) const {
        if (wish != wish) return seconds;
        return weights_.within * seconds + (weights_.beyond - weights_.within) * most(seconds - wish, 0.0);
    }

    void compute_cost(double *costs) const {
        const double *first_token = row(FIRST_TOKEN), *work = row(WORK);
        double usual = asked_.usual;
        if (asked_.ttft == asked_.ttft || usual != usual) {
            for (int64_t i = 0; i < slots_; ++i) costs[i] = weighed(first_token[i], asked_.ttft) + work[i];
            return;
        }
        for (int64_t i = 0; i < slots_; ++i) {
            double late = weights_.usual_jump * usual + weights_.usual_beyond * (first_token[i] - usual);
            costs[i] = weights_.usual_within * first_token[i] + (first_token[i] > usual) * late + work[i];
        }
    }

    void decode_cost(double *costs) const {
        const double *step = row(STEP), *rows = row(ROWS), *growth = row(GROWTH), *room = row(ROOM);
        for (int64_t i = 0; i < slots_; ++i) {
            double pace = weighed(step[i], asked_.itl) + rows[i] * growth[i];
            if (asked_.itl == asked_.itl)
                pace += rows[i] * weights_.beyond * least(most(step[i] - asked_.itl, 0.0), growth[i]);
            costs[i] = asked_.answer_tokens * pace;
            if (waits_for_room_) costs[i] += room[i];
        }
    }

    // ---- ways ------------------------------------------------------------------------------------

    Way pair(int64_t prefill, int64_t decode) const {
        double received = row(DECODE)[kind(prefill, decode) * slots_ + decode];
        return {row(PREFILL)[prefill] + received + asked_.late[REMOTE], REMOTE, prefill, decode};
    }

    template <typename Offer>
    void pairs(Offer offer) const {
        const double *senders = row(PREFILL), *near = row(DECODE), *far = near + slots_, *host = fleet_.host;
        int64_t prefill = least_of(slots_, senders), decode = least_of(slots_, far);
        double late = asked_.late[REMOTE], at_least = late + senders[prefill];
        Way best = pair(prefill, decode), beside;
        if (host[prefill] != host[decode]) {
            offer(best);
            if (!(best.cost <= at_least + near[least_of(slots_, near)]) && find_near(prefill, beside)) offer(beside);
            return;
        }
        bool any = find_near(prefill, beside);
        if (any && beside.cost <= at_least + far[decode]) {
            offer(beside);
            return;
        }
        double there = host[prefill];
        auto elsewhere = [=](int64_t at) { return host[at] == there ? INF : 0.0; };
        int64_t other_decode = argmin(slots_, [=](int64_t at) { return far[at] + elsewhere(at); });
        int64_t other_prefill = argmin(slots_, [=](int64_t at) { return senders[at] + elsewhere(at); });
        offer(best);
        if (any) offer(beside);
        offer(pair(prefill, other_decode));
        offer(pair(other_prefill, decode));
    }

    // The best pair on one host; `prefill` is the best of all. False where no two share one.
    bool find_near(int64_t prefill, Way &found) const {
        const double *senders = row(PREFILL), *receivers = row(DECODE);
        if (asked_.hosts == 1) {
            found = pair(prefill, least_of(slots_, receivers));
            return true;
        }
        if (asked_.hosts >= asked_.hosted) return false;
        const int64_t *order = fleet_.order, *starts = fleet_.starts;
        auto stop = [&](int64_t host) { return host + 1 < asked_.hosts ? starts[host + 1] : asked_.hosted; };
        int64_t host = argmin(asked_.hosts, [&](int64_t host) {
            double sender = senders[order[starts[host]]], receiver = receivers[order[starts[host]]];
            for (int64_t at = starts[host] + 1; at < stop(host); ++at) {
                sender = least(sender, senders[order[at]]);
                receiver = least(receiver, receivers[order[at]]);
            }
            return sender + receiver;
        });
        const int64_t *there = order + starts[host];
        int64_t count = stop(host) - starts[host];
        int64_t sender = argmin(count, [=](int64_t at) { return senders[there[at]]; });
        int64_t receiver = argmin(count, [=](int64_t at) { return receivers[there[at]]; });
        found = pair(there[sender], there[receiver]);
        return true;
    }

    const Weights &weights_;
    const Columns &fleet_;
    const Asked &asked_;
    const int64_t slots_;
    double *const found_;
    int64_t holder_ = -1, second_ = -1;
    bool fetches_ = false, waits_for_room_ = false;
};

}  // namespace

extern "C" void price(const Weights *weights, const Columns *fleet, const char *asked_bytes, double *found,
                      Answer *answer) {
    Asked asked;
    std::memcpy(&asked, asked_bytes, sizeof asked);
    Pricing pricing(*weights, *fleet, asked, found);
    pricing.estimate(asked_bytes + sizeof asked);
    pricing.sides();
    pricing.tell(pricing.best_way(), *answer);
}
