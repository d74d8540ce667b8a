/* Linear layers of a chain for a few rows: y = W x + b with W = L U or a lower triangle, one scale a column, and
 * permutations. One instance, see vector.h.
 *
 * LU:        lu (dim, dim), bias. L is below the diagonal, U above, the logarithm of U's diagonal on it.
 * TRIANGLE:  origin, units (dim, dim), raw_loc, raw_log_scale, raw_lower. With s = exp(rate raw_log_scale) and A the
 *            lower triangle of diagonal s and of matrix_rate s_i raw_lower_ij, W = units A, b = origin + rate units raw_loc.
 * DIAGONAL:  origin, units (dim,), raw_loc, raw_log_scale: the same with a diagonal.
 * Units are lower triangles with a positive diagonal.
 */

/* W with padded rows and transposed, b, the factors that solve with W^T, and room for one block of rows. */
typedef struct {
    void *memory;
    int64_t dim, step;
    REAL *weight, *transposed, *bias, *upper, *scaled, *scale, *grad_weight, *rows;
    vec *tile;
    double ladj;
} N(dense);

static void N(factors_of_lu)(N(dense) *d, const REAL *lu, const REAL *bias) {
    const int64_t dim = d->dim, step = d->step;
    for (int64_t i = 0; i < dim; i++) {
        REAL *row = d->weight + i * step, *upper = d->upper + i * step;
        for (int64_t j = 0; j < i; j++) upper[j] = 0;
        upper[i] = R(exp((double)lu[i * dim + i]));
        for (int64_t j = i + 1; j < dim; j++) upper[j] = lu[i * dim + j];
        memcpy(row, upper, (size_t)dim * sizeof(REAL));
        for (int64_t k = 0; k < i; k++)
            for (int64_t j = k; j < dim; j++) row[j] += lu[i * dim + k] * d->upper[k * step + j];
        d->ladj += lu[i * dim + i];
        d->bias[i] = bias[i];
    }
}

static void N(factors_of_triangle)(N(dense) *d, const layer *l) {
    const int64_t dim = d->dim, step = d->step;
    const REAL *origin = l->tensors[0], *units = l->tensors[1], *raw_loc = l->tensors[2], *raw_scale = l->tensors[3],
               *raw_lower = l->tensors[4];
    for (int64_t i = 0; i < dim; i++) {
        const REAL scale = R(exp(l->rate * raw_scale[i]));
        REAL *row = d->weight + i * step, *scaled = d->scaled + i * step;
        for (int64_t j = 0; j < i; j++) scaled[j] = R(l->matrix_rate) * scale * raw_lower[i * dim + j];
        scaled[i] = d->scale[i] = scale;
        double loc = 0;
        for (int64_t k = 0; k <= i; k++) {
            const REAL unit = units[i * dim + k];
            for (int64_t j = 0; j <= k; j++) row[j] += unit * d->scaled[k * step + j];
            loc += (double)unit * raw_loc[k];
        }
        d->bias[i] = R(origin[i] + l->rate * loc);
        d->ladj += log((double)units[i * dim + i]) + l->rate * raw_scale[i];
    }
}

static int N(open_dense)(N(dense) *d, const layer *l, int64_t dim) {
    d->dim = dim;
    d->step = PADDED(dim);
    d->ladj = 0;
    const size_t square = (size_t)(dim * d->step), row = (size_t)d->step, block = (size_t)(BLOCK_ROWS * d->step);
    d->memory = calloc(5 * square + 2 * row + block + (size_t)dim * LANES + 64, sizeof(REAL));
    if (!d->memory) return -1;
    REAL *at = (REAL *)(((uintptr_t)d->memory + 63) / 64 * 64);
    d->tile = (vec *)at;
    d->weight = at + (size_t)dim * LANES;
    d->transposed = d->weight + square;
    d->upper = d->transposed + square;
    d->scaled = d->upper + square;
    d->grad_weight = d->scaled + square;
    d->bias = d->grad_weight + square;
    d->scale = d->bias + row;
    d->rows = d->scale + row;
    if (l->kind == LU) N(factors_of_lu)(d, l->tensors[0], l->tensors[1]);
    else N(factors_of_triangle)(d, l);
    for (int64_t i = 0; i < dim; i++)
        for (int64_t j = 0; j < dim; j++) d->transposed[j * d->step + i] = d->weight[i * d->step + j];
    return 0;
}

/* out (rows, dim) = in times a matrix of padded rows, plus a bias or nothing */
static void N(multiply_rows)(const N(dense) *d, int64_t rows, const REAL *in, const REAL *matrix, const REAL *bias,
                             REAL *out) {
    for (int64_t start = 0; start < rows; start += BLOCK_ROWS) {
        const int64_t height = rows - start < BLOCK_ROWS ? rows - start : BLOCK_ROWS;
        N(multiply)(height, d->step, (int)d->dim, in + start * d->dim, d->dim, 1, matrix, d->step, d->rows, d->step,
                    bias ? ADD_BIAS : SET_SUM, bias, 0);
        for (int64_t i = 0; i < height; i++)
            memcpy(out + (start + i) * d->dim, d->rows + i * d->step, (size_t)d->dim * sizeof(REAL));
    }
}

/* The right side in t makes room for the solution of t W = right side, for LANES rows. */
static void N(solve_transposed)(const N(dense) *d, int is_lu, const REAL *lower, int64_t lower_step, vec *t) {
    const int64_t dim = d->dim, step = d->step;
    for (int64_t i = 0; is_lu && i < dim; i++) {
        const REAL *row = d->upper + i * step;
        t[i] /= splat(row[i]);
        for (int64_t j = i + 1; j < dim; j++) t[j] -= t[i] * row[j];
    }
    for (int64_t i = dim - 1; i >= 0; i--) {
        const REAL *row = lower + i * lower_step;
        if (!is_lu) t[i] /= splat(row[i]);
        for (int64_t j = 0; j < i; j++) t[j] -= t[i] * row[j];
    }
}

/* The same for W t = right side - b. */
static void N(solve_back)(const N(dense) *d, int is_lu, const REAL *lower, int64_t lower_step, vec *t) {
    const int64_t dim = d->dim, step = d->step;
    for (int64_t i = 0; i < dim; i++) {
        const REAL *row = lower + i * lower_step;
        vec sum = t[i] - splat(d->bias[i]);
        for (int64_t j = 0; j < i; j++) sum -= t[j] * row[j];
        t[i] = is_lu ? sum : sum / splat(row[i]);
    }
    for (int64_t i = dim - 1; is_lu && i >= 0; i--) {
        const REAL *row = d->upper + i * step;
        vec sum = t[i];
        for (int64_t j = i + 1; j < dim; j++) sum -= t[j] * row[j];
        t[i] = sum / splat(row[i]);
    }
}

/* out W = in, for rows; with back W out = in - b */
static void N(solve_rows)(const N(dense) *d, const layer *l, int64_t rows, const REAL *in, REAL *out, int back) {
    const int64_t dim = d->dim;
    const int is_lu = l->kind == LU;
    const REAL *lower = is_lu ? l->tensors[0] : d->weight;
    const int64_t lower_step = is_lu ? dim : d->step;
    for (int64_t start = 0; start < rows; start += LANES) {
        const int lanes = rows - start < LANES ? (int)(rows - start) : LANES;
        const REAL *sources[LANES];
        REAL *targets[LANES];
        for (int k = 0; k < LANES; k++) { /* lanes without work repeat the last row */
            const int64_t row = start + (k < lanes ? k : lanes - 1);
            sources[k] = in + row * dim;
            targets[k] = out + row * dim;
        }
        N(gather_columns)(d->tile, sources, (int)dim);
        if (back) N(solve_back)(d, is_lu, lower, lower_step, d->tile);
        else N(solve_transposed)(d, is_lu, lower, lower_step, d->tile);
        N(scatter_columns)(d->tile, targets, (int)dim, lanes);
    }
}

static void N(grads_of_lu)(const N(dense) *d, const layer *l, double total_ladj, REAL *grad_lu) {
    const int64_t dim = d->dim, step = d->step;
    const REAL *lu = l->tensors[0], *grad = d->grad_weight;
    for (int64_t i = 0; i < dim; i++) {
        REAL *row = grad_lu + i * dim;
        memcpy(row, grad + i * step, (size_t)dim * sizeof(REAL));
        for (int64_t j = 0; j < i; j++) {
            REAL sum = 0;
            for (int64_t k = j; k < dim; k++) sum += grad[i * step + k] * d->upper[j * step + k];
            row[j] = sum;
        }
        for (int64_t k = i + 1; k < dim; k++)
            for (int64_t j = i; j < dim; j++) row[j] += lu[k * dim + i] * grad[k * step + j];
        row[i] = R(row[i] * d->upper[i * step + i] + total_ladj);
    }
}

static void N(grads_of_triangle)(const N(dense) *d, const layer *l, double total_ladj, const REAL *grad_bias,
                                 REAL *grad_loc, REAL *grad_scale, REAL *grad_lower) {
    const int64_t dim = d->dim, step = d->step;
    const REAL *units = l->tensors[1], *grad = d->grad_weight;
    for (int64_t i = 0; i < dim; i++) {
        REAL *row = grad_lower + i * dim; /* first of the derivative with respect to A */
        double loc = 0, sum = 0;
        memset(row, 0, (size_t)dim * sizeof(REAL));
        for (int64_t k = i; k < dim; k++) {
            const REAL unit = units[k * dim + i];
            for (int64_t j = 0; j <= i; j++) row[j] += unit * grad[k * step + j];
            loc += (double)unit * grad_bias[k];
        }
        grad_loc[i] = R(l->rate * loc);
        for (int64_t j = 0; j <= i; j++) sum += (double)row[j] * d->scaled[i * step + j];
        grad_scale[i] = R(l->rate * (sum + total_ladj));
        row[i] = 0;
        for (int64_t j = 0; j < i; j++) row[j] *= R(l->matrix_rate) * d->scale[i];
    }
}

/* ladj: of all rows together, added to; so are they in the next functions */
static int N(run_dense)(const layer *l, int64_t rows, int64_t dim, const REAL *in, REAL *out, double *ladj) {
    N(dense) d;
    if (N(open_dense)(&d, l, dim)) return -1;
    N(multiply_rows)(&d, rows, in, d.transposed, d.bias, out);
    *ladj += d.ladj;
    free(d.memory);
    return 0;
}

/* from out to in; ladj is that of the map forward, to be taken away */
static int N(pull_dense)(const layer *l, int64_t rows, int64_t dim, const REAL *out, REAL *in, double *ladj) {
    N(dense) d;
    if (N(open_dense)(&d, l, dim)) return -1;
    N(solve_rows)(&d, l, rows, out, in, 1);
    *ladj += d.ladj;
    free(d.memory);
    return 0;
}

static int N(push_dense)(const layer *l, int64_t rows, int64_t dim, const REAL *in, REAL *out) {
    N(dense) d;
    if (N(open_dense)(&d, l, dim)) return -1;
    N(solve_rows)(&d, l, rows, in, out, 0);
    free(d.memory);
    return 0;
}

/* in may be read a vector beyond its end */
static int N(run_dense_backward)(const layer *l, int64_t rows, int64_t dim, const REAL *in, const REAL *grad_out,
                                 double total_ladj, REAL *grad_in) {
    N(dense) d;
    if (N(open_dense)(&d, l, dim)) return -1;
    REAL *grad_bias = l->kind == LU ? l->grads[1] : d.rows;
    N(multiply_rows)(&d, rows, grad_out, d.weight, NULL, grad_in);
    N(multiply)(dim, d.step, (int)rows, grad_out, 1, dim, in, dim, d.grad_weight, d.step, SET_SUM, NULL, 0);
    for (int64_t j = 0; j < dim; j++) grad_bias[j] = 0;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < dim; j++) grad_bias[j] += grad_out[i * dim + j];
    if (l->kind == LU) N(grads_of_lu)(&d, l, total_ladj, l->grads[0]);
    else N(grads_of_triangle)(&d, l, total_ladj, grad_bias, l->grads[2], l->grads[3], l->grads[4]);
    free(d.memory);
    return 0;
}

static inline REAL N(diagonal_scale)(const layer *l, int64_t j) {
    return R(((const REAL *)l->tensors[1])[j] * exp(l->rate * ((const REAL *)l->tensors[3])[j]));
}

static void N(run_diagonal)(const layer *l, int64_t rows, int64_t dim, const REAL *in, REAL *out, double *ladj) {
    const REAL *origin = l->tensors[0], *units = l->tensors[1], *raw_loc = l->tensors[2], *raw_scale = l->tensors[3];
    for (int64_t j = 0; j < dim; j++) {
        const REAL scale = N(diagonal_scale)(l, j), loc = R(origin[j] + l->rate * units[j] * raw_loc[j]);
        for (int64_t i = 0; i < rows; i++) out[i * dim + j] = in[i * dim + j] * scale + loc;
        *ladj += log((double)units[j]) + l->rate * raw_scale[j];
    }
}

static void N(pull_diagonal)(const layer *l, int64_t rows, int64_t dim, const REAL *out, REAL *in, double *ladj) {
    const REAL *origin = l->tensors[0], *units = l->tensors[1], *raw_loc = l->tensors[2], *raw_scale = l->tensors[3];
    for (int64_t j = 0; j < dim; j++) {
        const REAL scale = N(diagonal_scale)(l, j), loc = R(origin[j] + l->rate * units[j] * raw_loc[j]);
        for (int64_t i = 0; i < rows; i++) in[i * dim + j] = (out[i * dim + j] - loc) / scale;
        *ladj += log((double)units[j]) + l->rate * raw_scale[j];
    }
}

static void N(push_diagonal)(const layer *l, int64_t rows, int64_t dim, const REAL *in, REAL *out) {
    for (int64_t j = 0; j < dim; j++) {
        const REAL scale = N(diagonal_scale)(l, j);
        for (int64_t i = 0; i < rows; i++) out[i * dim + j] = in[i * dim + j] / scale;
    }
}

static void N(run_diagonal_backward)(const layer *l, int64_t rows, int64_t dim, const REAL *in, const REAL *grad_out,
                                     double total_ladj, REAL *grad_in) {
    const REAL *units = l->tensors[1];
    REAL *grad_loc = l->grads[2], *grad_scale = l->grads[3];
    for (int64_t j = 0; j < dim; j++) {
        const REAL scale = N(diagonal_scale)(l, j);
        double loc = 0, sum = 0;
        for (int64_t i = 0; i < rows; i++) {
            const REAL grad = grad_out[i * dim + j];
            loc += grad;
            sum += (double)grad * in[i * dim + j];
            grad_in[i * dim + j] = grad * scale;
        }
        grad_loc[j] = R(l->rate * units[j] * loc);
        grad_scale[j] = R(l->rate * (sum * scale + total_ladj));
    }
}

/* out[:, j] = in[:, order[j]], which carries derivatives, too; or the other way round */
static void N(permute)(const layer *l, int64_t rows, int64_t dim, const REAL *in, REAL *out, int back) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < dim; j++) {
            const int64_t one = i * dim + j, other = i * dim + l->order[j];
            if (back) out[other] = in[one];
            else out[one] = in[other];
        }
}
