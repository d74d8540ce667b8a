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
enum { MAX_LAYERS = 8 };
typedef struct {
    int num_layers;
    int32_t sizes[MAX_LAYERS + 1]; /* inputs, hidden layers, outputs */
    int64_t first, num_passed, context_dim;
    double limit;
} perceptron;

/* The functions for one instruction set. They return 0, or -1 where memory is short.
 *
 * run: inputs (rows, dim), own parameters (rows, num_own, num_params), shared ones (num_shared, num_params); writes
 * values (rows, dim) and log-derivatives, (rows,) with sum_ladj and (rows, dim) without.
 * run_backward: the same inputs, then the derivatives with respect to values and log-derivatives (NULL stands for
 * zeros); writes those with respect to inputs, own and shared parameters.
 * couple, couple_backward: the same where a perceptron makes the own parameters. kept, which may be NULL in couple, has
 * room for rows * kernel_kept_per_row numbers; derivatives of weights and biases come one layer after the other.
 */
typedef struct {
    const char *name;
    int (*float_couple)(const problem *, const perceptron *, const float *, const float *, const float *, const float *const *,
                        const float *const *, float *, float *, float *);
    int (*float_couple_backward)(const problem *, const perceptron *, const float *, const float *, const float *const *,
                                 const float *, const float *, const float *, float *, float *, float *, float *);
    int (*float_run)(const problem *, const float *, const float *, const float *, float *, float *);
    int (*float_run_backward)(const problem *, const float *, const float *, const float *, const float *,
                              const float *, float *, float *, float *);
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

#endif
