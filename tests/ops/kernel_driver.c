/* Calls every instance of the kernel with memory of exactly the size that it may touch, to be run under AddressSanitizer
 * and UndefinedBehaviorSanitizer; checks that what must be finite is, and that the inverse undoes the forward map.
 *
 * This file includes itself, once for float and once for double.
 */
#ifndef REAL
#include "kernel.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BOUND 3.0
#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define N(name) JOIN(name##_, REAL)
#define F(name) JOIN(REAL, _##name)

static long checks, failures;
static const char *instance_name;

static void check(int holds, const char *what, const problem *p, double got, double want) {
    checks++;
    if (holds) return;
    if (failures++ < 20)
        fprintf(stderr, "%s: %s: got %g, expected %g (rows %d, dim %d, own %d, shared %d, bins %d, tails %d, inverse %d)\n",
                instance_name, what, got, want, (int)p->rows, (int)p->dim, (int)p->num_own, (int)p->num_shared,
                p->count_bins, p->tails, p->inverse);
}

/* between -1 and 1; the same numbers on every machine */
static uint64_t state = 1;
static double noise(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)(state >> 11) / 4503599627370496.0 - 1;
}

/* columns with own parameters, with shared ones, and others */
typedef struct {
    int dim, num_own, num_shared;
    int32_t own[5], shared[5];
} layout;

static const layout layouts[] = {
    {1, 1, 0, {0}, {0}},          {1, 0, 1, {0}, {0}},    {1, 0, 0, {0}, {0}}, {3, 3, 0, {0, 1, 2}, {0}},
    {3, 0, 3, {0}, {0, 1, 2}},    {3, 1, 0, {2}, {0}},    {3, 1, 1, {2}, {0}}, {5, 2, 1, {4, 1}, {3}},
    {3, 0, 2, {0}, {2, 0}},
};
static const layout couplings[] = {
    {5, 3, 0, {0, 3, 4}, {0}},
    {5, 3, 2, {0, 3, 4}, {1, 2}},
};
enum { FIRST_PASSED = 1, NUM_PASSED = 2 }; /* of the couplings */
static const int all_bins[] = {1, 2, 5, 8, 13};
static const int all_rows[] = {0, 1, 7, 129, 300};
static const int networks[][9] = {{1}, {2, 7}, {4, 3, 17, 4}, {8, 5, 5, 5, 5, 5, 5, 5}}; /* layers, hidden widths */

static problem make_problem(const layout *l, int rows, int count_bins, int tails, int inverse) {
    problem p = {rows, l->dim, l->num_own, l->num_shared, l->own, l->shared, count_bins, 0, tails, inverse, 0, BOUND,
                 1e-3, 1e-3, 1e-3};
    p.num_params = 3 * count_bins + (tails == LINEAR ? -1 : tails == CIRCULAR ? 0 : 1);
    return p;
}

/* whether a column has a spline, and so log-derivatives that are not 0 */
static int has_spline(const problem *p, int64_t column) {
    for (int64_t i = 0; i < p->num_own; i++)
        if (p->own[i] == column) return 1;
    for (int64_t i = 0; i < p->num_shared; i++)
        if (p->shared[i] == column) return 1;
    return 0;
}

#define REAL float
#define TOLERANCE 2e-3
#include "kernel_driver.c"
#undef REAL
#undef TOLERANCE

#define REAL double
#define TOLERANCE 1e-9
#include "kernel_driver.c"

int main(void) {
    int count;
    const instance *instances = kernel_instances(&count);
    for (int i = 0; i < count; i++) {
        instance_name = instances[i].name;
        try_all_float(&instances[i]);
        try_all_double(&instances[i]);
    }
    printf("%d instances, %ld checks, %ld failures\n", count, checks, failures);
    return failures != 0;
}

#else

/* exactly as much memory as so many numbers need, filled with NaN */
static REAL *N(take)(int64_t count) {
    REAL *numbers = malloc((size_t)count * sizeof(REAL));
    if (!numbers && count) abort();
    for (int64_t i = 0; i < count; i++) numbers[i] = (REAL)NAN;
    return numbers;
}

static REAL *N(random)(int64_t count, double scale) {
    REAL *numbers = N(take)(count);
    for (int64_t i = 0; i < count; i++) numbers[i] = (REAL)(scale * noise());
    return numbers;
}

/* NULL in one of two cases */
static REAL *N(sometimes)(REAL *numbers, int present) {
    if (present) return numbers;
    free(numbers);
    return NULL;
}

static void N(check_finite)(const REAL *numbers, int64_t count, const char *what, const problem *p) {
    for (int64_t i = 0; numbers && i < count; i++) check(isfinite(numbers[i]), what, p, numbers[i], 0);
}

/* What the splines, one way and back, make of inputs within the box or a little beyond. */
static void N(try_splines)(const instance *k, const layout *l, int rows, int count_bins, int tails, int inverse,
                           int variant) {
    problem p = make_problem(l, rows, count_bins, tails, inverse), back = p;
    back.inverse = !inverse;
    const int64_t size = p.rows * p.dim, own_size = p.rows * p.num_own * p.num_params,
                  shared_size = p.num_shared * p.num_params;
    REAL *x = N(random)(size, tails == NO_TAILS ? BOUND : 1.3 * BOUND);
    REAL *own = p.num_own ? N(random)(own_size, 1.5) : NULL, *shared = p.num_shared ? N(random)(shared_size, 1.5) : NULL;
    REAL *y = N(take)(size), *ladj = N(take)(size), *again = N(take)(size), *back_ladj = N(take)(size);
    check(k->F(run)(&p, x, own, shared, y, ladj) == 0, "run", &p, 0, 0);
    check(k->F(run)(&back, y, own, shared, again, back_ladj) == 0, "run", &back, 0, 0);
    N(check_finite)(y, size, "value", &p);
    for (int64_t i = 0; i < size; i++) {
        check(fabs((double)again[i] - (double)x[i]) <= TOLERANCE, "round trip", &p, again[i], x[i]);
        check(fabs((double)back_ladj[i] + (double)ladj[i]) <= 10 * TOLERANCE, "log-det of the inverse", &p, back_ladj[i],
              -ladj[i]);
        if (!has_spline(&p, i % p.dim)) check(y[i] == x[i] && ladj[i] == 0, "column without a spline", &p, y[i], x[i]);
    }

    p.sum_ladj = variant & 1;
    const int64_t ladj_size = p.sum_ladj ? p.rows : size;
    REAL *sums = N(take)(ladj_size);
    check(k->F(run)(&p, x, own, shared, y, sums) == 0, "run", &p, 0, 0);
    for (int64_t i = 0; i < ladj_size; i++) {
        double sum = p.sum_ladj ? 0 : (double)ladj[i];
        for (int64_t j = 0; p.sum_ladj && j < p.dim; j++) sum += (double)ladj[i * p.dim + j];
        check(fabs((double)sums[i] - sum) <= TOLERANCE, "sum of log-dets", &p, sums[i], sum);
    }
    REAL *grad_y = N(sometimes)(N(random)(size, 1), variant & 2), *grad_ladj = N(sometimes)(N(random)(ladj_size, 1), variant & 4);
    REAL *grad_x = N(take)(size), *grad_own = own ? N(take)(own_size) : NULL, *grad_shared = shared ? N(take)(shared_size) : NULL;
    check(k->F(run_backward)(&p, x, own, shared, grad_y, grad_ladj, grad_x, grad_own, grad_shared) == 0, "run_backward", &p, 0, 0);
    N(check_finite)(grad_x, size, "derivative of an input", &p);
    N(check_finite)(grad_own, own_size, "derivative of own parameters", &p);
    N(check_finite)(grad_shared, shared_size, "derivative of shared parameters", &p);

    /* numbers that are none, here and there; a row of them leaves the others alone */
    const REAL strange[] = {(REAL)NAN, (REAL)INFINITY, (REAL)-INFINITY, (REAL)BOUND, (REAL)-BOUND, (REAL)1e19};
    for (int64_t i = 0; i < size; i += 3) x[i] = strange[i / 3 % COUNT(strange)];
    for (int64_t i = 0; i < own_size; i += 50) own[i] = strange[i / 50 % COUNT(strange)];
    if (shared) shared[shared_size / 2] = strange[variant % COUNT(strange)];
    check(k->F(run)(&p, x, own, shared, y, sums) == 0, "run", &p, 0, 0);
    check(k->F(run_backward)(&p, x, own, shared, grad_y, grad_ladj, grad_x, grad_own, grad_shared) == 0, "run_backward", &p, 0, 0);
    for (int64_t i = 0; i < size; i++)
        if (!has_spline(&p, i % p.dim)) check(!memcmp(&y[i], &x[i], sizeof(REAL)), "column without a spline", &p, y[i], x[i]);
    free(x), free(own), free(shared), free(y), free(ladj), free(again), free(back_ladj), free(sums), free(grad_y);
    free(grad_ladj), free(grad_x), free(grad_own), free(grad_shared);
}

/* A coupling of two columns that pass through and three that do not, one way and back. */
static void N(try_coupling)(const instance *k, const layout *l, int rows, int count_bins, int tails, const int *network,
                            int variant) {
    problem p = make_problem(l, rows, count_bins, tails, l->num_shared ? 0 : variant >> 4 & 1);
    p.sum_ladj = 1;
    perceptron q = {.num_layers = network[0], .first = FIRST_PASSED, .num_passed = NUM_PASSED,
                    .context_dim = variant & 1 ? 3 : 0, .limit = 1e4};
    q.sizes[0] = (int32_t)(q.num_passed + q.context_dim);
    for (int i = 1; i < q.num_layers; i++) q.sizes[i] = network[i];
    q.sizes[q.num_layers] = (int32_t)(p.num_own * p.num_params);
    const REAL *weights[MAX_LAYERS], *biases[MAX_LAYERS];
    int64_t layers_size = 0;
    for (int i = 0; i < q.num_layers; i++) {
        const int64_t weight_size = (int64_t)q.sizes[i] * q.sizes[i + 1];
        weights[i] = N(random)(weight_size, 0.8 / sqrt(q.sizes[i]));
        biases[i] = N(random)(q.sizes[i + 1], 0.3);
        layers_size += weight_size + q.sizes[i + 1];
    }
    const int64_t size = p.rows * p.dim, context_size = p.rows * q.context_dim, shared_size = p.num_shared * p.num_params,
                  kept_size = p.rows * kernel_kept_per_row(&q);
    REAL *x = N(random)(size, BOUND), *context = q.context_dim ? N(random)(context_size, 1) : NULL;
    REAL *shared = p.num_shared ? N(random)(shared_size, 1.5) : NULL;
    REAL *y = N(take)(size), *ladj = N(take)(p.rows), *again = N(take)(size), *back_ladj = N(take)(p.rows);
    REAL *kept = N(take)(kept_size);
    check(k->F(couple)(&p, &q, x, context, shared, weights, biases, again, back_ladj, NULL) == 0, "couple", &p, 0, 0);
    check(k->F(couple)(&p, &q, x, context, shared, weights, biases, y, ladj, kept) == 0, "couple", &p, 0, 0);
    N(check_finite)(y, size, "value", &p);
    N(check_finite)(ladj, p.rows, "log-det", &p);
    check(!memcmp(y, again, (size_t)size * sizeof(REAL)), "value where nothing is kept", &p, 0, 0);
    check(!memcmp(ladj, back_ladj, (size_t)p.rows * sizeof(REAL)), "log-det where nothing is kept", &p, 0, 0);
    if (!shared) {
        problem back = p;
        back.inverse = !p.inverse;
        check(k->F(couple)(&back, &q, y, context, NULL, weights, biases, again, back_ladj, NULL) == 0, "couple", &p, 0, 0);
        for (int64_t i = 0; i < size; i++)
            check(fabs((double)again[i] - (double)x[i]) <= TOLERANCE, "round trip", &p, again[i], x[i]);
        for (int64_t i = 0; i < p.rows; i++)
            check(fabs((double)back_ladj[i] + (double)ladj[i]) <= 10 * TOLERANCE, "log-det of the inverse", &p, back_ladj[i], -ladj[i]);
    }

    REAL *grad_y = N(sometimes)(N(random)(size, 1), variant & 2), *grad_ladj = N(sometimes)(N(random)(p.rows, 1), variant & 4);
    REAL *grad_x = N(take)(size), *grad_context = context ? N(take)(context_size) : NULL;
    REAL *grad_shared = shared ? N(take)(shared_size) : NULL, *grad_layers = N(sometimes)(N(take)(layers_size), variant & 8);
    check(k->F(couple_backward)(&p, &q, x, shared, weights, kept, grad_y, grad_ladj, grad_x, grad_context, grad_shared,
                                grad_layers) == 0, "couple_backward", &p, 0, 0);
    N(check_finite)(grad_x, size, "derivative of an input", &p);
    N(check_finite)(grad_context, context_size, "derivative of the context", &p);
    N(check_finite)(grad_shared, shared_size, "derivative of shared parameters", &p);
    N(check_finite)(grad_layers, layers_size, "derivative of a layer", &p);

    const REAL strange[] = {(REAL)NAN, (REAL)INFINITY, (REAL)-INFINITY, (REAL)2e4, (REAL)-1e4};
    for (int64_t i = 0; i < size; i += 4) x[i] = strange[i / 4 % COUNT(strange)];
    check(k->F(couple)(&p, &q, x, context, shared, weights, biases, y, ladj, kept) == 0, "couple", &p, 0, 0);
    check(k->F(couple_backward)(&p, &q, x, shared, weights, kept, grad_y, grad_ladj, grad_x, grad_context, grad_shared,
                                grad_layers) == 0, "couple_backward", &p, 0, 0);
    for (int i = 0; i < q.num_layers; i++) free((void *)weights[i]), free((void *)biases[i]);
    free(x), free(context), free(shared), free(y), free(ladj), free(again), free(back_ladj), free(kept), free(grad_y);
    free(grad_ladj), free(grad_x), free(grad_context), free(grad_shared), free(grad_layers);
}

/* Units of a scale: a lower triangle with a positive diagonal, or that alone. */
static REAL *N(positive_units)(int64_t dim, int64_t count) {
    REAL *units = N(random)(count, 0.3);
    for (int64_t i = 0; i < dim; i++) {
        const int64_t at = count == dim ? i : i * dim + i;
        units[at] = (REAL)(1 + fabs((double)units[at]));
        for (int64_t j = i + 1; count > dim && j < dim; j++) units[i * dim + j] = 0;
    }
    return units;
}

/* The sizes of the tensors of a layer, and the tensors; derivatives for those that are learned. */
static void N(fill_layer)(layer *l, int64_t dim) {
    int64_t sizes[MAX_TENSORS] = {0};
    const int is_scale = l->kind == DIAGONAL || l->kind == TRIANGLE;
    for (int i = 0; i < l->num_tensors; i++) sizes[i] = dim;
    if (l->kind == LU) sizes[0] = dim * dim;
    if (l->kind == TRIANGLE) sizes[1] = sizes[4] = dim * dim;
    for (int i = 0; i < (l->kind == COUPLING ? 1 : l->num_blocks); i++) {
        const perceptron *q = l->kind == COUPLING ? &l->network : &l->blocks[i].network;
        sizes[3 * i] = 0;
        for (int j = 0; j < q->num_layers; j++) sizes[3 * i] += ((int64_t)q->sizes[j] + 1) * q->sizes[j + 1];
        sizes[3 * i + 1] = l->kind == COUPLING ? l->splines.num_shared * l->splines.num_params
                                               : 2 * l->blocks[i].size * l->blocks[i].start;
        sizes[3 * i + 2] = l->kind == COUPLING ? 0 : 2 * l->blocks[i].size;
    }
    for (int i = 0; i < l->num_tensors; i++) {
        if (l->kind == HIERARCHY && i == 1) continue; /* a block without a linear map */
        l->tensors[i] = is_scale && i == 1 ? N(positive_units)(dim, sizes[i]) : N(random)(sizes[i], 0.3);
        l->grads[i] = is_scale && i < 2 ? NULL : N(take)(sizes[i]);
    }
}

/* Every kind of layer once, in a chain of five columns. */
static void N(try_chain)(const instance *k, int rows, int count_bins) {
    static const int32_t order[] = {3, 0, 4, 1, 2};
    const int64_t dim = 5;
    problem p = make_problem(&couplings[1], rows, count_bins, LINEAR, 0);
    layer layers[LAYER_KINDS] = {{0}};
    const int num_tensors[LAYER_KINDS] = {2, 2, 0, 4, 5, 6};
    for (int i = 0; i < LAYER_KINDS; i++) layers[i].kind = i, layers[i].num_tensors = num_tensors[i];
    layers[COUPLING].splines = p;
    layers[COUPLING].network = (perceptron){2, {NUM_PASSED, 7, (int32_t)(p.num_own * p.num_params)}, FIRST_PASSED, NUM_PASSED, 0, 1e4};
    layers[PERMUTATION].order = order;
    for (int i = DIAGONAL; i <= TRIANGLE; i++) layers[i].rate = 1.5, layers[i].matrix_rate = 0.5;
    layers[HIERARCHY].num_blocks = 2;
    layers[HIERARCHY].blocks[0] = (block){1, 3, 0.5, 0.7, {2, {1, 3, 6}, 0, 1, 0, 0}};
    layers[HIERARCHY].blocks[1] = (block){4, 1, 0.5, 0.7, {1, {4, 2}, 0, 4, 0, 0}};
    for (int i = 0; i < LAYER_KINDS; i++) N(fill_layer)(&layers[i], dim);
    const chain c = {rows, dim, LAYER_KINDS, layers};
    const int64_t size = rows * dim;
    REAL *kept = N(take)(kernel_kept_of_chain(&c)), *x = N(random)(size, BOUND), *y = N(take)(size), *ladj = N(take)(rows);
    check(k->F(run_chain)(&c, x, y, ladj, kept) == 0, "run_chain", &p, 0, 0);
    N(check_finite)(y, size, "value of a chain", &p);
    N(check_finite)(ladj, rows, "log-det of a chain", &p);
    REAL *of_x = N(random)(size, 1), *at_cut = N(take)(size), *at_last = N(take)(size), *of_y = N(take)(size);
    check(k->F(push_chain)(&c, of_x, kept, rows % (LAYER_KINDS + 1), at_cut, at_last, of_y) == 0, "push_chain", &p, 0, 0);
    N(check_finite)(at_cut, size, "derivative on the way", &p);
    N(check_finite)(at_last, size, "derivative before the last layer", &p);
    N(check_finite)(of_y, size, "derivative of a value", &p);
    REAL *grad_x = N(take)(size), *weight = N(random)(rows, 1), *squares = N(take)(2), *grad_ladj = N(random)(rows, 1);
    for (int with_noise = 0; with_noise < 2; with_noise++)
        check(k->F(run_chain_backward)(&c, kept, of_y, with_noise ? NULL : grad_ladj, grad_x, weight, at_last, with_noise,
                                       with_noise ? squares : NULL) == 0, "run_chain_backward", &p, 0, 0);
    N(check_finite)(grad_x, size, "derivative of an input", &p);
    N(check_finite)(squares, rows ? 2 : 0, "noise", &p);
    const chain back = {rows, dim, HIERARCHY, layers}; /* the last kind has no way back */
    check(k->F(pull_chain)(&back, y, x, ladj, kept) == 0, "pull_chain", &p, 0, 0);
    N(check_finite)(x, size, "input of a chain", &p);
    N(check_finite)(ladj, rows, "log-det of a way back", &p);
    for (int with_ladj = 0; with_ladj < 2; with_ladj++)
        check(k->F(pull_chain_backward)(&back, kept, of_x, with_ladj ? grad_ladj : NULL, of_y) == 0, "pull_chain_backward", &p,
              0, 0);
    N(check_finite)(of_y, size, "derivative of a value, on the way back", &p);
    for (int i = 0; i < LAYER_KINDS; i++)
        for (int j = 0; j < layers[i].num_tensors; j++) free((void *)layers[i].tensors[j]), free(layers[i].grads[j]);
    free(kept), free(x), free(y), free(ladj), free(of_x), free(at_cut), free(at_last), free(of_y), free(grad_x);
    free(weight), free(squares), free(grad_ladj);
}

static void N(try_all)(const instance *k) {
    int variant = 0;
    for (int b = 0; b < COUNT(all_bins); b++)
        for (int r = 0; r < COUNT(all_rows); r++) {
            N(try_chain)(k, all_rows[r], all_bins[b]);
            for (int tails = LINEAR; tails <= NO_TAILS; tails++) {
                for (int l = 0; l < COUNT(layouts); l++)
                    for (int inverse = 0; inverse < 2; inverse++)
                        N(try_splines)(k, &layouts[l], all_rows[r], all_bins[b], tails, inverse, variant++);
                for (int l = 0; l < COUNT(couplings); l++)
                    for (int n = 0; n < COUNT(networks); n++)
                        N(try_coupling)(k, &couplings[l], all_rows[r], all_bins[b], tails, networks[n], variant++);
            }
        }
}
#endif
