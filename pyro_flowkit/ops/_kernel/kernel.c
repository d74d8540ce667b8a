/* The instances of the kernel, see instance.h. */
#include "kernel.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* rows whose log-dets are summed, and which stay in the cache, at a time */
#define BLOCK_ROWS 96

#if (defined(__GNUC__) || defined(__clang__)) && !defined(PYRO_FLOWKIT_SCALAR)
#define HAS_VECTORS 1
#else
#define HAS_VECTORS 0
#endif
#if HAS_VECTORS && defined(__x86_64__)
#define HAS_X86_VECTORS 1
#include <immintrin.h>
#else
#define HAS_X86_VECTORS 0
#endif


#if HAS_X86_VECTORS && defined(__clang__)
#define BEGIN_TARGET(features) _Pragma(TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#elif HAS_X86_VECTORS
#define BEGIN_TARGET(features) _Pragma("GCC push_options") _Pragma(TEXT(GCC target(features)))
#define END_TARGET _Pragma("GCC pop_options")
#endif
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#elif HAS_VECTORS
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (mask){__VA_ARGS__})
#endif
#if defined(__clang__)
#define UNROLL _Pragma("unroll 2")
#elif HAS_VECTORS
#define UNROLL _Pragma("GCC unroll 2")
#else
#define UNROLL
#endif
#define OFFSET(pointer, n) ((pointer) ? (pointer) + (n) : NULL)
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)
#define TEXT(...) #__VA_ARGS__
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

enum { WIDTHS, HEIGHTS };
/* what to do with a finished sum of a matrix product */
enum { ADD_SUM, SET_SUM, SET_WHERE_POSITIVE, ADD_BIAS, ADD_BIAS_RELU };
/* rows of the table of a spline whose parameters are shared */
enum { KNOT_X, KNOT_Y, REST_X, REST_Y, WIDTH, HEIGHT, SLOPE, TABLE_ROWS };
/* derivatives with respect to a bin, summed over the inputs that fell into it; in double whatever REAL is */
enum { SUM_X0, SUM_X1, SUM_WIDTH, SUM_Y0, SUM_Y1, SUM_HEIGHT, SUM_SLOPE0, SUM_SLOPE1, SUMS };

#define SUFFIX _float_portable
#define IS_DOUBLE 0
#define VECTOR_BYTES (16 * HAS_VECTORS)
#define HAS_AVX2 0
#include "instance.h"

#define SUFFIX _double_portable
#define IS_DOUBLE 1
#define VECTOR_BYTES (16 * HAS_VECTORS)
#define HAS_AVX2 0
#include "instance.h"

#if HAS_X86_VECTORS
BEGIN_TARGET("avx2,fma")
#define SUFFIX _float_avx2
#define IS_DOUBLE 0
#define VECTOR_BYTES 32
#define HAS_AVX2 1
#include "instance.h"

#define SUFFIX _double_avx2
#define IS_DOUBLE 1
#define VECTOR_BYTES 32
#define HAS_AVX2 1
#include "instance.h"
END_TARGET
#endif

#define OF_TYPE(type, suffix)                                                                                        \
    run_chain_##type##_##suffix, push_chain_##type##_##suffix, run_chain_backward_##type##_##suffix,                  \
    pull_chain_##type##_##suffix, pull_chain_backward_##type##_##suffix,                                              \
    couple_##type##_##suffix, couple_backward_##type##_##suffix, run_##type##_##suffix, run_backward_##type##_##suffix
#define INSTANCE(suffix) {#suffix, OF_TYPE(float, suffix), OF_TYPE(double, suffix)}

static const instance instances[] = {
    INSTANCE(portable),
#if HAS_X86_VECTORS
    INSTANCE(avx2),
#endif
};

const instance *kernel_instances(int *count) {
    *count = 1;
#if HAS_X86_VECTORS
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) *count = 2;
#endif
    return instances;
}

int64_t kernel_kept_per_row(const perceptron *q) {
    int64_t sum = 0;
    for (int i = 0; i <= q->num_layers; i++) sum += ((int64_t)q->sizes[i] + MAX_LANES - 1) / MAX_LANES * MAX_LANES;
    return sum;
}

int64_t kernel_kept_of_layer(const layer *l, int64_t rows) {
    int64_t sum = l->kind == COUPLING ? kernel_kept_per_row(&l->network) : 0;
    for (int i = 0; l->kind == HIERARCHY && i < l->num_blocks; i++)
        sum += kernel_kept_per_row(&l->blocks[i].network) + 2 * l->blocks[i].size;
    return sum * rows;
}

int64_t kernel_kept_of_chain(const chain *c) {
    int64_t sum = (c->num_layers + 1) * c->rows * c->dim + 16; /* whole vectors are read at the end of a row */
    for (int i = 0; i < c->num_layers; i++) sum += kernel_kept_of_layer(&c->layers[i], c->rows);
    return sum;
}
