// The binary interface with native.py: structs, the numbers of formats and activations, and the functions of a level.
//
// native.py has the same structs and the same version, and compares them with what dispatch.cpp exports when it loads.
// Axes: see products.h.

#pragma once

#include <stddef.h>
#include <stdint.h>

const int ABI_VERSION = 5;  // to be raised with any change of an exported function or of what a field means

// How a weight (O, I) is stored:
//   FP32, BF16  (O, I)
//   INT8        (blocks of 16 outputs, quads of 4 inputs, 16, 4) bytes with a sign, zeros beyond O and I; the magnitudes of
//               inputs 2i and 2i + 1 have a sum of at most 128. scale (O) floats: the value of one unit in each row; offset
//               (O): 128 times the sum of a row
//   INT4        (blocks, groups of 32 inputs, 4, 16, 4) bytes: below the 4 bits of quad n of the group, above those of quad
//               n + 4, each 8 more than the weight in units of its group. scale (blocks, groups, 16) in fp16: those units
enum Format { FP32, BF16, INT8, INT4, N_FORMATS };
const char *const FORMATS[N_FORMATS] = {"fp32", "bf16", "int8", "int4"};

enum Activation { GELU, GELU_TANH, RELU, RELU2, SWIGLU, N_ACTIVATIONS };
const char *const ACTIVATIONS[N_ACTIVATIONS] = {"gelu", "gelu_tanh", "relu", "relu2", "swiglu"};

// scale and offset are null where the format has none. bias (O) may be null.
struct Linear {
    const void *weight, *scale;
    const int32_t *offset;
    const float *bias;
    long I, O, format;
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

    long start(long layer, long slot, long head) const {
        return layer * layer_stride + slot * slot_stride + head * head_stride;
    }
};

// Functions of the OpenMP that PyTorch has loaded: see threads.h. All null where there is none.
struct OpenMP {
    void (*parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags);  // GOMP_parallel
    void (*barrier)();                                                                        // GOMP_barrier
    int (*thread_num)(), (*num_threads)();  // omp_get_thread_num, omp_get_num_threads
};
extern OpenMP openmp;

// The functions of one level: the loops, compiled for one instruction set. See level.cpp.
struct Level {
    long (*linear_scratch_bytes)(const Linear *l, long B);
    long (*decode_scratch_bytes)(const Stack *stack, const long *lengths, long B, long T, int threads);
    void (*linear_forward)(const Linear *l, const float *x, float *y, uint8_t *scratch, long B, int threads);
    void (*decode)(const Stack *stack, const CacheLayout *cache, float *x, const long *slots, const long *lengths,
                   uint8_t *scratch, long B, long T, int threads);
};
