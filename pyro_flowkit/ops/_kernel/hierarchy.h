/* Affine maps of the blocks of a vector given the blocks before them, those of ops/block_affine.py. One instance.
 *
 * With o the output of a perceptron times of_network plus a linear map times of_line, both of v(y_{<b}), o = (l, r),
 * t = tanh(r / 15) and the numbers a and c of a block's columns:
 *
 *     w = 1 / (1 + exp(2 (15 t + c))),  m = w l + (1 - w) a,  exp(s) = exp(15 t) sqrt(w (1 + exp(2 c))),
 *     y_b = m + exp(s) x_b
 *
 * and v a logarithm beyond LINEAR_UNTIL. The tensors of a block are the layers of its perceptron, the weight of the
 * linear map, which may be missing, and a and c. Of every row and block are kept: activations, with l and t as those of
 * the last layer, exp(s) and w.
 */
#define MAX_LOG_SCALE R(15.0)
#define LINEAR_UNTIL R(5.0)

/* what the blocks after it see of a value, and its derivative */
static inline REAL N(seen)(REAL y) {
    const REAL size = y < 0 ? -y : y;
    if (!(size > LINEAR_UNTIL)) return y;
    const REAL far = R(LINEAR_UNTIL + log1p((double)(size - LINEAR_UNTIL)));
    return y < 0 ? -far : far;
}

static inline REAL N(slope_of_seen)(REAL y) {
    const REAL size = y < 0 ? -y : y;
    return size > LINEAR_UNTIL ? 1 / (1 + (size - LINEAR_UNTIL)) : 1;
}

#define MAX_HALF_LOG_PRECISION 300.0 /* beyond it exp(2 c) would overflow */

/* with exp(2 c), and sums of derivatives with respect to a and c */
typedef struct {
    N(network) network, line;
    int has_line;
    const REAL *places;
    double *memory, *precisions, *sums;
} N(conditioner);

static void N(close_conditioner)(N(conditioner) *c) {
    free(c->network.memory);
    if (c->has_line) free(c->line.memory);
    free(c->memory);
}

/* layers of a packed network, whose addresses stay valid as long as it is there */
static void N(unpack)(const perceptron *q, const REAL *packed, const REAL **weights, const REAL **biases) {
    for (int i = 0; i < q->num_layers; i++) {
        weights[i] = packed;
        biases[i] = packed + (int64_t)q->sizes[i + 1] * q->sizes[i];
        packed = biases[i] + q->sizes[i + 1];
    }
}

static int N(open_conditioner)(N(conditioner) *c, const block *b, const void *const *tensors, int backward) {
    const REAL *weights[MAX_LAYERS], *biases[MAX_LAYERS], *no_bias[1] = {NULL};
    const REAL *packed = tensors[0], *weight = tensors[1], *likelihood = tensors[2];
    N(unpack)(&b->network, packed, weights, biases);
    c->has_line = 0;
    c->places = likelihood;
    c->memory = c->precisions = calloc((size_t)(3 * b->size), sizeof(double));
    if (!c->memory) return -1;
    c->sums = c->memory + b->size;
    for (int64_t j = 0; j < b->size; j++) c->precisions[j] = exp(2 * fmin((double)likelihood[b->size + j], MAX_HALF_LOG_PRECISION));
    if (N(open_network)(&c->network, &b->network, weights, biases, backward)) {
        free(c->memory);
        return -1;
    }
    const perceptron line = {1, {(int32_t)b->start, 2 * (int32_t)b->size}, 0, b->start, 0, 0};
    if (weight && N(open_network)(&c->line, &line, &weight, no_bias, backward)) {
        N(close_conditioner)(c);
        return -1;
    }
    c->has_line = weight != NULL;
    return 0;
}

/* From the derivatives with respect to m and log s those with respect to l and r; adds to those of a and c. */
static inline void N(through_likelihood)(N(conditioner) *c, int64_t size, int64_t j, const REAL *output, double w,
                                         double of_loc, double of_log_scale, REAL *of_output) {
    const double t = output[size + j];
    const double of_share = 2 * w * (1 - w) * ((double)output[j] - (double)c->places[j]) * of_loc;
    of_output[j] = R(w * of_loc);
    of_output[size + j] = R((w * of_log_scale - of_share) * (1 - t * t));
    c->sums[j] += (1 - w) * of_loc;
    c->sums[size + j] += (w - (double)R(1 / (1 + c->precisions[j]))) * of_log_scale - of_share; /* w is rounded, too */
}

static int64_t N(kept_of_block)(const block *b) { return kernel_kept_per_row(&b->network) + 2 * b->size; }

static int N(run_hierarchy)(const layer *l, int64_t rows, int64_t dim, const REAL *in, REAL *out, REAL *kept,
                            double *ladj) {
    memcpy(out, in, (size_t)(rows * dim) * sizeof(REAL));
    for (int k = 0; k < l->num_blocks; k++) {
        const block *b = &l->blocks[k];
        N(conditioner) c;
        if (N(open_conditioner)(&c, b, l->tensors + 3 * k, 0)) return -1;
        const int64_t step = c.network.steps[0], size = b->size;
        REAL *scales = kept + rows * kernel_kept_per_row(&b->network), *shares = scales + rows * size;
        for (int64_t start = 0; start < rows; start += BLOCK_ROWS) {
            const int64_t stop = start + BLOCK_ROWS < rows ? start + BLOCK_ROWS : rows;
            REAL *features = N(activation)(&c.network, rows, 0, kept, start);
            for (int64_t i = start; i < stop; i++, features += step) {
                for (int64_t j = 0; j < b->start; j++) features[j] = N(seen)(out[i * dim + j]);
                for (int64_t j = b->start; j < step; j++) features[j] = 0;
            }
            N(run_network)(&c.network, rows, start, stop, kept);
            if (c.has_line) {
                c.line.activations[0] = N(activation)(&c.network, rows, 0, kept, start);
                N(run_network)(&c.line, rows, start, stop, NULL);
            }
            for (int64_t i = start; i < stop; i++) {
                REAL *output = N(activation)(&c.network, rows, c.network.num_layers, kept, i);
                REAL *own = out + i * dim + b->start;
                const REAL *line = c.has_line ? c.line.activations[1] + (i - start) * c.line.steps[1] : NULL;
                for (int64_t j = 0; j < 2 * size; j++)
                    output[j] = R(b->of_network) * output[j] + (line ? R(b->of_line) * line[j] : 0);
                for (int64_t j = 0; j < size; j++) {
                    const REAL t = R(tanh((double)(output[size + j] / MAX_LOG_SCALE)));
                    const double raw = exp((double)(MAX_LOG_SCALE * t)), q = c.precisions[j];
                    const double w = 1 / (1 + raw * raw * q), bend = w * (1 + q), scale = raw * sqrt(bend);
                    output[size + j] = t;
                    scales[i * size + j] = R(scale);
                    shares[i * size + j] = R(w);
                    own[j] = R(own[j] * scale + w * output[j] + (1 - w) * c.places[j]);
                    ladj[i] += (double)(MAX_LOG_SCALE * t) + 0.5 * log(bend);
                }
            }
        }
        kept += rows * N(kept_of_block)(b);
        N(close_conditioner)(&c);
    }
    return 0;
}

/* Add to grad what was found for the values in out of the blocks before, as the conditioner sees them. */
static void N(add_through_seen)(const block *b, int64_t dim, int64_t start, int64_t stop, const REAL *out,
                                const REAL *found, int64_t step, REAL *grad) {
    for (int64_t i = start; i < stop; i++, found += step)
        for (int64_t j = 0; j < b->start; j++) grad[i * dim + j] += N(slope_of_seen)(out[i * dim + j]) * found[j];
}

/* From derivatives with respect to the outputs of the conditioner, in the grads of its network, those with respect to
 * the blocks before, whose values are in out, are added to grad; those of the parameters are summed up if wanted. */
static void N(through_conditioner)(N(conditioner) *c, const block *b, int64_t rows, int64_t dim, int64_t start,
                                   int64_t stop, const REAL *out, REAL *kept, int with_layers, REAL *grad) {
    REAL *of_output = c->network.grads[0];
    const int64_t size = (stop - start) * c->network.steps[c->network.num_layers];
    const REAL *found;
    if (c->has_line) {
        for (int64_t i = 0; i < size; i++) c->line.grads[0][i] = R(b->of_line) * of_output[i];
        c->line.activations[0] = N(activation)(&c->network, rows, 0, kept, start);
        found = N(run_network_backward)(&c->line, rows, start, stop, NULL, with_layers);
        N(add_through_seen)(b, dim, start, stop, out, found, c->line.steps[0], grad);
    }
    for (int64_t i = 0; i < size; i++) of_output[i] *= R(b->of_network);
    found = N(run_network_backward)(&c->network, rows, start, stop, kept, with_layers);
    N(add_through_seen)(b, dim, start, stop, out, found, c->network.steps[0], grad);
}

/* The inverse map's: with g of in, g / scale for m, and what is left of the rows' own derivatives for the logarithm of
 * the scale. */
static int N(push_hierarchy)(const layer *l, int64_t rows, int64_t dim, const REAL *in, const REAL *out, REAL *kept,
                             const REAL *grad, REAL *pushed) {
    memcpy(pushed, grad, (size_t)(rows * dim) * sizeof(REAL));
    for (int k = 0; k < l->num_blocks; k++) {
        const block *b = &l->blocks[k];
        N(conditioner) c;
        if (N(open_conditioner)(&c, b, l->tensors + 3 * k, 1)) return -1;
        const int64_t last = c.network.steps[c.network.num_layers], size = b->size;
        const REAL *scales = kept + rows * kernel_kept_per_row(&b->network), *shares = scales + rows * size;
        for (int64_t start = 0; start < rows; start += BLOCK_ROWS) {
            const int64_t stop = start + BLOCK_ROWS < rows ? start + BLOCK_ROWS : rows;
            for (int64_t i = start; i < stop; i++) {
                const REAL *output = N(activation)(&c.network, rows, c.network.num_layers, kept, i);
                REAL *of_output = c.network.grads[0] + (i - start) * last;
                for (int64_t j = 0; j < size; j++) {
                    const int64_t at = i * dim + b->start + j;
                    pushed[at] = grad[at] / scales[i * size + j];
                    N(through_likelihood)(&c, size, j, output, shares[i * size + j], -pushed[at],
                                          -(1 + grad[at] * in[at]), of_output);
                }
                for (int64_t j = 2 * size; j < last; j++) of_output[j] = 0;
            }
            N(through_conditioner)(&c, b, rows, dim, start, stop, out, kept, 0, pushed);
        }
        kept += rows * N(kept_of_block)(b);
        N(close_conditioner)(&c);
    }
    return 0;
}

static int N(run_hierarchy_backward)(const layer *l, int64_t rows, int64_t dim, const REAL *in, const REAL *out, REAL *kept,
                                     const REAL *grad_out, const REAL *grad_ladj, REAL *grad) {
    memcpy(grad, grad_out, (size_t)(rows * dim) * sizeof(REAL));
    for (int k = 0; k < l->num_blocks; k++) kept += rows * N(kept_of_block)(&l->blocks[k]);
    for (int k = l->num_blocks - 1; k >= 0; k--) {
        const block *b = &l->blocks[k];
        N(conditioner) c;
        kept -= rows * N(kept_of_block)(b);
        if (N(open_conditioner)(&c, b, l->tensors + 3 * k, 1)) return -1;
        const int64_t last = c.network.steps[c.network.num_layers], size = b->size;
        const REAL *scales = kept + rows * kernel_kept_per_row(&b->network), *shares = scales + rows * size;
        for (int64_t start = 0; start < rows; start += BLOCK_ROWS) {
            const int64_t stop = start + BLOCK_ROWS < rows ? start + BLOCK_ROWS : rows;
            for (int64_t i = start; i < stop; i++) {
                const REAL *output = N(activation)(&c.network, rows, c.network.num_layers, kept, i);
                REAL *of_output = c.network.grads[0] + (i - start) * last;
                for (int64_t j = 0; j < size; j++) {
                    const int64_t at = i * dim + b->start + j;
                    const REAL of_loc = grad[at];
                    grad[at] *= scales[i * size + j];
                    N(through_likelihood)(&c, size, j, output, shares[i * size + j], of_loc,
                                          grad[at] * in[at] + (grad_ladj ? grad_ladj[i] : 0), of_output);
                }
                for (int64_t j = 2 * size; j < last; j++) of_output[j] = 0;
            }
            N(through_conditioner)(&c, b, rows, dim, start, stop, out, kept, 1, grad);
        }
        N(write_layers)(&c.network, l->grads[3 * k]);
        for (int64_t j = 0; j < 2 * size; j++) ((REAL *)l->grads[3 * k + 2])[j] = R(c.sums[j]);
        if (c.has_line) /* without its bias, which is none */
            for (int64_t o = 0; o < 2 * size; o++)
                memcpy((REAL *)l->grads[3 * k + 1] + o * b->start, c.line.grad_weights[0] + o * c.line.steps[0],
                       (size_t)b->start * sizeof(REAL));
        N(close_conditioner)(&c);
    }
    return 0;
}
#undef MAX_LOG_SCALE
#undef MAX_HALF_LOG_PRECISION
#undef LINEAR_UNTIL
