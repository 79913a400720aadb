// A Vector: 16 floats whatever the width of a register, in PARTS registers of PART floats.
//
// A count n of floats may be of any size: those from n on are not read or written, and are zeros.

#pragma once

namespace {

const long LANES = 16;  // floats in a Vector
const long PARTS = LANES / PART;

struct Vector {
    Part part[PARTS];
};

struct Ints {  // 16 integers
    IntPart part[PARTS];
};

#define EACH_PART _Pragma("GCC unroll 4") for (long k = 0; k < PARTS; k++)
#define OF_ONE(name)                                        \
    INLINE Vector name(Vector a) {                          \
        Vector v;                                           \
        EACH_PART v.part[k] = name(a.part[k]);              \
        return v;                                           \
    }
#define OF_TWO(name)                                        \
    INLINE Vector name(Vector a, Vector b) {                \
        Vector v;                                           \
        EACH_PART v.part[k] = name(a.part[k], b.part[k]);   \
        return v;                                           \
    }
#define OF_THREE(name)                                                  \
    INLINE Vector name(Vector a, Vector b, Vector c) {                  \
        Vector v;                                                       \
        EACH_PART v.part[k] = name(a.part[k], b.part[k], c.part[k]);    \
        return v;                                                       \
    }

OF_ONE(magnitude)
OF_ONE(round_to_nearest)
OF_TWO(add)
OF_TWO(subtract)
OF_TWO(multiply)
OF_TWO(divide)
OF_TWO(smaller)              // where one of the two is not a number, b
OF_TWO(larger)               // the same
OF_TWO(times_power_of_two)   // a · 2ᵇ for an integer b in -126 … 127
OF_TWO(flip_sign)            // a with its sign changed where b has one
OF_THREE(multiply_add)         // a · b + c
OF_THREE(negate_multiply_add)  // c - a · b

#undef OF_ONE
#undef OF_TWO
#undef OF_THREE

INLINE Vector splat(float x) {
    Vector v;
    EACH_PART v.part[k] = splat_part(x);
    return v;
}

INLINE Vector zeros() { return splat(0); }

template <typename Element>
INLINE Vector load(const Element *p, long n) {
    Vector v;
    if (n >= LANES) {
        EACH_PART v.part[k] = load_part(p + k * PART);
    } else {
        EACH_PART v.part[k] = load_part(p + k * PART, n - k * PART);
    }
    return v;
}

template <typename Element>
INLINE void store(Element *p, Vector v, long n) {
    if (n >= LANES) {
        EACH_PART store_part(p + k * PART, v.part[k]);
    } else {
        EACH_PART store_part(p + k * PART, v.part[k], n - k * PART);
    }
}

// The first n of v, and those of `other` after them.
INLINE Vector first(long n, Vector v, Vector other) {
    if (n >= LANES) return v;
    EACH_PART v.part[k] = first(n - k * PART, v.part[k], other.part[k]);
    return v;
}

// In this order: 16 → 8 → 4 → 2 → 1, always one half and the other.
INLINE float sum(Vector v) { return sum(v.part); }
INLINE float largest(Vector v) { return largest(v.part); }

INLINE Vector load_halfs(const uint16_t *p) {
    Vector v;
    EACH_PART v.part[k] = load_halfs_part(p + k * PART);
    return v;
}

INLINE Ints load_ints(const int32_t *p, long n) {
    Ints v;
    EACH_PART v.part[k] = load_ints_part(p + k * PART, n - k * PART);
    return v;
}

INLINE Ints splat_ints(int32_t x) {
    Ints v;
    EACH_PART v.part[k] = splat_ints_part(x);
    return v;
}

INLINE Ints add(Ints a, Ints b) {
    EACH_PART a.part[k] = add_ints(a.part[k], b.part[k]);
    return a;
}

INLINE Ints subtract(Ints a, Ints b) {
    EACH_PART a.part[k] = subtract_ints(a.part[k], b.part[k]);
    return a;
}

INLINE Vector to_floats(Ints a) {
    Vector v;
    EACH_PART v.part[k] = to_floats(a.part[k]);
    return v;
}

}  // namespace
