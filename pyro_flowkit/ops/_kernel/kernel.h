/* The fused spline kernel: raw parameters in, values and log-derivatives out, and the derivatives of both.
 *
 * Plain C, without PyTorch's headers: it gets addresses of contiguous tensors.
 */
#ifndef PYRO_FLOWKIT_KERNEL_H
#define PYRO_FLOWKIT_KERNEL_H

#include <stdint.h>

enum { LINEAR, CIRCULAR, NO_TAILS };

/* Inputs of shape (rows, dim). The columns in own have spline parameters for every row, those in shared have one row
 * of parameters for all; others pass. */
typedef struct {
    int64_t rows, dim, num_own, num_shared;
    const int32_t *own, *shared;
    int count_bins, num_params, tails, inverse, sum_ladj;
    double bound, min_bin_width, min_bin_height, min_slope;
} problem;

/* A multilayer perceptron with ReLU that makes the own parameters from columns first to first + num_passed of the
 * inputs, clamped to +-limit, and a context. */
enum { MAX_LAYERS = 8, MAX_LANES = 8 }; /* no instance has wider vectors, see instance.h */
typedef struct {
    int num_layers;
    int32_t sizes[MAX_LAYERS + 1]; /* inputs, hidden layers, outputs */
    int64_t first, num_passed, context_dim;
    double limit;
} perceptron;

/* A chain: layers one after the other, from (rows, dim) to (rows, dim). What a layer's tensors are is said where it is
 * computed: in linear.h, in hierarchy.h, and for a COUPLING here: the layers of its perceptron, weight and bias after
 * one another, and the shared parameters. They are what grads are with respect to, which may be NULL for those that
 * are not learned. */
enum { COUPLING, LU, PERMUTATION, DIAGONAL, TRIANGLE, HIERARCHY, LAYER_KINDS };
enum { MAX_BLOCKS = 8, MAX_TENSORS = 3 * MAX_BLOCKS, MAX_CHAIN = 64 };
typedef struct {
    int64_t start, size; /* columns before it, and its own */
    double of_network, of_line;
    perceptron network;
} block;
typedef struct {
    int kind, num_tensors, num_blocks;
    problem splines;
    perceptron network;
    const int32_t *order;
    double rate, matrix_rate;
    block blocks[MAX_BLOCKS];
    const void *tensors[MAX_TENSORS];
    void *grads[MAX_TENSORS];
} layer;
typedef struct {
    int64_t rows, dim;
    int num_layers;
    const layer *layers;
} chain;

/* The functions for one instruction set. They return 0, or -1 where memory is short.
 *
 * run: inputs (rows, dim), own parameters (rows, num_own, num_params), shared ones (num_shared, num_params); writes
 * values (rows, dim) and log-derivatives, (rows,) with sum_ladj and (rows, dim) without.
 * run_backward: the same inputs, then the derivatives with respect to values and log-derivatives (NULL stands for
 * zeros); writes those with respect to inputs, own and shared parameters.
 * couple, couple_backward: the same where a perceptron makes the own parameters. kept, which may be NULL in couple, has
 * room for rows * kernel_kept_per_row numbers; derivatives of weights and biases come one layer after the other.
 * run_chain, push_chain, run_chain_backward, pull_chain, pull_chain_backward: see chain.h; kept has room for
 * kernel_kept_of_chain numbers. The last two know no HIERARCHY.
 */
typedef struct {
    const char *name;
    int (*float_run_chain)(const chain *, const float *, float *, float *, float *);
    int (*float_push_chain)(const chain *, const float *, float *, int, float *, float *, float *);
    int (*float_run_chain_backward)(const chain *, float *, const float *, const float *, float *, const float *, const float *, int,
                                    float *);
    int (*float_pull_chain)(const chain *, const float *, float *, float *, float *);
    int (*float_pull_chain_backward)(const chain *, float *, const float *, const float *, float *);
    int (*float_couple)(const problem *, const perceptron *, const float *, const float *, const float *, const float *const *,
                        const float *const *, float *, float *, float *);
    int (*float_couple_backward)(const problem *, const perceptron *, const float *, const float *, const float *const *,
                                 const float *, const float *, const float *, float *, float *, float *, float *);
    int (*float_run)(const problem *, const float *, const float *, const float *, float *, float *);
    int (*float_run_backward)(const problem *, const float *, const float *, const float *, const float *,
                              const float *, float *, float *, float *);
    int (*double_run_chain)(const chain *, const double *, double *, double *, double *);
    int (*double_push_chain)(const chain *, const double *, double *, int, double *, double *, double *);
    int (*double_run_chain_backward)(const chain *, double *, const double *, const double *, double *, const double *, const double *, int,
                                     double *);
    int (*double_pull_chain)(const chain *, const double *, double *, double *, double *);
    int (*double_pull_chain_backward)(const chain *, double *, const double *, const double *, double *);
    int (*double_couple)(const problem *, const perceptron *, const double *, const double *, const double *, const double *const *,
                        const double *const *, double *, double *, double *);
    int (*double_couple_backward)(const problem *, const perceptron *, const double *, const double *, const double *const *,
                                 const double *, const double *, const double *, double *, double *, double *, double *);
    int (*double_run)(const problem *, const double *, const double *, const double *, double *, double *);
    int (*double_run_backward)(const problem *, const double *, const double *, const double *, const double *,
                               const double *, double *, double *, double *);
} instance;

/* The instances that this processor runs, the best last, and how many there are. */
const instance *kernel_instances(int *count);

/* Numbers to keep of a row for couple_backward, at most. */
int64_t kernel_kept_per_row(const perceptron *);

/* Numbers that a layer keeps of these rows, and those of a chain with what lies between its layers. */
int64_t kernel_kept_of_layer(const layer *, int64_t rows);
int64_t kernel_kept_of_chain(const chain *);

#endif
