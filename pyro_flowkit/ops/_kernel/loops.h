/* The loops over rows and columns of one instance, see vector.h; they allocate no more than a few tiles. */

/* Tiles, tables and sums of one call, carved from one block of memory. */
typedef struct {
    void *memory;
    N(settings) settings;
    vec *tile;
    REAL *tables; /* one for every shared column */
    double *ladj_sums; /* of the rows of one block */
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
                            BLOCK_ROWS * sizeof(double)};
    size_t bytes = 64;
    for (int i = 0; i < 4; i++) bytes += (sizes[i] + 63) / 64 * 64;
    w->memory = malloc(bytes);
    if (!w->memory) return -1;
    char *at = (char *)(((uintptr_t)w->memory + 63) / 64 * 64);
    double *base = N(carve)(&at, sizes[0]);
    w->tile = N(carve)(&at, sizes[1]);
    w->tables = N(carve)(&at, sizes[2]);
    w->ladj_sums = N(carve)(&at, sizes[3]);

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

/* value: (rows, dim); ladj: (rows,) if summed, else (rows, dim) */
static inline int N(run_one_way)(const problem *p, int inverse, const REAL *input, const REAL *params,
                                 const REAL *shared_params, REAL *value, REAL *ladj) {
    N(workspace) w;
    if (N(open)(&w, p, shared_params)) return -1;
    const N(settings) *s = &w.settings;
    const size_t table = TABLE_ROWS * ((size_t)p->count_bins + 1);
    for (int64_t start = 0; start < p->rows; start += BLOCK_ROWS) {
        const int64_t stop = start + BLOCK_ROWS < p->rows ? start + BLOCK_ROWS : p->rows;
        for (int64_t i = start; i < stop; i++) w.ladj_sums[i - start] = 0;
        if (p->num_own + p->num_shared < p->dim) {
            memcpy(value + start * p->dim, input + start * p->dim, (size_t)((stop - start) * p->dim) * sizeof(REAL));
            if (!p->sum_ladj) memset(ladj + start * p->dim, 0, (size_t)((stop - start) * p->dim) * sizeof(REAL));
        }
        int64_t at[LANES];
        REAL x[LANES];
        vec y, l;
        for (int64_t column = 0; column < p->num_shared; column++) {
            for (int64_t i = start; i < stop; i += LANES) {
                const int lanes = stop - i < LANES ? (int)(stop - i) : LANES;
                for (int k = 0; k < LANES; k++) {
                    at[k] = (i + (k < lanes ? k : 0)) * p->dim + p->shared[column];
                    x[k] = input[at[k]];
                }
                N(run_shared)(N(load)(x), w.tables + column * table, s, inverse, &y, &l);
                for (int k = 0; k < lanes; k++) {
                    value[at[k]] = LANE(y, k);
                    if (p->sum_ladj) w.ladj_sums[i - start + k] += LANE(l, k);
                    else ladj[at[k]] = LANE(l, k);
                }
            }
        }
        int64_t row = start, column = 0;
        for (int64_t n = start * p->num_own; n < stop * p->num_own; n += LANES) {
            const int64_t left = stop * p->num_own - n;
            const int lanes = left < LANES ? (int)left : LANES;
            const REAL *rows[LANES];
            int64_t row_of[LANES];
            for (int k = 0; k < LANES; k++) {
                rows[k] = params + (n + (k < lanes ? k : 0)) * p->num_params;
                row_of[k] = row;
                at[k] = row * p->dim + p->own[column];
                x[k] = input[at[k]];
                if (k + 1 < lanes || (k + 1 == lanes && left > LANES)) {
                    if (++column == p->num_own) column = 0, row++;
                }
            }
            N(run_own)(N(load)(x), rows, s, inverse, w.tile, &y, &l);
            for (int k = 0; k < lanes; k++) {
                value[at[k]] = LANE(y, k);
                if (p->sum_ladj) w.ladj_sums[row_of[k] - start] += LANE(l, k);
                else ladj[at[k]] = LANE(l, k);
            }
        }
        if (p->sum_ladj)
            for (int64_t i = start; i < stop; i++) ladj[i] = (REAL)w.ladj_sums[i - start];
    }
    free(w.memory);
    return 0;
}

/* grad_value and grad_ladj may be NULL, for zeros */
static inline int N(run_backward_one_way)(const problem *p, int inverse, const REAL *input, const REAL *params,
                                          const REAL *shared_params, const REAL *grad_value, const REAL *grad_ladj,
                                          REAL *grad_input, REAL *grad_params, REAL *grad_shared) {
    N(workspace) w;
    if (N(open)(&w, p, shared_params)) return -1;
    const N(settings) *s = &w.settings;
    const size_t table = TABLE_ROWS * ((size_t)p->count_bins + 1), sums_of_one = SUMS * (size_t)p->count_bins;
    double *sums = calloc((size_t)p->num_shared * sums_of_one + 1, sizeof(double));
    if (!sums) {
        free(w.memory);
        return -1;
    }
    for (int64_t start = 0; start < p->rows; start += BLOCK_ROWS) {
        const int64_t stop = start + BLOCK_ROWS < p->rows ? start + BLOCK_ROWS : p->rows;
        if (p->num_own + p->num_shared < p->dim) {
            const size_t bytes = (size_t)((stop - start) * p->dim) * sizeof(REAL);
            if (grad_value) memcpy(grad_input + start * p->dim, grad_value + start * p->dim, bytes);
            else memset(grad_input + start * p->dim, 0, bytes);
        }
        int64_t at[LANES];
        REAL x[LANES], gy[LANES], gl[LANES];
        vec gx;
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
                gx = N(run_shared_backward)(N(load)(x), w.tables + column * table, s, inverse, N(load)(gy), N(load)(gl), sums + column * sums_of_one, lanes);
                for (int k = 0; k < lanes; k++) grad_input[at[k]] = LANE(gx, k);
            }
        }
        int64_t row = start, column = 0;
        for (int64_t n = start * p->num_own; n < stop * p->num_own; n += LANES) {
            const int64_t left = stop * p->num_own - n;
            const int lanes = left < LANES ? (int)left : LANES;
            const REAL *rows[LANES];
            REAL *grad_rows[LANES];
            for (int k = 0; k < LANES; k++) {
                rows[k] = params + (n + (k < lanes ? k : 0)) * p->num_params;
                grad_rows[k] = grad_params + (n + (k < lanes ? k : 0)) * p->num_params;
                at[k] = row * p->dim + p->own[column];
                x[k] = input[at[k]];
                gy[k] = grad_value ? grad_value[at[k]] : 0;
                gl[k] = grad_ladj ? grad_ladj[p->sum_ladj ? row : at[k]] : 0;
                if (k + 1 < lanes || (k + 1 == lanes && left > LANES)) {
                    if (++column == p->num_own) column = 0, row++;
                }
            }
            gx = N(run_own_backward)(N(load)(x), rows, s, inverse, w.tile, N(load)(gy), N(load)(gl), grad_rows, lanes);
            for (int k = 0; k < lanes; k++) grad_input[at[k]] = LANE(gx, k);
        }
    }
    for (int64_t column = 0; column < p->num_shared; column++)
        N(finish_shared)(shared_params + column * p->num_params, sums + column * sums_of_one, s,
                         grad_shared + column * p->num_params);
    free(sums);
    free(w.memory);
    return 0;
}

/* the direction is known to the compiler */
static int N(run)(const problem *p, const REAL *input, const REAL *params, const REAL *shared_params, REAL *value,
                  REAL *ladj) {
    return p->inverse ? N(run_one_way)(p, 1, input, params, shared_params, value, ladj)
                      : N(run_one_way)(p, 0, input, params, shared_params, value, ladj);
}

static int N(run_backward)(const problem *p, const REAL *input, const REAL *params, const REAL *shared_params,
                           const REAL *grad_value, const REAL *grad_ladj, REAL *grad_input, REAL *grad_params,
                           REAL *grad_shared) {
    return p->inverse ? N(run_backward_one_way)(p, 1, input, params, shared_params, grad_value, grad_ladj, grad_input,
                                                grad_params, grad_shared)
                      : N(run_backward_one_way)(p, 0, input, params, shared_params, grad_value, grad_ladj, grad_input,
                                                grad_params, grad_shared);
}
