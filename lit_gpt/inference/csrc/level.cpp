// One level: the loops, compiled for one instruction set. The same file is compiled once for each level.
//
//   g++ -mavx2 -mfma -mf16c -DLEVEL=level_avx2 -DPRIMITIVES='"primitives_avx2.h"' -c level.cpp
//
// Everything but the table of its functions has no name outside of this translation unit, and nothing comes from the C++
// library: a function that two levels shared could be the one with the instructions that this CPU lacks.
//
// Products and sums are joined into one rounding only where `multiply_add` says so (-ffp-contract=off), and a sum has the
// same order at each level, so that what is computed in fp32 and int8 is the same at all of them to the last bit.

#include "abi.h"

#include PRIMITIVES

#include "threads.h"

#include "vector.h"

#include "elementwise.h"

#include "products.h"

#include "attention.h"

#include "decode.h"

extern const Level LEVEL;
const Level LEVEL = {linear_scratch_bytes, decode_scratch_bytes, linear_forward, decode};
