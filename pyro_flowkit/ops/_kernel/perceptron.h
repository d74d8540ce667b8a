/* A coupling as a whole: a small multilayer perceptron with ReLU makes the spline parameters of a block of rows, which
 * the splines use while they are in the cache. One instance, see vector.h.
 *
 * Rows of numbers are padded with zeros to whole vectors, so that no loop has a remainder to the right.
 */

/* C[i, :] = or += sum over k < depth of A[i, k] B[k, :] for a tile of `height` rows and two vectors, or one.
 * a_row and a_column are the steps in A; extra holds the bias, or what must be positive, for this tile. */
static inline void N(multiply_tile)(const int height, const int vectors, int depth, const REAL *a, int64_t a_row,
                                    int64_t a_column, const REAL *b, int64_t b_row, REAL *c, int64_t c_row,
                                    int finish, const REAL *extra, int64_t extra_row) {
    vec sums[6][2];
    for (int i = 0; i < height; i++)
        for (int v = 0; v < vectors; v++) sums[i][v] = splat(0);
    for (int k = 0; k < depth; k++) {
        vec right[2];
        for (int v = 0; v < vectors; v++) right[v] = N(load)(b + k * b_row + v * LANES);
        for (int i = 0; i < height; i++) {
            vec left = splat(a[i * a_row + k * a_column]);
            for (int v = 0; v < vectors; v++) sums[i][v] += left * right[v];
        }
    }
    for (int i = 0; i < height; i++) {
        for (int v = 0; v < vectors; v++) {
            REAL *place = c + i * c_row + v * LANES;
            vec sum = sums[i][v];
            if (finish == ADD_SUM) sum += N(load)(place);
            if (finish == ADD_BIAS || finish == ADD_BIAS_RELU) sum += N(load)(extra + v * LANES);
            if (finish == ADD_BIAS_RELU) sum = N(larger)(splat(0), sum);
            if (finish == SET_WHERE_POSITIVE)
                sum = select(N(load)(extra + i * extra_row + v * LANES) <= splat(0), splat(0), sum);
            N(store)(place, sum);
        }
    }
}

/* the same for `width` columns, a multiple of LANES */
static void N(multiply)(int64_t height, int64_t width, int depth, const REAL *a, int64_t a_row, int64_t a_column,
                        const REAL *b, int64_t b_row, REAL *c, int64_t c_row, int finish, const REAL *extra,
                        int64_t extra_row) {
    for (int64_t j = 0; j < width; j += 2 * LANES) {
        const int vectors = width - j < 2 * LANES ? 1 : 2;
        int64_t i = 0;
#define TILE(rows, columns)                                                                                          \
    N(multiply_tile)(rows, columns, depth, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row,    \
                     finish, OFFSET(extra, i * extra_row + j), extra_row)
        for (; i + 6 <= height; i += 6) {
            if (vectors == 2) TILE(6, 2);
            else TILE(6, 1);
        }
        for (; i + 3 <= height; i += 3) {
            if (vectors == 2) TILE(3, 2);
            else TILE(3, 1);
        }
        for (; i < height; i++) {
            if (vectors == 2) TILE(1, 2);
            else TILE(1, 1);
        }
#undef TILE
    }
}

/* sum += the rows of a matrix */
static void N(add_rows)(REAL *sum, const REAL *a, int64_t height, int64_t width) {
    for (int64_t j = 0; j < width; j += LANES) {
        vec total = N(load)(sum + j);
        for (int64_t i = 0; i < height; i++) total += N(load)(a + i * width + j);
        N(store)(sum + j, total);
    }
}

/* The network of one call. Activations of layer i are the inputs of layer i: rows of steps[i] numbers; those of the
 * last are the spline parameters. */
typedef struct {
    void *memory;
    int num_layers;
    int32_t sizes[MAX_LAYERS + 1];
    int64_t steps[MAX_LAYERS + 1];
    REAL *transposed[MAX_LAYERS], *padded[MAX_LAYERS], *biases[MAX_LAYERS];
    REAL *activations[MAX_LAYERS + 1]; /* of one block, where they are not kept */
    REAL *grads[2];                    /* of one block */
    REAL *grad_weights[MAX_LAYERS], *grad_biases[MAX_LAYERS];
} N(network);

static int64_t N(widest)(const N(network) *n) {
    int64_t widest = 0;
    for (int i = 0; i <= n->num_layers; i++) widest = n->steps[i] > widest ? n->steps[i] : widest;
    return widest;
}

static int N(open_network)(N(network) *n, const perceptron *q, const REAL *const *weights, const REAL *const *biases,
                           int backward) {
    n->num_layers = q->num_layers;
    size_t numbers = 0, used = 0;
    for (int i = 0; i <= q->num_layers; i++) {
        n->sizes[i] = q->sizes[i];
        n->steps[i] = PADDED(q->sizes[i]);
        numbers += (size_t)(BLOCK_ROWS * n->steps[i]);
    }
    for (int i = 0; i < q->num_layers; i++)
        numbers += 2 * (size_t)(n->sizes[i] * n->steps[i + 1] + n->sizes[i + 1] * n->steps[i] + n->steps[i + 1]);
    numbers += 2 * (size_t)(BLOCK_ROWS * N(widest)(n));
    n->memory = malloc(numbers * sizeof(REAL) + 64);
    if (!n->memory) return -1;
    REAL *at = (REAL *)(((uintptr_t)n->memory + 63) / 64 * 64);
#define TAKE(count) (used += (size_t)(count), at + used - (size_t)(count))
    for (int i = 0; i <= q->num_layers; i++) n->activations[i] = TAKE(BLOCK_ROWS * n->steps[i]);
    for (int i = 0; i < 2; i++) n->grads[i] = TAKE(BLOCK_ROWS * N(widest)(n));
    for (int i = 0; i < q->num_layers; i++) {
        const int64_t in = n->sizes[i], out = n->sizes[i + 1], in_step = n->steps[i], out_step = n->steps[i + 1];
        if (backward) { /* weights (out, in) with padded rows, and room for their derivatives */
            n->padded[i] = TAKE(out * in_step);
            for (int64_t o = 0; o < out; o++) {
                memcpy(n->padded[i] + o * in_step, weights[i] + o * in, (size_t)in * sizeof(REAL));
                memset(n->padded[i] + o * in_step + in, 0, (size_t)(in_step - in) * sizeof(REAL));
            }
            n->grad_weights[i] = TAKE(out * in_step);
            n->grad_biases[i] = TAKE(out_step);
            memset(n->grad_weights[i], 0, (size_t)(out * in_step) * sizeof(REAL));
            memset(n->grad_biases[i], 0, (size_t)out_step * sizeof(REAL));
        } else { /* weights as (in, out) with padded rows */
            n->transposed[i] = TAKE(in * out_step);
            n->biases[i] = TAKE(out_step);
            memset(n->transposed[i], 0, (size_t)(in * out_step) * sizeof(REAL));
            memset(n->biases[i], 0, (size_t)out_step * sizeof(REAL));
            if (biases[i]) memcpy(n->biases[i], biases[i], (size_t)out * sizeof(REAL));
            for (int64_t o = 0; o < out; o++)
                for (int64_t k = 0; k < in; k++) n->transposed[i][k * out_step + o] = weights[i][o * in + k];
        }
    }
#undef TAKE
    return 0;
}

/* where the activations of layer i start for this row: in the caller's memory if they are kept, else in the block's */
static REAL *N(activation)(const N(network) *n, int64_t rows, int i, REAL *kept, int64_t row) {
    if (!kept) return n->activations[i];
    for (int j = 0; j < i; j++) kept += rows * n->steps[j];
    return kept + row * n->steps[i];
}

/* the activations of all layers for rows start to stop, whose features are in their place */
static void N(run_network)(const N(network) *n, int64_t rows, int64_t start, int64_t stop, REAL *kept) {
    for (int i = 0; i < n->num_layers; i++)
        N(multiply)(stop - start, n->steps[i + 1], n->sizes[i], N(activation)(n, rows, i, kept, start), n->steps[i], 1,
                    n->transposed[i], n->steps[i + 1], N(activation)(n, rows, i + 1, kept, start), n->steps[i + 1],
                    i + 1 < n->num_layers ? ADD_BIAS_RELU : ADD_BIAS, n->biases[i], 0);
}

/* From the derivatives of these rows with respect to the outputs, in grads[0], to those with respect to the features,
 * where the result points; with_layers adds those of weights and biases to what n has of them. */
static const REAL *N(run_network_backward)(const N(network) *n, int64_t rows, int64_t start, int64_t stop, REAL *kept,
                                           int with_layers) {
    const int64_t height = stop - start;
    REAL *grad = n->grads[0], *next = n->grads[1];
    for (int i = n->num_layers - 1; i >= 0; i--) {
        const int64_t in_step = n->steps[i], out_step = n->steps[i + 1], out = n->sizes[i + 1];
        const REAL *inputs = N(activation)(n, rows, i, kept, start);
        if (with_layers) {
            /* in pieces that stay in the innermost cache, for the columns of grad are far apart in memory */
            for (int64_t r = 0; r < height; r += 32)
                for (int64_t o = 0; o < out; o += 6)
                    N(multiply)(out - o < 6 ? out - o : 6, in_step, (int)(height - r < 32 ? height - r : 32),
                                grad + r * out_step + o, 1, out_step, inputs + r * in_step, in_step,
                                n->grad_weights[i] + o * in_step, in_step, ADD_SUM, NULL, 0);
            N(add_rows)(n->grad_biases[i], grad, height, out_step);
        }
        N(multiply)(height, in_step, (int)out, grad, out_step, 1, n->padded[i], in_step, next, in_step,
                    i > 0 ? SET_WHERE_POSITIVE : SET_SUM, i > 0 ? inputs : NULL, i > 0 ? in_step : 0);
        REAL *before = grad;
        grad = next;
        next = before;
    }
    return grad;
}

/* the derivatives of weights and biases, (out, in) and (out,), one layer after the other */
static void N(write_layers)(const N(network) *n, REAL *grad_layers) {
    for (int i = 0; i < n->num_layers; i++) {
        const int64_t in = n->sizes[i], out = n->sizes[i + 1];
        for (int64_t o = 0; o < out; o++, grad_layers += in)
            memcpy(grad_layers, n->grad_weights[i] + o * n->steps[i], (size_t)in * sizeof(REAL));
        memcpy(grad_layers, n->grad_biases[i], (size_t)out * sizeof(REAL));
        grad_layers += out;
    }
}

/* kept: (sum of all steps) * rows numbers, for the backward pass, or NULL */
static int N(couple)(const problem *p, const perceptron *q, const REAL *input, const REAL *context,
                     const REAL *shared_params, const REAL *const *weights, const REAL *const *biases, REAL *value,
                     REAL *ladj, REAL *kept) {
    N(workspace) w;
    N(network) n;
    if (N(open)(&w, p, shared_params)) return -1;
    if (N(open_network)(&n, q, weights, biases, 0)) {
        free(w.memory);
        return -1;
    }
    const REAL limit = (REAL)q->limit;
    for (int64_t start = 0; start < p->rows; start += BLOCK_ROWS) {
        const int64_t stop = start + BLOCK_ROWS < p->rows ? start + BLOCK_ROWS : p->rows;
        REAL *features = N(activation)(&n, p->rows, 0, kept, start);
        for (int64_t i = start; i < stop; i++) {
            REAL *row = features + (i - start) * n.steps[0];
            for (int64_t j = 0; j < q->num_passed; j++) {
                const REAL x = input[i * p->dim + q->first + j];
                row[j] = x > limit ? limit : x < -limit ? -limit : x;
            }
            if (q->context_dim)
                memcpy(row + q->num_passed, context + i * q->context_dim, (size_t)q->context_dim * sizeof(REAL));
            for (int64_t j = n.sizes[0]; j < n.steps[0]; j++) row[j] = 0;
        }
        N(run_network)(&n, p->rows, start, stop, kept);
        N(run_rows)(p, &w, start, stop, input, N(activation)(&n, p->rows, n.num_layers, kept, start), n.steps[n.num_layers],
                    value, ladj);
    }
    free(n.memory);
    free(w.memory);
    return 0;
}

/* grad_weights and grad_biases: (out, in) and (out,) of every layer one after the other, or NULL; grad_context may be
 * NULL too */
static int N(couple_backward)(const problem *p, const perceptron *q, const REAL *input, const REAL *shared_params,
                              const REAL *const *weights, const REAL *kept, const REAL *grad_value,
                              const REAL *grad_ladj, REAL *grad_input, REAL *grad_context, REAL *grad_shared,
                              REAL *grad_layers) {
    N(workspace) w;
    N(network) n;
    if (N(open)(&w, p, shared_params)) return -1;
    if (N(open_network)(&n, q, weights, NULL, 1)) {
        free(w.memory);
        return -1;
    }
    const REAL limit = (REAL)q->limit;
    REAL *kept_ = (REAL *)kept;
    for (int64_t start = 0; start < p->rows; start += BLOCK_ROWS) {
        const int64_t stop = start + BLOCK_ROWS < p->rows ? start + BLOCK_ROWS : p->rows;
        N(run_rows_backward)(p, &w, start, stop, input, N(activation)(&n, p->rows, n.num_layers, kept_, start),
                             n.steps[n.num_layers], grad_value, grad_ladj, grad_input, n.grads[0]);
        const REAL *grad = N(run_network_backward)(&n, p->rows, start, stop, kept_, grad_layers != NULL);
        for (int64_t i = start; i < stop; i++) {
            const REAL *row = grad + (i - start) * n.steps[0];
            for (int64_t j = 0; j < q->num_passed; j++) {
                const REAL x = input[i * p->dim + q->first + j];
                if (!(x >= limit || x <= -limit)) grad_input[i * p->dim + q->first + j] += row[j];
            }
            if (grad_context)
                memcpy(grad_context + i * q->context_dim, row + q->num_passed, (size_t)q->context_dim * sizeof(REAL));
        }
    }
    N(finish_all_shared)(p, &w, shared_params, grad_shared);
    if (grad_layers) N(write_layers)(&n, grad_layers);
    free(n.memory);
    free(w.memory);
    return 0;
}
