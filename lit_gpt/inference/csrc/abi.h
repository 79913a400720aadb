// The binary interface with native.py: structs, their sizes, and the names of the activations.
//
// native.py has the same structs and the same number, and compares them with what this file exports when it loads.
// Axes: see kernels.cpp.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

const int ABI_VERSION = 1;  // to be raised with any change of an exported function or of what a field means

// weight (O, I) in int8 has scale (O), the value of one unit in each row, and offset (O), 128 times the row's sum; in
// fp32 these are null. bias (O) may be null.
struct Linear {
    const void *weight;
    const float *scale;
    const int32_t *offset;
    const float *bias;
    long I, O;
};

struct BlockLayout {
    const float *ln_1, *ln_1_bias, *ln_2, *ln_2_bias;  // (C), biases may be null
    const float *q_norm, *k_norm;                      // (D) or null
    Linear c_attn, attn_c_proj, c_fc, c_gate, mlp_c_proj;  // c_gate.weight may be null
};

struct Stack {
    const BlockLayout *blocks;
    const float *rotation;  // (positions, 2, D / 2): cosines and sines; or null
    long n_layer, C, H, K, D, F, activation, rmsnorm;
    float eps;
};

// Keys and values: the strides of layers, slots and heads in elements; those (S, D) of one head are contiguous.
struct CacheLayout {
    void *keys, *values;
    long layer_stride, slot_stride, head_stride;
    long bf16;  // or fp32
};

enum Activation { GELU, GELU_TANH, RELU, RELU2, SWIGLU, N_ACTIVATIONS };
const char *const ACTIVATIONS[N_ACTIVATIONS] = {"gelu", "gelu_tanh", "relu", "relu2", "swiglu"};

extern "C" int abi_version() { return ABI_VERSION; }

// The index of an activation in Stack, or -1 for one that there is not.
extern "C" long activation_index(const char *name) {
    for (long i = 0; i < N_ACTIVATIONS; i++)
        if (!strcmp(name, ACTIVATIONS[i])) return i;
    return -1;
}

// The size of a struct ("Linear") or the offset of a field ("Linear.bias") in bytes; -1 for one that there is not.
extern "C" long layout_bytes(const char *name) {
#define SIZE(type) {#type, sizeof(type)}
#define FIELD(type, field) {#type "." #field, offsetof(type, field)}
    static const struct {
        const char *name;
        long bytes;
    } layout[] = {
        SIZE(Linear), FIELD(Linear, weight), FIELD(Linear, scale), FIELD(Linear, offset), FIELD(Linear, bias),
        FIELD(Linear, I), FIELD(Linear, O),
        SIZE(BlockLayout), FIELD(BlockLayout, ln_1), FIELD(BlockLayout, ln_1_bias), FIELD(BlockLayout, ln_2), FIELD(BlockLayout, ln_2_bias),
        FIELD(BlockLayout, q_norm), FIELD(BlockLayout, k_norm), FIELD(BlockLayout, c_attn), FIELD(BlockLayout, attn_c_proj),
        FIELD(BlockLayout, c_fc), FIELD(BlockLayout, c_gate), FIELD(BlockLayout, mlp_c_proj),
        SIZE(Stack), FIELD(Stack, blocks), FIELD(Stack, rotation), FIELD(Stack, n_layer), FIELD(Stack, C),
        FIELD(Stack, H), FIELD(Stack, K), FIELD(Stack, D), FIELD(Stack, F), FIELD(Stack, activation),
        FIELD(Stack, rmsnorm), FIELD(Stack, eps),
        SIZE(CacheLayout), FIELD(CacheLayout, keys), FIELD(CacheLayout, values), FIELD(CacheLayout, layer_stride),
        FIELD(CacheLayout, slot_stride), FIELD(CacheLayout, head_stride), FIELD(CacheLayout, bf16),
    };
#undef SIZE
#undef FIELD
    for (const auto &entry : layout)
        if (!strcmp(name, entry.name)) return entry.bytes;
    return -1;
}
