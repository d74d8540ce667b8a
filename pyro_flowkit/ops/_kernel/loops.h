/* The loops over rows and columns of one instance, see vector.h; they allocate no more than a few tiles. */

/* Tiles, tables and sums of one call, carved from one block of memory. */
typedef struct {
    void *memory;
    N(settings) settings;
    vec *tile;
    REAL *tables; /* one for every shared column */
    double *ladj_sums; /* of the rows of one block */
    double *sums; /* derivatives with respect to the bins of shared splines */
} N(workspace);

static void *N(carve)(char **at, size_t bytes) {
    void *here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

static int N(open)(N(workspace) *w, const problem *p, const REAL *shared_params) {
    const int count_bins = p->count_bins;
    const size_t length = (size_t)count_bins + 1;
    const size_t table = TABLE_ROWS * length * sizeof(REAL);
    const size_t sizes[] = {2 * length * sizeof(double), 2 * (size_t)count_bins * (sizeof(vec) + sizeof(wide)), (size_t)p->num_shared * table,
                            BLOCK_ROWS * sizeof(double),
                            (size_t)p->num_shared * SUMS * (size_t)count_bins * sizeof(double)};
    size_t bytes = 64;
    for (int i = 0; i < 5; i++) bytes += (sizes[i] + 63) / 64 * 64;
    w->memory = malloc(bytes);
    if (!w->memory) return -1;
    char *at = (char *)(((uintptr_t)w->memory + 63) / 64 * 64);
    double *base = N(carve)(&at, sizes[0]);
    w->tile = N(carve)(&at, sizes[1]);
    w->tables = N(carve)(&at, sizes[2]);
    w->ladj_sums = N(carve)(&at, sizes[3]);
    w->sums = N(carve)(&at, sizes[4]);
    memset(w->sums, 0, sizes[4]);

    N(settings) *s = &w->settings;
    s->count_bins = count_bins;
    s->num_params = p->num_params;
    s->num_slopes = p->num_params - 2 * count_bins;
    s->tails = p->tails;
    s->bound = (REAL)p->bound;
    s->min_slope = (REAL)p->min_slope;
    s->slope_offset = (REAL)log(expm1(1 - p->min_slope));
    for (int which = 0; which < 2; which++) {
        const double minimum = which ? p->min_bin_height : p->min_bin_width;
        s->step[which] = 2 * p->bound * minimum;
        s->rest[which] = 2 * p->bound * (1 - minimum * count_bins);
        for (int j = 0; j <= count_bins; j++) base[which * length + j] = 2 * p->bound * minimum * j - p->bound;
        s->base[which] = base + which * length;
    }
    for (int64_t first = 0; first < p->num_shared; first += LANES) {
        const REAL *rows[LANES];
        int64_t left = p->num_shared - first;
        for (int l = 0; l < LANES; l++) rows[l] = shared_params + (first + (l < left ? l : 0)) * p->num_params;
        N(fill_tables)(rows, s, w->tile, w->tables + first * TABLE_ROWS * length, left < LANES ? (int)left : LANES);
    }
    return 0;
}

/* Rows start to stop. params points to the parameters of row start; those of a row are row_step numbers further on. */
static inline void N(run_block)(const problem *p, const N(workspace) *w, int inverse, int64_t start, int64_t stop,
                                const REAL *input, const REAL *params, int64_t row_step, REAL *value, REAL *ladj) {
    const N(settings) *s = &w->settings;
    const size_t table = TABLE_ROWS * ((size_t)p->count_bins + 1);
    int64_t at[LANES];
    REAL x[LANES];
    vec y, l;
    for (int64_t i = start; i < stop; i++) w->ladj_sums[i - start] = 0;
    if (p->num_own + p->num_shared < p->dim) {
        const size_t bytes = (size_t)((stop - start) * p->dim) * sizeof(REAL);
        memcpy(value + start * p->dim, input + start * p->dim, bytes);
        if (!p->sum_ladj) memset(ladj + start * p->dim, 0, bytes);
    }
    for (int64_t column = 0; column < p->num_shared; column++) {
        for (int64_t i = start; i < stop; i += LANES) {
            const int lanes = stop - i < LANES ? (int)(stop - i) : LANES;
            for (int k = 0; k < LANES; k++) {
                at[k] = (i + (k < lanes ? k : 0)) * p->dim + p->shared[column];
                x[k] = input[at[k]];
            }
            N(run_shared)(N(load)(x), w->tables + column * table, s, inverse, &y, &l);
            for (int k = 0; k < lanes; k++) {
                value[at[k]] = LANE(y, k);
                if (p->sum_ladj) w->ladj_sums[i - start + k] += LANE(l, k);
                else ladj[at[k]] = LANE(l, k);
            }
        }
    }
    int64_t row = start, column = 0, left = (stop - start) * p->num_own;
    for (; left > 0; left -= LANES) {
        const int lanes = left < LANES ? (int)left : LANES;
        const REAL *rows[LANES];
        int64_t row_of[LANES];
        for (int k = 0; k < LANES; k++) { /* lanes without work repeat the last spline */
            rows[k] = params + (row - start) * row_step + column * p->num_params;
            row_of[k] = row;
            at[k] = row * p->dim + p->own[column];
            x[k] = input[at[k]];
            if (k + 1 < left && ++column == p->num_own) column = 0, row++;
        }
        N(run_own)(N(load)(x), rows, s, inverse, w->tile, &y, &l);
        for (int k = 0; k < lanes; k++) {
            value[at[k]] = LANE(y, k);
            if (p->sum_ladj) w->ladj_sums[row_of[k] - start] += LANE(l, k);
            else ladj[at[k]] = LANE(l, k);
        }
    }
    if (p->sum_ladj)
        for (int64_t i = start; i < stop; i++) ladj[i] = (REAL)w->ladj_sums[i - start];
}

/* The same rows backwards; grad_value and grad_ladj may be NULL, for zeros. */
static inline void N(run_block_backward)(const problem *p, const N(workspace) *w, int inverse, int64_t start, int64_t stop,
                                         const REAL *input, const REAL *params, int64_t row_step,
                                         const REAL *grad_value, const REAL *grad_ladj, REAL *grad_input,
                                         REAL *grad_params) {
    const N(settings) *s = &w->settings;
    const size_t table = TABLE_ROWS * ((size_t)p->count_bins + 1), sums_of_one = SUMS * (size_t)p->count_bins;
    int64_t at[LANES];
    REAL x[LANES], gy[LANES], gl[LANES];
    vec gx;
    if (p->num_own + p->num_shared < p->dim) {
        const size_t bytes = (size_t)((stop - start) * p->dim) * sizeof(REAL);
        if (grad_value) memcpy(grad_input + start * p->dim, grad_value + start * p->dim, bytes);
        else memset(grad_input + start * p->dim, 0, bytes);
    }
    for (int64_t column = 0; column < p->num_shared; column++) {
        for (int64_t i = start; i < stop; i += LANES) {
            const int lanes = stop - i < LANES ? (int)(stop - i) : LANES;
            for (int k = 0; k < LANES; k++) {
                const int64_t row = i + (k < lanes ? k : 0);
                at[k] = row * p->dim + p->shared[column];
                x[k] = input[at[k]];
                gy[k] = grad_value ? grad_value[at[k]] : 0;
                gl[k] = grad_ladj ? grad_ladj[p->sum_ladj ? row : at[k]] : 0;
            }
            gx = N(run_shared_backward)(N(load)(x), w->tables + column * table, s, inverse, N(load)(gy), N(load)(gl),
                                        w->sums + column * sums_of_one, lanes);
            for (int k = 0; k < lanes; k++) grad_input[at[k]] = LANE(gx, k);
        }
    }
    int64_t row = start, column = 0, left = (stop - start) * p->num_own;
    for (; left > 0; left -= LANES) {
        const int lanes = left < LANES ? (int)left : LANES;
        const REAL *rows[LANES];
        REAL *grad_rows[LANES];
        for (int k = 0; k < LANES; k++) {
            const int64_t offset = (row - start) * row_step + column * p->num_params;
            rows[k] = params + offset;
            grad_rows[k] = grad_params + offset;
            at[k] = row * p->dim + p->own[column];
            x[k] = input[at[k]];
            gy[k] = grad_value ? grad_value[at[k]] : 0;
            gl[k] = grad_ladj ? grad_ladj[p->sum_ladj ? row : at[k]] : 0;
            if (k + 1 < left && ++column == p->num_own) column = 0, row++;
        }
        gx = N(run_own_backward)(N(load)(x), rows, s, inverse, w->tile, N(load)(gy), N(load)(gl), grad_rows, lanes);
        for (int k = 0; k < lanes; k++) grad_input[at[k]] = LANE(gx, k);
    }
}

static void N(finish_all_shared)(const problem *p, const N(workspace) *w, const REAL *shared_params, REAL *grad_shared) {
    const size_t sums_of_one = SUMS * (size_t)p->count_bins;
    for (int64_t column = 0; column < p->num_shared; column++)
        N(finish_shared)(shared_params + column * p->num_params, w->sums + column * sums_of_one, &w->settings,
                         grad_shared + column * p->num_params);
}

/* the direction is known to the compiler in each of the two */
static void N(run_rows)(const problem *p, const N(workspace) *w, int64_t start, int64_t stop, const REAL *input,
                        const REAL *params, int64_t row_step, REAL *value, REAL *ladj) {
    if (p->inverse) N(run_block)(p, w, 1, start, stop, input, params, row_step, value, ladj);
    else N(run_block)(p, w, 0, start, stop, input, params, row_step, value, ladj);
}

static void N(run_rows_backward)(const problem *p, const N(workspace) *w, int64_t start, int64_t stop, const REAL *input,
                                 const REAL *params, int64_t row_step, const REAL *grad_value, const REAL *grad_ladj,
                                 REAL *grad_input, REAL *grad_params) {
    if (p->inverse)
        N(run_block_backward)(p, w, 1, start, stop, input, params, row_step, grad_value, grad_ladj, grad_input, grad_params);
    else
        N(run_block_backward)(p, w, 0, start, stop, input, params, row_step, grad_value, grad_ladj, grad_input, grad_params);
}

static int N(run)(const problem *p, const REAL *input, const REAL *params, const REAL *shared_params, REAL *value,
                  REAL *ladj) {
    N(workspace) w;
    if (N(open)(&w, p, shared_params)) return -1;
    const int64_t row_step = p->num_own * p->num_params;
    for (int64_t start = 0; start < p->rows; start += BLOCK_ROWS) {
        const int64_t stop = start + BLOCK_ROWS < p->rows ? start + BLOCK_ROWS : p->rows;
        N(run_rows)(p, &w, start, stop, input, OFFSET(params, start * row_step), row_step, value, ladj);
    }
    free(w.memory);
    return 0;
}

static int N(run_backward)(const problem *p, const REAL *input, const REAL *params, const REAL *shared_params,
                           const REAL *grad_value, const REAL *grad_ladj, REAL *grad_input, REAL *grad_params,
                           REAL *grad_shared) {
    N(workspace) w;
    if (N(open)(&w, p, shared_params)) return -1;
    const int64_t row_step = p->num_own * p->num_params;
    for (int64_t start = 0; start < p->rows; start += BLOCK_ROWS) {
        const int64_t stop = start + BLOCK_ROWS < p->rows ? start + BLOCK_ROWS : p->rows;
        N(run_rows_backward)(p, &w, start, stop, input, OFFSET(params, start * row_step), row_step, grad_value, grad_ladj,
                             grad_input, OFFSET(grad_params, start * row_step));
    }
    N(finish_all_shared)(p, &w, shared_params, grad_shared);
    free(w.memory);
    return 0;
}
