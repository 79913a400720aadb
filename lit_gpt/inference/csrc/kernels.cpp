// Linear layers, and a GPT's blocks for one new token in each slot: the time goes into reading the weights.
//
// Axes:
//   B  rows of x: in `decode` one for each slot, its new token
//   I  inputs of a linear layer             O  its outputs
//   C  width of the residual stream         F  width of the MLP
//   H  query heads     K  kv heads          D  head dimension     S  keys
//   R  rows of x in a tile, 1 or TILE
// The small letter is an index on that axis. The last axis named is contiguous.
//
// W is (O, I) and x is (B, I), so a product is a dot product of two streams, and W is read once and in order. A tile of
// 4 rows of x by 4 of W keeps 16 sums in registers. The result for a row of x depends on no other row: a sum runs over
// I in the same order whatever the tile.
//
// `linear`, `product` and `attention` run on all threads at once and share the work. `linear` and `attention` return
// when all threads are done, `product` without waiting.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>

#include "abi.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512VNNI__)
#include "primitives_avx512_vnni.h"
#else
#error "there are no primitives for this instruction set"
#endif

extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

// Matrix products -----------------------------------------------------------------------------------------------------

namespace {

const long ROWS_AT_ONCE = 64;  // rows of x that stay in the second-level cache while W passes by

// R rows of x against TILE rows of W; meanwhile the rows of W that follow are fetched.
template <typename Format, long R>
INLINE typename Format::Sums tile(const typename Format::Input *x, const typename Format::Weight *const *w, long I,
                                  bool fetch) {
    typename Format::Sums sums[R][TILE] = {};
    long i = 0;
    for (; i + Format::STEP <= I; i += Format::STEP) {
        typename Format::Elements v[TILE];
#pragma GCC unroll 4
        for (long j = 0; j < TILE; j++) {
            v[j] = Format::load(w[j] + i);
            if (fetch) __builtin_prefetch(w[j] + TILE * I + i);
        }
#pragma GCC unroll 4
        for (long r = 0; r < R; r++) {
            typename Format::Elements u = Format::load(x + r * I + i);
#pragma GCC unroll 4
            for (long j = 0; j < TILE; j++) sums[r][j] = Format::multiply_add(u, v[j], sums[r][j]);
        }
    }
    if (i < I)
        for (long r = 0; r < R; r++)
            for (long j = 0; j < TILE; j++) {
                typename Format::Elements u = Format::load_first(I - i, x + r * I + i);
                sums[r][j] = Format::multiply_add(u, Format::load_first(I - i, w[j] + i), sums[r][j]);
            }
    return totals<Format, R>(sums);
}

// B rows of x against this thread's share of the O rows of W; `finish(o, mask)` returns the function that receives
// the tiles of the outputs from o on, as (b, R, sums).
template <typename Format, typename Finish>
INLINE void product(const typename Format::Input *x, const typename Format::Weight *W, long B, long I, long O,
                    Finish finish) {
    long thread = omp_get_thread_num(), n_threads = omp_get_num_threads(), n_tiles = (O + TILE - 1) / TILE;
    long end = n_tiles * (thread + 1) / n_threads * TILE;
    for (long o = n_tiles * thread / n_threads * TILE; o < end; o += TILE) {
        const typename Format::Weight *w[TILE];
        for (long j = 0; j < TILE; j++) w[j] = W + (o + j < O ? o + j : O - 1) * I;
        auto receive = finish(o, O - o < TILE ? (1u << (O - o)) - 1 : 0xf);
        long b = 0;
        for (; b + TILE <= B; b += TILE) receive(b, TILE, tile<Format, TILE>(x + b * I, w, I, b == 0));
        for (; b < B; b++) receive(b, 1, tile<Format, 1>(x + b * I, w, I, b == 0));
    }
}

// I floats to bytes around 128; returns the value of one unit of them: not a number if there is one that is not.
float quantize_row(const float *x, uint8_t *q, long I) {
    Vector peaks = zeros(), poison = zeros();
    for (long i = 0; i < I; i += LANES) {
        Vector v = load(x + i, first(I - i));
        peaks = larger(peaks, magnitude(v));
        poison = multiply_add(v, zeros(), poison);
    }
    float peak = largest(peaks);
    Vector factor = splat(peak > 0 ? 127 / peak : 0);
    for (long i = 0; i < I; i += LANES) store_bytes(q + i, first(I - i), multiply(load(x + i, first(I - i)), factor));
    return peak / 127 + sum(poison);
}

// x (B, I) times W, with the bias; `write(b, R, o, mask, v)` receives the tile v of outputs o … of R rows from b on.
// scratch: see linear_scratch_bytes.
template <typename Write>
INLINE void linear(const Linear &l, const float *x, uint8_t *scratch, long B, Write write) {
    const long I = l.I;
    float *units = (float *)scratch;
    uint8_t *quantized_rows = scratch + sizeof(float) * B;
    if (l.scale) {
#pragma omp for
        for (long b = 0; b < B; b++) units[b] = quantize_row(x + b * I, quantized_rows + b * I, I);
    }
    for (long from = 0; from < B; from += ROWS_AT_ONCE) {
        long rows = B - from < ROWS_AT_ONCE ? B - from : ROWS_AT_ONCE;
        if (!l.scale) {
            product<Fp32>(x + from * I, (const float *)l.weight, rows, I, l.O, [=, &l](long o, TileMask mask) {
                Vector bias = four_times(mask, l.bias ? l.bias + o : 0);
                return [=](long b, long R, Vector sums) { write(from + b, R, o, mask, add(sums, bias)); };
            });
            continue;
        }
        const uint8_t *q = quantized_rows + from * I;
        product<Int8>(q, (const int8_t *)l.weight, rows, I, l.O, [=, &l](long o, TileMask mask) {
            Vector weight_units = four_times(mask, l.scale + o), bias = four_times(mask, l.bias ? l.bias + o : 0);
            auto offset = four_times(mask, l.offset + o);
            return [=](long b, long R, Int8::Sums sums) {
                Vector unit = multiply(weight_units, one_each_quarter(R, units + from + b));
                write(from + b, R, o, mask, multiply_add(difference(sums, offset), unit, bias));
            };
        });
    }
#pragma omp barrier
}

// Elementwise ---------------------------------------------------------------------------------------------------------

// eˣ, to 2 units in the last place: x = n · ln 2 + r, and a polynomial for r (the coefficients of Cephes' expf).
INLINE Vector exponential(Vector x) {
    x = smaller(splat(88), larger(splat(-87), x));  // in this order a NaN stays one
    Vector n = round_to_nearest(multiply(x, splat(1.44269504f)));
    Vector r = negate_multiply_add(n, splat(0.693359375f), x);
    r = negate_multiply_add(n, splat(-2.12194440e-4f), r);
    Vector p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = multiply_add(p, r, splat(c));
    p = multiply_add(p, multiply(r, r), add(r, splat(1)));
    return times_power_of_two(p, n);
}

INLINE Vector negative(Vector v) { return subtract(zeros(), v); }

// erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26)
INLINE Vector gelu(Vector x) {
    const Vector one = splat(1), half = splat(0.5f);
    Vector z = multiply(magnitude(x), splat(0.7071067812f));
    Vector t = divide(one, multiply_add(splat(0.3275911f), z, one)), p = splat(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = multiply_add(p, t, splat(c));
    p = multiply(multiply(p, t), exponential(negative(multiply(z, z))));
    Vector erf = subtract_where(is_negative(x), p, one, subtract(one, p));
    return multiply(multiply(half, x), add(one, erf));
}

// 0.5 (1 + tanh u) is 1 / (1 + e⁻²ᵘ)
INLINE Vector gelu_tanh(Vector x) {
    Vector u = multiply_add(multiply(x, x), splat(0.044715f), splat(1));
    u = multiply(multiply(u, x), splat(-2 * 0.7978845608f));
    return divide(x, add(splat(1), exponential(u)));
}

INLINE Vector relu(Vector x) { return larger(zeros(), x); }

// swiglu: SiLU of the gate
INLINE Vector activate(long kind, Vector x) {
    if (kind == RELU) return relu(x);
    if (kind == RELU2) return multiply(relu(x), relu(x));
    if (kind == SWIGLU) return divide(x, add(splat(1), exponential(negative(x))));
    if (kind == GELU_TANH) return gelu_tanh(x);
    return gelu(x);
}

INLINE float sum_of_squares(const float *x, float mean, long n) {
    Vector total = zeros();
    for (long i = 0; i < n; i += LANES) {
        Vector v = select(first(n - i), subtract(load(x + i, first(n - i)), splat(mean)), zeros());
        total = multiply_add(v, v, total);
    }
    return sum(total);
}

// LayerNorm or RMSNorm of n floats.
void normalize(const float *x, const float *weight, const float *bias, float *y, long n, bool rmsnorm, float eps) {
    float mean = 0;
    if (!rmsnorm) {
        Vector total = zeros();
        for (long i = 0; i < n; i += LANES) total = add(total, load(x + i, first(n - i)));
        mean = sum(total) / n;
    }
    float factor = 1 / sqrtf(sum_of_squares(x, mean, n) / n + eps);
    for (long i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * weight[i] + (bias ? bias[i] : 0);
}

// Dimension d goes with d + D / 2. rotation: D / 2 cosines, D / 2 sines.
void rotate(float *x, const float *rotation, long D) {
    for (long d = 0; d < D / 2; d++) {
        float a = x[d], b = x[d + D / 2], cosine = rotation[d], sine = rotation[d + D / 2];
        x[d] = a * cosine - b * sine;
        x[d + D / 2] = b * cosine + a * sine;
    }
}

// Attention -----------------------------------------------------------------------------------------------------------

const long KEYS_AHEAD = 16;  // keys that are fetched before their turn

INLINE void write_cache(float *p, const float *x, long n) { memcpy(p, x, n * sizeof(float)); }
INLINE void write_cache(Bf16 *p, const float *x, long n) {
    for (long i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        p[i] = x[i] == x[i] ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;  // to the nearest, ties to even
    }
}

// The products of q (D) with the first S keys (S, D), scaled → scores, of which TILE - 1 more than S are written;
// returns the largest.
template <typename Element>
INLINE float score_keys(const float *q, const Element *keys, const Element *values, float *scores, long S, long D) {
    const float scale = 1 / sqrtf(D);
    Vector peaks = splat(-INFINITY);
    for (long s = 0; s < S; s += TILE) {
        Vector sums[1][TILE] = {};
        for (long d = 0; d < D; d += LANES) {
            Vector u = load(q + d, first(D - d));
            for (long j = 0; j < TILE; j++) {
                __builtin_prefetch(keys + (s + j + KEYS_AHEAD) * D + d);
                __builtin_prefetch(values + (s + j) * D + d);
                const Element *key = keys + (s + j < S ? s + j : S - 1) * D;
                sums[0][j] = multiply_add(u, load(key + d, first(D - d)), sums[0][j]);
            }
        }
        Vector score = multiply(totals<Fp32, 1>(sums), splat(scale));
        store_first_row(scores + s, score);
        peaks = larger(peaks, score);
    }
    return largest(peaks);
}

// One query (D) over the first S of the keys and values (S, D) → y (D). scores: S + TILE - 1 floats of scratch.
template <typename Element>
void attend(const float *q, const Element *keys, const Element *values, float *y, float *scores, long S, long D) {
    const float peak = score_keys(q, keys, values, scores, S, D);
    Vector total = zeros();
    for (long s = 0; s < S; s += LANES) {
        Mask mask = first(S - s);
        Vector e = exponential(subtract(load(scores + s, mask), splat(peak)));
        store(scores + s, mask, e);
        total = select(mask, add(total, e), total);
    }
    const Vector share = splat(1 / sum(total));
    for (long from = 0; from < D; from += 4 * LANES) {
        Vector sums[4] = {};
        for (long s = 0; s < S; s++)
#pragma GCC unroll 4
            for (long j = 0; j < 4; j++)
                if (long d = from + LANES * j; d < D)
                    sums[j] = multiply_add(splat(scores[s]), load(values + s * D + d, first(D - d)), sums[j]);
        for (long j = 0; j < 4; j++)
            if (long d = from + LANES * j; d < D) store(y + d, first(D - d), multiply(sums[j], share));
    }
}

// The new tokens' keys and values into the cache, and their queries over all that is there: qkv (B, (H + 2K) · D) → y
// (B, H · D). scores: `n_scores` floats of scratch for each thread.
template <typename Element>
INLINE void attention(const Stack &s, long layer, const CacheLayout &cache, const long *slots, const long *lengths,
                      float *qkv, float *y, float *scores, long n_scores, long B) {
    const BlockLayout &block = s.blocks[layer];
    const long D = s.D, group = s.H / s.K, width = (s.H + 2 * s.K) * D;
#pragma omp for
    for (long i = 0; i < B * s.K; i++) {
        long b = i / s.K, head = i % s.K, position = lengths[b];
        const float *rotation = s.rotation ? s.rotation + position * D : 0;
        float *q = qkv + b * width + head * group * D, *k = qkv + b * width + (s.H + head) * D, *v = k + s.K * D;
        long start = layer * cache.layer_stride + slots[b] * cache.slot_stride + head * cache.head_stride;
        Element *keys = (Element *)cache.keys + start, *values = (Element *)cache.values + start;
        if (block.k_norm) normalize(k, block.k_norm, 0, k, D, true, s.eps);
        if (rotation) rotate(k, rotation, D);
        write_cache(keys + position * D, k, D);
        write_cache(values + position * D, v, D);
        for (long j = 0; j < group; j++, q += D) {
            if (block.q_norm) normalize(q, block.q_norm, 0, q, D, true, s.eps);
            if (rotation) rotate(q, rotation, D);
            float *own = scores + omp_get_thread_num() * n_scores;
            attend(q, keys, values, y + (b * s.H + head * group + j) * D, own, position + 1, D);
        }
    }
}

}  // namespace

// Entry points --------------------------------------------------------------------------------------------------------

// Scratch of `linear`: in int8 the rows of x as bytes, and before them one unit for each.
extern "C" long linear_scratch_bytes(const Linear *l, long B) {
    return l->scale ? B * (l->I + (long)sizeof(float)) : 0;
}

namespace {

// The parts of the scratch of `decode`, as offsets in bytes.
struct DecodeScratch {
    long h, qkv, hidden, scores, quantized_rows, bytes;
    long n_scores;  // floats of `scores` for each thread

    // For B slots that hold `lengths` tokens.
    DecodeScratch(const Stack &s, const long *lengths, long B, int threads) {
        long longest = 0, quantized = 0;
        for (long b = 0; b < B; b++) longest = lengths[b] > longest ? lengths[b] : longest;
        for (long layer = 0; layer < s.n_layer; layer++) {
            const BlockLayout &block = s.blocks[layer];
            for (auto l : {&block.c_attn, &block.attn_c_proj, &block.c_fc, &block.c_gate, &block.mlp_c_proj}) {
                long need = linear_scratch_bytes(l, B);
                quantized = need > quantized ? need : quantized;
            }
        }
        n_scores = longest + 1 + TILE - 1;  // the new token, and what the last tile of keys has beyond it
        bytes = 0;
        h = reserve(B * (s.H * s.D > s.C ? s.H * s.D : s.C));
        qkv = reserve(B * (s.H + 2 * s.K) * s.D);
        hidden = reserve(B * s.F);
        scores = reserve(threads * n_scores);
        quantized_rows = bytes;
        bytes += quantized;
    }

    long reserve(long floats) {
        long start = bytes;
        bytes += floats * sizeof(float);
        return start;
    }
};

}  // namespace

extern "C" long decode_scratch_bytes(const Stack *stack, const long *lengths, long B, int threads) {
    return DecodeScratch(*stack, lengths, B, threads).bytes;
}

// x (B, I) → y (B, O). scratch: linear_scratch_bytes.
extern "C" void linear_forward(const Linear *l, const float *x, float *y, uint8_t *scratch, long B, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    linear(*l, x, scratch, B, [=](long b, long R, long o, TileMask mask, Vector v) {
        store_tile(y + b * l->O + o, R, l->O, mask, v);
    });
}

// All blocks on x (B, C), in place: one new token for each of `slots`, which hold `lengths` tokens.
// scratch: decode_scratch_bytes.
extern "C" void decode(const Stack *stack, const CacheLayout *cache, float *x, const long *slots, const long *lengths,
                       uint8_t *scratch, long B, int threads) {
    const Stack &s = *stack;
    const DecodeScratch parts(s, lengths, B, threads);
    const long C = s.C, F = s.F, width = (s.H + 2 * s.K) * s.D, n_scores = parts.n_scores;
    float *h = (float *)(scratch + parts.h), *qkv = (float *)(scratch + parts.qkv);
    float *hidden = (float *)(scratch + parts.hidden), *scores = (float *)(scratch + parts.scores);
    uint8_t *quantized_rows = scratch + parts.quantized_rows;
    auto add_to_x = [=](long b, long R, long o, TileMask mask, Vector v) {
        float *y = x + b * C + o;
        store_tile(y, R, C, mask, add(v, load_tile(y, R, C, mask)));
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long layer = 0; layer < s.n_layer; layer++) {
        const BlockLayout &block = s.blocks[layer];
#pragma omp for
        for (long b = 0; b < B; b++) normalize(x + b * C, block.ln_1, block.ln_1_bias, h + b * C, C, s.rmsnorm, s.eps);
        linear(block.c_attn, h, quantized_rows, B, [=](long b, long R, long o, TileMask mask, Vector v) {
            store_tile(qkv + b * width + o, R, width, mask, v);
        });
        if (cache->bf16)
            attention<Bf16>(s, layer, *cache, slots, lengths, qkv, h, scores, n_scores, B);
        else
            attention<float>(s, layer, *cache, slots, lengths, qkv, h, scores, n_scores, B);
        linear(block.attn_c_proj, h, quantized_rows, B, add_to_x);
#pragma omp for
        for (long b = 0; b < B; b++) normalize(x + b * C, block.ln_2, block.ln_2_bias, h + b * C, C, s.rmsnorm, s.eps);
        const Linear &inner = block.c_gate.weight ? block.c_gate : block.c_fc;
        linear(inner, h, quantized_rows, B, [=, &s](long b, long R, long o, TileMask mask, Vector v) {
            store_tile(hidden + b * F + o, R, F, mask, activate(s.activation, v));
        });
        if (block.c_gate.weight)
            linear(block.c_fc, h, quantized_rows, B, [=](long b, long R, long o, TileMask mask, Vector v) {
                float *y = hidden + b * F + o;
                store_tile(y, R, F, mask, multiply(v, load_tile(y, R, F, mask)));
            });
        linear(block.mlp_c_proj, hidden, quantized_rows, B, add_to_x);
    }
}
