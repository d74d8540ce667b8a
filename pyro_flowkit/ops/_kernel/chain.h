/* The layers of a flow one after the other: values and log-dets, the derivative of log q along with a draw, and the
 * backward pass; and the way back from values to inputs, with its own backward pass. One instance.
 *
 * kept holds the inputs of all layers and the values, (rows, dim) each, and then what the layers keep; what the way back
 * keeps is no use to the way forward.
 */

static REAL *N(kept_of_layer)(const chain *c, int number, REAL *kept) {
    kept += (c->num_layers + 1) * c->rows * c->dim;
    for (int i = 0; i < number; i++) kept += kernel_kept_of_layer(&c->layers[i], c->rows);
    return kept;
}

static problem N(splines_of)(const chain *c, const layer *l) {
    problem p = l->splines;
    p.rows = c->rows;
    p.sum_ladj = 1;
    p.inverse = 0;
    return p;
}

/* value and ladj: (rows, dim) and (rows,) */
static int N(run_chain)(const chain *c, const REAL *input, REAL *value, REAL *ladj, REAL *kept) {
    const int64_t rows = c->rows, dim = c->dim, size = rows * dim;
    double of_all = 0, *sums = calloc((size_t)rows + 1, sizeof(double));
    int failed = !sums;
    REAL *x = kept;
    if (!failed) memcpy(x, input, (size_t)size * sizeof(REAL));
    for (int i = 0; i < c->num_layers && !failed; i++, x += size) {
        const layer *l = &c->layers[i];
        REAL *y = x + size, *own = N(kept_of_layer)(c, i, kept);
        if (l->kind == COUPLING) {
            const REAL *weights[MAX_LAYERS], *biases[MAX_LAYERS];
            const problem p = N(splines_of)(c, l);
            N(unpack)(&l->network, l->tensors[0], weights, biases);
            failed = N(couple)(&p, &l->network, x, NULL, l->tensors[1], weights, biases, y, ladj, own);
            for (int64_t r = 0; r < rows && !failed; r++) sums[r] += ladj[r];
        } else if (l->kind == HIERARCHY) {
            failed = N(run_hierarchy)(l, rows, dim, x, y, own, sums);
        } else if (l->kind == PERMUTATION) {
            N(permute)(l, rows, dim, x, y, 0);
        } else if (l->kind == DIAGONAL) {
            N(run_diagonal)(l, rows, dim, x, y, &of_all);
        } else {
            failed = N(run_dense)(l, rows, dim, x, y, &of_all);
        }
    }
    if (!failed) memcpy(value, x, (size_t)size * sizeof(REAL));
    for (int64_t r = 0; r < rows && !failed; r++) ladj[r] = R(sums[r] + of_all);
    free(sums);
    return failed;
}

/* with respect to a coupling's values, through the inverses of its splines; room is for 2 rows + all shared parameters */
static int N(push_coupling)(const chain *c, const layer *l, const REAL *value, REAL *own, const REAL *grad, REAL *pushed,
                            REAL *between, REAL *room) {
    const REAL *weights[MAX_LAYERS], *biases[MAX_LAYERS];
    problem p = N(splines_of)(c, l);
    const int64_t num_shared = p.num_shared;
    REAL *ones = room, *unused = room + c->rows;
    for (int64_t r = 0; r < c->rows; r++) ones[r] = 1;
    N(unpack)(&l->network, l->tensors[0], weights, biases);
    p.inverse = 1;
    p.num_shared = 0;
    if (N(couple_backward)(&p, &l->network, value, NULL, weights, own, grad, ones, num_shared ? between : pushed, NULL,
                           NULL, NULL))
        return -1;
    if (!num_shared) return 0;
    p.num_shared = num_shared;
    p.num_own = 0;
    return N(run_backward)(&p, value, NULL, l->tensors[1], between, ones, pushed, NULL, unused);
}

/* derivative: of log q with respect to the chain's input; pushed: to its value; at_cut and at_last: to the input of layer
 * cut, and to that of the last */
static int N(push_chain)(const chain *c, const REAL *derivative, REAL *kept, int cut, REAL *at_cut, REAL *at_last,
                         REAL *pushed) {
    const int64_t rows = c->rows, dim = c->dim, size = rows * dim;
    int64_t room = rows;
    for (int i = 0; i < c->num_layers; i++) {
        const problem *p = &c->layers[i].splines;
        const int64_t needed = rows + p->num_shared * p->num_params;
        if (c->layers[i].kind == COUPLING && needed > room) room = needed;
    }
    REAL *memory = malloc((size_t)(3 * size + room + 1) * sizeof(REAL));
    if (!memory) return -1;
    REAL *now = memory, *next = memory + size, *between = next + size;
    int failed = 0;
    memcpy(now, derivative, (size_t)size * sizeof(REAL));
    for (int i = 0; i < c->num_layers && !failed; i++) {
        const layer *l = &c->layers[i];
        const REAL *x = kept + i * size;
        REAL *own = N(kept_of_layer)(c, i, kept);
        if (i == cut) memcpy(at_cut, now, (size_t)size * sizeof(REAL));
        if (i == c->num_layers - 1) memcpy(at_last, now, (size_t)size * sizeof(REAL));
        if (l->kind == COUPLING) failed = N(push_coupling)(c, l, x + size, own, now, next, between, between + size);
        else if (l->kind == HIERARCHY) failed = N(push_hierarchy)(l, rows, dim, x, x + size, own, now, next);
        else if (l->kind == PERMUTATION) N(permute)(l, rows, dim, now, next, 0);
        else if (l->kind == DIAGONAL) N(push_diagonal)(l, rows, dim, now, next);
        else failed = N(push_dense)(l, rows, dim, now, next);
        REAL *before = now;
        now = next;
        next = before;
    }
    if (cut == c->num_layers && !failed) memcpy(at_cut, now, (size_t)size * sizeof(REAL));
    if (!failed) memcpy(pushed, now, (size_t)size * sizeof(REAL));
    free(memory);
    return failed;
}

/* Mean squares of what arrives at the last layer's input, per unit of the rows' weights, c (d log q - d log p) or
 * -c d log p: of the difference of the two derivatives, and of the one of log p. of_q is that of log q there. */
static void N(mean_squares)(int64_t rows, int64_t dim, const REAL *grad, const REAL *weight, const REAL *of_q, int is_path,
                            REAL *squares) {
    double difference = 0, of_p = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < dim; j++) {
            const double found = -(double)grad[r * dim + j] / weight[r], q = of_q[r * dim + j];
            const double one = is_path ? found : found - q, other = is_path ? found + q : found;
            difference += one * one;
            of_p += other * other;
        }
    squares[0] = R(difference / (double)(rows * dim));
    squares[1] = R(of_p / (double)(rows * dim));
}

/* grad_ladj may be NULL, for zeros; the derivatives of parameters go where the layers say; squares, of two numbers, may
 * be NULL */
static int N(run_chain_backward)(const chain *c, REAL *kept, const REAL *grad_value, const REAL *grad_ladj,
                                 REAL *grad_input, const REAL *weight, const REAL *of_q, int is_path, REAL *squares) {
    const int64_t rows = c->rows, dim = c->dim, size = rows * dim;
    REAL *memory = malloc((size_t)(2 * size + 1) * sizeof(REAL));
    if (!memory) return -1;
    REAL *now = memory, *next = memory + size;
    double total = 0;
    int failed = 0;
    memcpy(now, grad_value, (size_t)size * sizeof(REAL));
    for (int64_t r = 0; r < rows && grad_ladj; r++) total += grad_ladj[r];
    for (int i = c->num_layers - 1; i >= 0 && !failed; i--) {
        const layer *l = &c->layers[i];
        const REAL *x = kept + i * size;
        REAL *own = N(kept_of_layer)(c, i, kept);
        if (l->kind == COUPLING) {
            const REAL *weights[MAX_LAYERS], *biases[MAX_LAYERS];
            const problem p = N(splines_of)(c, l);
            N(unpack)(&l->network, l->tensors[0], weights, biases);
            failed = N(couple_backward)(&p, &l->network, x, l->tensors[1], weights, own, now, grad_ladj, next, NULL,
                                        l->grads[1], l->grads[0]);
        } else if (l->kind == HIERARCHY) {
            failed = N(run_hierarchy_backward)(l, rows, dim, x, x + size, own, now, grad_ladj, next);
        } else if (l->kind == PERMUTATION) {
            N(permute)(l, rows, dim, now, next, 1);
        } else if (l->kind == DIAGONAL) {
            N(run_diagonal_backward)(l, rows, dim, x, now, total, next);
        } else {
            failed = N(run_dense_backward)(l, rows, dim, x, now, total, next);
        }
        if (squares && i == c->num_layers - 1) N(mean_squares)(rows, dim, next, weight, of_q, is_path, squares);
        REAL *before = now;
        now = next;
        next = before;
    }
    if (!failed) memcpy(grad_input, now, (size_t)size * sizeof(REAL));
    free(memory);
    return failed;
}

/* between: room for (rows, dim), where the part that passes is on its way */
static int N(pull_coupling)(const chain *c, const layer *l, const REAL *value, REAL *input, REAL *own, REAL *ladj,
                            double *sums, REAL *between) {
    const REAL *weights[MAX_LAYERS], *biases[MAX_LAYERS];
    problem p = N(splines_of)(c, l);
    const int64_t num_own = p.num_own;
    N(unpack)(&l->network, l->tensors[0], weights, biases);
    p.inverse = 1;
    if (p.num_shared) {
        p.num_own = 0;
        if (N(run)(&p, value, NULL, l->tensors[1], between, ladj)) return -1;
        for (int64_t r = 0; r < c->rows; r++) sums[r] += ladj[r];
        p.num_own = num_own;
        p.num_shared = 0;
        value = between;
    }
    if (N(couple)(&p, &l->network, value, NULL, NULL, weights, biases, input, ladj, own)) return -1;
    for (int64_t r = 0; r < c->rows; r++) sums[r] += ladj[r];
    return 0;
}

/* from value to input, (rows, dim); ladj, (rows,), is that of this way */
static int N(pull_chain)(const chain *c, const REAL *value, REAL *input, REAL *ladj, REAL *kept) {
    const int64_t rows = c->rows, dim = c->dim, size = rows * dim;
    double of_all = 0, *sums = calloc((size_t)rows + 1, sizeof(double));
    REAL *between = malloc((size_t)(size + 1) * sizeof(REAL));
    int failed = !sums || !between;
    REAL *y = kept + c->num_layers * size;
    if (!failed) memcpy(y, value, (size_t)size * sizeof(REAL));
    for (int i = c->num_layers - 1; i >= 0 && !failed; i--, y -= size) {
        const layer *l = &c->layers[i];
        REAL *x = y - size, *own = N(kept_of_layer)(c, i, kept);
        if (l->kind == COUPLING) failed = N(pull_coupling)(c, l, y, x, own, ladj, sums, between);
        else if (l->kind == PERMUTATION) N(permute)(l, rows, dim, y, x, 1);
        else if (l->kind == DIAGONAL) N(pull_diagonal)(l, rows, dim, y, x, &of_all);
        else failed = N(pull_dense)(l, rows, dim, y, x, &of_all);
    }
    if (!failed) memcpy(input, y, (size_t)size * sizeof(REAL));
    for (int64_t r = 0; r < rows && !failed; r++) ladj[r] = R(sums[r] - of_all);
    free(between);
    free(sums);
    return failed;
}

/* grad: with respect to a coupling's inputs; pulled: to its values; room is for two arrays of (rows, dim) */
static int N(pull_coupling_backward)(const chain *c, const layer *l, const REAL *value, const REAL *input, REAL *own,
                                     const REAL *grad, const REAL *grad_ladj, REAL *pulled, REAL *room) {
    const REAL *weights[MAX_LAYERS], *biases[MAX_LAYERS];
    const int64_t size = c->rows * c->dim;
    problem p = N(splines_of)(c, l);
    const int64_t num_shared = p.num_shared;
    REAL *between = room, *grad_between = room + size;
    N(unpack)(&l->network, l->tensors[0], weights, biases);
    p.inverse = 1;
    p.num_shared = 0;
    if (num_shared) { /* what pull_coupling had there */
        memcpy(between, value, (size_t)size * sizeof(REAL));
        for (int64_t r = 0; r < c->rows; r++)
            for (int64_t j = 0; j < num_shared; j++) {
                const int64_t at = r * c->dim + p.shared[j];
                between[at] = input[at];
            }
    }
    if (N(couple_backward)(&p, &l->network, num_shared ? between : value, NULL, weights, own, grad, grad_ladj,
                           num_shared ? grad_between : pulled, NULL, NULL, l->grads[0]))
        return -1;
    if (!num_shared) return 0;
    p.num_shared = num_shared;
    p.num_own = 0;
    return N(run_backward)(&p, value, NULL, l->tensors[1], grad_between, grad_ladj, pulled, NULL, l->grads[1]);
}

/* The way back, backwards. With h = J^-T grad the derivative with respect to an affine layer's values, that with respect
 * to its parameters is the one of its way forward for -h, and log-dets count with the other sign. */
static int N(pull_chain_backward)(const chain *c, REAL *kept, const REAL *grad_input, const REAL *grad_ladj,
                                  REAL *grad_value) {
    const int64_t rows = c->rows, dim = c->dim, size = rows * dim;
    REAL *memory = malloc((size_t)(4 * size + 1) * sizeof(REAL));
    if (!memory) return -1;
    REAL *now = memory, *next = memory + size, *room = next + size;
    double total = 0;
    int failed = 0;
    memcpy(now, grad_input, (size_t)size * sizeof(REAL));
    for (int64_t r = 0; r < rows && grad_ladj; r++) total -= grad_ladj[r];
    for (int i = 0; i < c->num_layers && !failed; i++) {
        const layer *l = &c->layers[i];
        const REAL *x = kept + i * size, *y = x + size;
        if (l->kind == COUPLING) {
            REAL *own = N(kept_of_layer)(c, i, kept);
            failed = N(pull_coupling_backward)(c, l, y, x, own, now, grad_ladj, next, room);
        } else if (l->kind == PERMUTATION) {
            N(permute)(l, rows, dim, now, next, 0);
        } else {
            if (l->kind == DIAGONAL) N(push_diagonal)(l, rows, dim, now, next);
            else failed = N(push_dense)(l, rows, dim, now, next);
            for (int64_t j = 0; j < size && !failed; j++) now[j] = -next[j];
            if (l->kind == DIAGONAL) N(run_diagonal_backward)(l, rows, dim, x, now, total, room);
            else if (!failed) failed = N(run_dense_backward)(l, rows, dim, x, now, total, room);
        }
        REAL *before = now;
        now = next;
        next = before;
    }
    if (!failed) memcpy(grad_value, now, (size_t)size * sizeof(REAL));
    free(memory);
    return failed;
}
