// Activations, norms, rotation: functions of rows of floats.

#pragma once

namespace {

// eˣ, to 2 units in the last place: x = n · ln 2 + r, and a polynomial for r (the coefficients of Cephes' expf).
INLINE Vector exponential(Vector x) {
    x = smaller(splat(88), larger(splat(-87), x));  // in this order a NaN stays one
    Vector n = round_to_nearest(multiply(x, splat(1.44269504f)));
    Vector r = negate_multiply_add(n, splat(0.693359375f), x);
    r = negate_multiply_add(n, splat(-2.12194440e-4f), r);
    const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    Vector p = splat(1.9875691500e-4f);
    for (float c : coefficients) p = multiply_add(p, r, splat(c));
    p = multiply_add(p, multiply(r, r), add(r, splat(1)));
    return times_power_of_two(p, n);
}

INLINE Vector negative(Vector v) { return subtract(zeros(), v); }

// erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26)
INLINE Vector gelu(Vector x) {
    const Vector one = splat(1);
    const float coefficients[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    Vector z = multiply(magnitude(x), splat(0.7071067812f));
    Vector t = divide(one, multiply_add(splat(0.3275911f), z, one)), p = splat(1.061405429f);
    for (float c : coefficients) p = multiply_add(p, t, splat(c));
    p = multiply(multiply(p, t), exponential(negative(multiply(z, z))));
    Vector erf = flip_sign(subtract(one, p), x);
    return multiply(multiply(splat(0.5f), x), add(one, erf));
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
        Vector v = first(n - i, subtract(load(x + i, n - i), splat(mean)), zeros());
        total = multiply_add(v, v, total);
    }
    return sum(total);
}

// LayerNorm or RMSNorm of n floats.
void normalize(const float *x, const float *weight, const float *bias, float *y, long n, bool rmsnorm, float eps) {
    float mean = 0;
    if (!rmsnorm) {
        Vector total = zeros();
        for (long i = 0; i < n; i += LANES) total = add(total, load(x + i, n - i));
        mean = sum(total) / n;
    }
    const Vector factor = splat(1 / sqrtf(sum_of_squares(x, mean, n) / n + eps)), center = splat(mean);
    for (long i = 0; i < n; i += LANES) {
        Vector v = multiply(subtract(load(x + i, n - i), center), factor);
        store(y + i, multiply_add(v, load(weight + i, n - i), bias ? load(bias + i, n - i) : zeros()), n - i);
    }
}

// Dimension d goes with d + D / 2. rotation: D / 2 cosines, D / 2 sines.
void rotate(float *x, const float *rotation, long D) {
    for (long d = 0; d < D / 2; d++) {
        float a = x[d], b = x[d + D / 2], cosine = rotation[d], sine = rotation[d + D / 2];
        x[d] = __builtin_fmaf(a, cosine, -(b * sine));
        x[d + D / 2] = __builtin_fmaf(b, cosine, a * sine);
    }
}

INLINE void write_bf16(Bf16 *p, const float *x, long n) {
    for (long i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        p[i] = x[i] == x[i] ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;  // to the nearest, ties to even
    }
}

}  // namespace
