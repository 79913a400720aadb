// Linear layers: the time goes into reading the weights, and with many rows into the products.
//
// Axes:
//   B  rows of x: in `decode` one for each slot, its new token
//   I  inputs of a linear layer             O  its outputs
//   C  width of the residual stream         F  width of the MLP
//   H  query heads     K  kv heads          D  head dimension     S  keys
//   R  rows of x in a tile
// The small letter is an index on that axis. The last axis named is contiguous.
//
// In fp32 and bf16 W is (O, I) and x is (B, I): a product is a dot product of two streams, summed in 16 lanes. In int8 and
// int4 W is in blocks of 16 outputs, whose sums are the lanes: see abi.h. W is read once and in order for ROWS_AT_ONCE rows
// of x. The result for a row of x depends on no other row: a sum has the same order whatever the tile.
//
// `linear` runs on all threads of a team at once, which share the work, and returns when all are done.

#pragma once

namespace {

const long ROWS_AT_ONCE = 64;  // rows of x that stay in the second-level cache while W passes by
const long QUAD = 4;           // inputs that are next to each other in int8 and int4
const long QUAD_BYTES = 64;    // of 16 outputs
const long GROUP = 32;         // inputs that have a scale in int4
const long GROUP_BYTES = 256;  // of 16 outputs

// What is done with the sums for a row of x and 16 outputs.
struct Output {
    enum Kind { STORE, ADD, MULTIPLY, ACTIVATE };
    float *y;
    long stride;
    Kind kind;
    long activation;
};

// v → row b of the output from o on, of which there are n.
INLINE void write(const Output &out, long b, long o, long n, Vector v) {
    float *y = out.y + b * out.stride + o;
    if (out.kind == Output::ADD)
        v = add(v, load(y, n));
    else if (out.kind == Output::MULTIPLY)
        v = multiply(v, load(y, n));
    else if (out.kind == Output::ACTIVATE)
        v = activate(out.activation, v);
    store(y, v, n);
}

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// This thread's blocks of 16 outputs.
INLINE Range blocks_of(const Team &team, long O) { return team.share(round_up(O, LANES) / LANES); }

// The weights that are next, which the rows of x at hand fetch into the second-level cache bit by bit: all at once they
// would hold up the products.
struct Next {
    const char *from;
    long for_each_row;  // bytes

    template <typename Weight>
    INLINE Next(const Weight *w, long n, long rows)
        : from((const char *)w), for_each_row((n * (long)sizeof(Weight) + rows - 1) / rows) {}

    // The part of so many rows.
    INLINE void fetch(long rows) {
        const char *to = from + rows * for_each_row;
        for (; from < to; from += 64) __builtin_prefetch(from, 0, 2);
        from = to;
    }
};

// fp32 and bf16 -------------------------------------------------------------------------------------------------------

// Weights of any kind that load_part widens to fp32.
template <typename Element>
struct Widened {
    typedef float Input;
    typedef Element Weight;
    typedef Part Elements;
    static const long STEP = LANES;
    template <typename T>
    static INLINE Elements load(const T *p) {
        return load_part(p);
    }
    template <typename T>
    static INLINE Elements load(const T *p, long n) {
        return load_part(p, n);
    }
    static INLINE Part multiply_add(Part x, Part w, Part s) { return ::multiply_add(x, w, s); }
};

// R rows of x, `stride` apart, against TILE rows of W, P registers of the 16 lanes at once, from input `from` to `to`, onto
// the sums.
template <typename F, long R, long P>
INLINE void accumulate(const typename F::Input *x, long stride, const typename F::Weight *const *w, long from, long to,
                       Part (*sums)[TILE][PARTS]) {
    for (long part = 0; part < PARTS; part += P) {
        Part s[R][TILE][P];
        for (long r = 0; r < R; r++)
            for (long j = 0; j < TILE; j++)
                for (long k = 0; k < P; k++) s[r][j][k] = sums[r][j][part + k];
        long i = from;
        for (; i + F::STEP <= to; i += F::STEP) {
#pragma GCC unroll 4
            for (long k = 0; k < P; k++) {
                const long at = i + (part + k) * PART;
                typename F::Elements u[R];
#pragma GCC unroll 4
                for (long r = 0; r < R; r++) u[r] = F::load(x + r * stride + at);
#pragma GCC unroll 4
                for (long j = 0; j < TILE; j++) {
                    typename F::Elements v = F::load(w[j] + at);
#pragma GCC unroll 4
                    for (long r = 0; r < R; r++) s[r][j][k] = F::multiply_add(u[r], v, s[r][j][k]);
                }
            }
        }
        if (i < to)
            for (long r = 0; r < R; r++)
                for (long j = 0; j < TILE; j++)
                    for (long k = 0; k < P; k++) {
                        const long at = i + (part + k) * PART;
                        typename F::Elements u = F::load(x + r * stride + at, to - at);
                        s[r][j][k] = F::multiply_add(u, F::load(w[j] + at, to - at), s[r][j][k]);
                    }
        for (long r = 0; r < R; r++)
            for (long j = 0; j < TILE; j++)
                for (long k = 0; k < P; k++) sums[r][j][part + k] = s[r][j][k];
    }
}

// One row of x against TILE rows of W, one after the other: memory is read in one stream, which is the fastest.
template <typename F>
INLINE void accumulate_row(const typename F::Input *x, const typename F::Weight *const *w, long from, long to,
                           Part (*sums)[PARTS]) {
    const long ahead = FETCH_AHEAD / (long)sizeof(typename F::Weight);
    for (long j = 0; j < TILE; j++) {
        Part s[PARTS];
        EACH_PART s[k] = sums[j][k];
        long i = from;
        for (; i + F::STEP <= to; i += F::STEP) {
            __builtin_prefetch(w[j] + i + ahead);
            EACH_PART s[k] = F::multiply_add(F::load(x + i + k * PART), F::load(w[j] + i + k * PART), s[k]);
        }
        if (i < to)
            EACH_PART {
                const long at = i + k * PART;
                s[k] = F::multiply_add(F::load(x + at, to - at), F::load(w[j] + at, to - at), s[k]);
            }
        EACH_PART sums[j][k] = s[k];
    }
}

// The same for any number of rows, R and then fewer at once, each of which fetches its part of `next`.
template <typename F, long R>
INLINE void accumulate_rows(const typename F::Input *x, long stride, const typename F::Weight *const *w, long from, long to,
                            Next next, long rows, Part (*sums)[TILE][PARTS]) {
    long b = 0;
    for (; b + R <= rows; b += R) {
        next.fetch(R);
        accumulate<F, R, R == 1 ? PARTS : 1>(x + b * stride, stride, w, from, to, sums + b);
    }
    if constexpr (R > 1)
        if (b < rows) accumulate_rows<F, R / 2>(x + b * stride, stride, w, from, to, next, rows - b, sums + b);
}

// Rows of x, at most ROWS_AT_ONCE, as rows `first_row` … of the output.
template <typename F>
void float_product(const Team &team, const Linear &l, const typename F::Input *x, long first_row, long rows,
                   const Output &out) {
    const typename F::Weight *W = (const typename F::Weight *)l.weight;
    const long I = l.I, O = l.O, chunk = rows < FLOAT_ROWS ? round_up(I, LANES) : FLOAT_CHUNK;
    const Range share = blocks_of(team, O);
    for (long o = share.from * LANES; o < share.to * LANES; o += LANES) {
        float totals[ROWS_AT_ONCE][LANES];
        for (long j = 0; j < LANES; j += TILE) {
            const typename F::Weight *w[TILE];
            for (long t = 0; t < TILE; t++) w[t] = W + (o + j + t < O ? o + j + t : O - 1) * I;
            Part sums[ROWS_AT_ONCE][TILE][PARTS];
            for (long b = 0; b < rows; b++)
                for (long t = 0; t < TILE; t++) EACH_PART sums[b][t][k] = splat_part(0);
            if (o + j < O)
                for (long from = 0; from < I; from += chunk) {
                    const long to = least(from + chunk, I);
                    const Next next(w[0] + TILE * (I + from), TILE * (to - from), rows);
                    if (rows == 1)
                        accumulate_row<F>(x, w, from, to, sums[0]);
                    else
                        accumulate_rows<F, FLOAT_ROWS>(x, I, w, from, to, next, rows, sums);
                }
            for (long b = 0; b < rows; b++) store_totals(totals[b] + j, sums[b]);
        }
        const Vector bias = l.bias ? load(l.bias + o, O - o) : zeros();
        for (long b = 0; b < rows; b++) write(out, first_row + b, o, O - o, add(load(totals[b], LANES), bias));
    }
}

// int8 and int4 -------------------------------------------------------------------------------------------------------

// I floats to integers of at most 127; returns the value of one unit of them: not a number if there is one that is not.
// q has room for whole quads.
template <typename F>
float quantize_row(const float *x, typename F::Input *q, long I) {
    Vector peaks = zeros(), poison = zeros();
    for (long i = 0; i < I; i += LANES) {
        Vector v = load(x + i, I - i);
        peaks = larger(peaks, magnitude(v));
        poison = multiply_add(v, zeros(), poison);
    }
    float peak = largest(peaks);
    const Vector factor = splat(peak > 0 ? 127 / peak : 0);
    for (long i = 0; i < I; i += LANES) {
        Vector v = multiply(load(x + i, I - i), factor);
        EACH_PART F::store(q + i + k * PART, v.part[k], I - i - k * PART);
    }
    for (long i = I; i < round_up(I, QUAD); i++) q[i] = 0;
    return peak / 127 + sum(poison);
}

// R rows of x, `stride` apart, against C blocks of W, `column` bytes apart.
template <long R, long C>
struct Int8Sums {
    static INLINE void compute(const Int8::Input *rows, long stride, const int8_t *w, long column, bool fetch,
                               Ints (*totals)[C]) {
        Int8::Sums s[R][C] = {};
        for (long i = 0; i < stride; i += QUAD) {
#pragma GCC unroll 4
            for (long c = 0; c < C; c++) {
                const int8_t *p = w + c * column + i / QUAD * QUAD_BYTES;
                if (fetch) __builtin_prefetch(p + (R == 1 ? FETCH_AHEAD : C * column));
                const Int8::Weights v = Int8::weights(p);
#pragma GCC unroll 8
                for (long r = 0; r < R; r++) s[r][c] = Int8::dot(Int8::input(rows + r * stride + i), v, s[r][c]);
            }
        }
        for (long r = 0; r < R; r++)
            for (long c = 0; c < C; c++) Int8::total(s[r][c], totals[r][c].part);
    }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
// Two rows of x at once, against 8 inputs of W.
template <>
struct Int8Sums<2, 1> {
    static INLINE void compute(const Int8::Input *rows, long stride, const int8_t *w, long, bool fetch, Ints (*totals)[1]) {
        int32x4_t s[8] = {};
        for (long i = 0; i < stride; i += 2 * QUAD) {
            const int8_t *p = w + i / QUAD * QUAD_BYTES;
            if (fetch) __builtin_prefetch(p + FETCH_AHEAD);
            multiply_pairs(rows + i, rows + stride + i, p, i + QUAD < stride, s);
        }
        totals_of_pairs(s, totals[0][0].part, totals[1][0].part);
    }
};
#endif

struct Int8Product {
    const Linear &l;
    const Int8::Input *x;
    const float *units;
    const Output &out;
    static const long ROWS = Int8::ROWS, COLUMNS = Int8::COLUMNS;

    // Rows b … of x against the 16 · C outputs from block on.
    template <long R, long C>
    INLINE void tile(long b, long block, bool fetch) const {
        const long stride = round_up(l.I, QUAD), column = stride / QUAD * QUAD_BYTES;
        const int8_t *w = (const int8_t *)l.weight + block * column;
        const Int8::Input *rows = x + b * stride;
        Ints totals[R][C];
        Int8Sums<R, C>::compute(rows, stride, w, column, fetch, totals);
#pragma GCC unroll 4
        for (long c = 0; c < C; c++) {
            const long o = (block + c) * LANES, n = l.O - o;
            const Vector scale = load((const float *)l.scale + o, n), bias = l.bias ? load(l.bias + o, n) : zeros();
            const Ints offset = Int8::IS_MOVED ? load_ints(l.offset + o, n) : splat_ints(0);
#pragma GCC unroll 8
            for (long r = 0; r < R; r++) {
                Ints total = totals[r][c];
                Vector v = to_floats(Int8::IS_MOVED ? subtract(total, offset) : total);
                write(out, b + r, o, n, multiply_add(v, multiply(scale, splat(units[b + r])), bias));
            }
        }
    }
};

struct Int4Product {
    const Linear &l;
    const Int4::Input *x;
    const float *units;
    const int32_t *corrections;  // (B, groups): -8 times the sum of a row's integers in a group
    const Output &out;
    static const long ROWS = Int4::ROWS, COLUMNS = Int4::COLUMNS;

    template <long R, long C>
    INLINE void tile(long b, long block, bool fetch) const {
        const long I = l.I, groups = I / GROUP, column = groups * GROUP_BYTES;
        const uint8_t *w = (const uint8_t *)l.weight + block * column;
        const uint16_t *scale = (const uint16_t *)l.scale + block * groups * LANES;
        const Int4::Input *rows = x + b * I;
        Vector total[R][C];
        for (long r = 0; r < R; r++)
            for (long c = 0; c < C; c++) total[r][c] = zeros();
        for (long g = 0; g < groups; g++) {
            Int4::Sums s[R][C] = {};
#pragma GCC unroll 4
            for (long n = 0; n < GROUP / QUAD / 2; n++) {
#pragma GCC unroll 4
                for (long c = 0; c < C; c++) {
                    const uint8_t *p = w + c * column + g * GROUP_BYTES + n * QUAD_BYTES;
                    if (fetch) __builtin_prefetch(p + (R == 1 ? FETCH_AHEAD : C * column));
                    Int4::Weights low = Int4::low(p), high = Int4::high(p);
#pragma GCC unroll 8
                    for (long r = 0; r < R; r++) {
                        const Int4::Input *q = rows + r * I + g * GROUP + n * QUAD;
                        s[r][c] = Int4::dot(Int4::input(q), low, s[r][c]);
                        s[r][c] = Int4::dot(Int4::input(q + GROUP / 2), high, s[r][c]);
                    }
                }
            }
#pragma GCC unroll 4
            for (long c = 0; c < C; c++) {
                const Vector unit = load_halfs(scale + (c * groups + g) * LANES);
#pragma GCC unroll 8
                for (long r = 0; r < R; r++) {
                    Ints sums;
                    Int4::total(s[r][c], sums.part);
                    sums = add(sums, splat_ints(corrections[(b + r) * groups + g]));
                    total[r][c] = multiply_add(to_floats(sums), unit, total[r][c]);
                }
            }
        }
#pragma GCC unroll 4
        for (long c = 0; c < C; c++) {
            const long o = (block + c) * LANES, n = l.O - o;
            const Vector bias = l.bias ? load(l.bias + o, n) : zeros();
#pragma GCC unroll 8
            for (long r = 0; r < R; r++) write(out, b + r, o, n, multiply_add(total[r][c], splat(units[b + r]), bias));
        }
    }
};

// The rows from b to `end`, R and then fewer at once.
template <long R, long C, typename Product>
INLINE void tiles(const Product &product, long b, long end, long block, bool fetch) {
    for (; b + R <= end; b += R, fetch = false) product.template tile<R, C>(b, block, fetch);
    if constexpr (R > 1)
        if (b < end) tiles<R / 2, C>(product, b, end, block, fetch);
}

template <typename Product>
void integer_product(const Team &team, const Product &product, long B) {
    const Range share = blocks_of(team, product.l.O);
    for (long from = 0; from < B; from += ROWS_AT_ONCE) {
        const long end = least(from + ROWS_AT_ONCE, B);
        long block = share.from;
        for (; block + Product::COLUMNS <= share.to; block += Product::COLUMNS)
            tiles<Product::ROWS, Product::COLUMNS>(product, from, end, block, true);
        for (; block < share.to; block++) tiles<Product::ROWS, 1>(product, from, end, block, true);
    }
}

// A linear layer of any format ----------------------------------------------------------------------------------------

// The parts of a linear layer's scratch, as offsets in bytes: what x (B, I) is turned into.
struct LinearScratch {
    long corrections, rows, bytes;
    LinearScratch(const Linear &l, long B) {
        const bool is_int8 = l.format == INT8, is_int4 = l.format == INT4;
        corrections = is_int8 || is_int4 ? B * (long)sizeof(float) : 0;  // after the units
        rows = corrections + (is_int4 ? B * (l.I / GROUP) * (long)sizeof(int32_t) : 0);
        bytes = rows;
        if (is_int8) bytes += B * round_up(l.I, QUAD) * (long)sizeof(Int8::Input);
        if (is_int4) bytes += B * l.I * (long)sizeof(Int4::Input);
        if (l.format == BF16 && sizeof(Bf16Format::Input) == sizeof(Bf16)) bytes += B * l.I * (long)sizeof(Bf16);
    }
};

void int8_linear(const Team &team, const Linear &l, const float *x, float *units, void *rows, long B, const Output &out) {
    Int8::Input *q = (Int8::Input *)rows;
    const long stride = round_up(l.I, QUAD);
    team.each(B, [&](long b) { units[b] = quantize_row<Int8>(x + b * l.I, q + b * stride, l.I); });
    integer_product(team, Int8Product{l, q, units, out}, B);
}

void int4_linear(const Team &team, const Linear &l, const float *x, float *units, int32_t *corrections, void *rows, long B,
                 const Output &out) {
    Int4::Input *q = (Int4::Input *)rows;
    const long groups = l.I / GROUP;
    team.each(B, [&](long b) {
        units[b] = quantize_row<Int4>(x + b * l.I, q + b * l.I, l.I);
        for (long g = 0; g < groups; g++) {
            int32_t total = 0;
            for (long i = 0; i < GROUP; i++) total += q[b * l.I + g * GROUP + i];
            corrections[b * groups + g] = -8 * total;
        }
    });
    integer_product(team, Int4Product{l, q, units, corrections, out}, B);
}

template <typename F>
void float_linear(const Team &team, const Linear &l, const typename F::Input *x, long B, const Output &out) {
    for (long b = 0; b < B; b += ROWS_AT_ONCE)
        float_product<F>(team, l, x + b * l.I, b, least(B - b, ROWS_AT_ONCE), out);
}

// Overloads, of which the one that a level needs is used: its products of bf16 take rows in fp32, or rounded to bf16.
INLINE const float *as_inputs(const Team &, const float *x, float *, long, long) { return x; }
INLINE const Bf16 *as_inputs(const Team &team, const float *x, Bf16 *rows, long B, long I) {
    team.each(B, [&](long b) { write_bf16(rows + b * I, x + b * I, I); });
    return rows;
}

// x (B, I) times W, with the bias. scratch: linear_scratch_bytes.
void linear(const Team &team, const Linear &l, const float *x, uint8_t *scratch, long B, const Output &out) {
    const LinearScratch parts(l, B);
    float *units = (float *)scratch;
    if (l.format == INT8)
        int8_linear(team, l, x, units, scratch + parts.rows, B, out);
    else if (l.format == INT4)
        int4_linear(team, l, x, units, (int32_t *)(scratch + parts.corrections), scratch + parts.rows, B, out);
    else if (l.format == BF16)
        float_linear<Bf16Format>(team, l, as_inputs(team, x, (Bf16Format::Input *)scratch, B, l.I), B, out);
    else
        float_linear<Widened<float>>(team, l, x, B, out);
    team.wait();
}

}  // namespace
