/* The rational-quadratic spline of LANES inputs at once, forward, inverse and backward: one instance, see vector.h.
 *
 * The formulas are those of ops/rational_quadratic.py. With t = (x - x_k) / w, u = 1 - t, s = h / w, and
 *     Q = s (t^2 + u^2) + (d_0 + d_1) t u,    g = (s t^2 + d_0 t u) / Q,    M = d_1 t^2 + 2 s t u + d_0 u^2
 * the value is y = y_k + h g and the log-derivative L = log M + 2 log(s / Q). At fixed t and s,
 *     dy/dt  = h s M / Q^2                 dL/dt  = 2 (d_1 t - d_0 u + s (u - t)) / M - 2 (d_0 + d_1 - 2 s) (u - t) / Q
 *     dy/ds  = h (t^2 (1 - g) - u^2 g) / Q dL/ds  = 2 / s + 2 t u / M - 2 (t^2 + u^2) / Q
 *     dy/dd0 = h t u (1 - g) / Q           dL/dd0 = u^2 / M - 2 t u / Q
 *     dy/dd1 = - h t u g / Q               dL/dd1 = t^2 / M - 2 t u / Q
 * and t and s follow from x, x_k, w and h. The inverse x(y) has dx = (dy - sum of dy/dp dp) / (dy/dx) for the
 * parameters p, and the log-derivative -L: its backward pass is the forward's, with other incoming derivatives.
 */

/* what depends on the settings alone */
typedef struct {
    int count_bins, num_slopes, num_params, tails;
    REAL bound, min_slope, slope_offset;
    double step[2], rest[2]; /* a bin has the side step + rest * share, with the share of the softmax */
    const double *base[2];   /* knot j if every bin had the smallest side */
} N(settings);

/* The bin of every lane: how far the point is from its two knots on the side that was searched, its two knots on the
 * other side, both sides (more precise than differences of knots), and the slopes at the knots. */
typedef struct {
    vec from_low, to_high, low, high, width, height, slope0, slope1;
} N(bin);

/* where an input falls: its point within the box, its in-bin coordinates t and u = 1 - t */
typedef struct {
    vec point, t, u;
    mask outside, lost; /* lost: too large to have a phase, which circular tails need */
} N(place);

/* Derivatives with respect to the input, to the knots, sides and slopes of the bin; the sides' are at fixed t and g,
 * so that at a knot which is pinned to a bound nothing large has to cancel. */
typedef struct {
    vec input, x0, x1, width, y0, y1, height, slope0, slope1;
} N(gradient);

static inline vec N(softplus)(vec x, vec *derivative) {
    vec e = N(exponential)(-N(absolute)(x));
    mask positive = x > splat(0);
    *derivative = select(positive, splat(1), e) / (e + R(1.0));
    return select(positive, x, splat(0)) + N(logarithm_of_one_plus)(e);
}

/* ---- from an input to its place and back ---- */

static inline N(place) N(enter_box)(vec input, const N(settings) *s) {
    N(place) p;
    const vec bound = splat(s->bound);
    p.outside = N(absolute)(input) > bound;
    p.lost = p.outside ^ p.outside;
    p.point = input;
    if (s->tails == CIRCULAR) { /* by whole turns; what is too large to have a phase goes to 0 */
        vec turns = N(nearest)(input / (R(2.0) * s->bound));
        vec wrapped = input - R(2.0) * s->bound * turns;
        p.lost = N(absolute)(turns) >= splat(TWO_TO_MANTISSA);
        p.point = select(p.lost, splat(0), wrapped);
    }
    p.point = N(larger)(-bound, N(smaller)(bound, p.point));
    p.t = p.u = p.point;
    return p;
}

static inline void N(leave_box)(vec input, const N(place) *p, const N(settings) *s, vec *value, vec *ladj) {
    const vec bound = splat(s->bound);
    vec inside = N(larger)(-bound, N(smaller)(bound, *value));
    if (s->tails == LINEAR) {
        *value = select(p->outside, input, inside);
        *ladj = select(p->outside, splat(0), *ladj);
    } else if (s->tails == CIRCULAR) {
        *value = select(p->outside, input + (inside - p->point), inside);
    } else {
        *value = select(p->outside, splat(R(NAN)), inside);
        *ladj = select(p->outside, splat(R(NAN)), *ladj);
    }
}

/* ---- the map within a bin ---- */

/* t and u of the root; rational_quadratic.py (_invert_bin) says why nothing cancels */
static inline void N(solve)(N(place) *p, const N(bin) *b) {
    vec side = b->from_low + b->to_high, v = b->from_low / side, w = b->to_high / side;
    vec inverse_slope = b->width / b->height;
    vec r = b->slope0 * inverse_slope * w - b->slope1 * inverse_slope * v;
    vec root = N(root)(r * r + R(4.0) * v * w) + N(absolute)(r);
    mask positive = r >= splat(0);
    vec t = select(positive, R(2.0) * v, root), u = select(positive, root, R(2.0) * w);
    vec total = t + u;
    p->t = t / total;
    p->u = u / total;
}

static inline void N(locate)(N(place) *p, const N(bin) *b, int inverse) {
    if (inverse) {
        N(solve)(p, b);
    } else {
        vec side = b->from_low + b->to_high;
        p->t = b->from_low / side;
        p->u = b->to_high / side;
    }
}

/* value and log-derivative of the direction asked for */
static inline void N(evaluate)(const N(place) *p, const N(bin) *b, int inverse, vec *value, vec *ladj) {
    vec t = p->t, u = p->u, inverse_slope = b->width / b->height;
    vec a0 = b->slope0 * inverse_slope, a1 = b->slope1 * inverse_slope;
    vec q = R(1.0) / (t * t + u * u + (a0 + a1) * t * u);
    vec m = b->slope1 * t * t + R(2.0) * (b->height / b->width) * t * u + b->slope0 * u * u;
    vec log_derivative = N(logarithm)((m * q) * q);
    if (inverse) {
        *value = b->low + (b->high - b->low) * t;
        *ladj = -log_derivative;
    } else {
        *value = b->low + (b->high - b->low) * (t * (t + a0 * u) * q);
        *ladj = log_derivative;
    }
}

static inline N(gradient) N(differentiate)(const N(place) *p, const N(bin) *b, const N(settings) *settings,
                                           int inverse, vec grad_value, vec grad_ladj) {
    const int linear_or_none = settings->tails != CIRCULAR;
    const vec through = grad_value; /* what the tails hand to the input */
    if (linear_or_none) {
        grad_value = select(p->outside, splat(0), grad_value);
        grad_ladj = select(p->outside, splat(0), grad_ladj);
    }
    vec t = p->t, u = p->u, tu = t * u, turn = u - t, squares = t * t + u * u;
    vec inverse_width = R(1.0) / b->width, s = b->height * inverse_width, d0 = b->slope0, d1 = b->slope1;
    vec q = R(1.0) / (s * squares + (d0 + d1) * tu);
    vec g = t * (s * t + d0 * u) * q, rest = u * (s * u + d1 * t) * q;
    vec m = d1 * t * t + R(2.0) * s * tu + d0 * u * u, over_m = R(1.0) / m;
    vec sq = s * q, mq = m * q, tuq = tu * q;
    vec value_t = b->height * sq * mq;
    vec ladj_t = R(2.0) * ((d1 * t - d0 * u + s * turn) * over_m - (d0 + d1 - R(2.0) * s) * turn * q);
    if (inverse) {
        /* grad_value is that of x, grad_ladj that of -L; the new ones those of y and L at fixed x */
        grad_ladj = -grad_ladj;
        vec total = grad_value + grad_ladj * ladj_t * inverse_width;
        grad_value = -total / (sq * mq * s);
    }
    vec grad_t = grad_value * value_t + grad_ladj * ladj_t;
    vec grad_s = grad_value * b->height * q * (t * t * rest - u * u * g)
               + grad_ladj * R(2.0) * (R(1.0) / s + tu * over_m - squares * q);
    N(gradient) d;
    vec grad_point = grad_t * inverse_width;
    d.x0 = -grad_point * u;
    d.x1 = -grad_point * t;
    d.width = -grad_s * s * inverse_width;
    d.y0 = grad_value * rest;
    d.y1 = grad_value * g;
    d.height = grad_s * inverse_width;
    d.slope0 = grad_value * b->height * tuq * rest + grad_ladj * (u * u * over_m - R(2.0) * tuq);
    d.slope1 = grad_ladj * (t * t * over_m - R(2.0) * tuq) - grad_value * b->height * tuq * g;
    d.input = inverse ? -grad_value : grad_point;
    if (settings->tails == LINEAR) d.input = select(p->outside, through, d.input);
    else if (settings->tails == CIRCULAR) d.input = select(p->lost, through, d.input);
    return d;
}

/* ---- splines with parameters of their own for every input ---- */

/* One side of the box: exp of the logits less their largest, and the sums of the first 1 to K of these terms; of the
 * bin chosen the sum of the terms before it and its own. */
typedef struct {
    vec *terms;
    wide *sums, total, scale;
    vec below, own;
} N(axis);

/* both sides at once, which keeps the processor busier than one after the other */
static inline void N(make_axes)(vec *tile, const N(settings) *s, N(axis) *x, N(axis) *y) {
    const int count_bins = s->count_bins;
    vec *widths = tile, *heights = tile + count_bins;
    wide *width_sums = (wide *)(tile + 2 * count_bins), *height_sums = width_sums + count_bins;
    vec widest = widths[0], highest = heights[0];
    for (int j = 1; j < count_bins; j++) {
        widest = N(larger)(widths[j], widest);
        highest = N(larger)(heights[j], highest);
    }
    wide width_total = N(widen)(splat(0)), height_total = width_total;
    UNROLL
    for (int j = 0; j < count_bins; j++) {
        widths[j] = N(exponential)(widths[j] - widest);
        heights[j] = N(exponential)(heights[j] - highest);
        width_total = width_sums[j] = N(plus)(width_total, N(widen)(widths[j]));
        height_total = height_sums[j] = N(plus)(height_total, N(widen)(heights[j]));
    }
    x->terms = widths;
    y->terms = heights;
    x->sums = width_sums;
    y->sums = height_sums;
    x->total = width_total;
    y->total = height_total;
    x->scale = N(quotient)(s->rest[WIDTHS], width_total);
    y->scale = N(quotient)(s->rest[HEIGHTS], height_total);
}

static inline vec N(side)(vec own, wide scale, double step) { return N(narrow)(N(affine)(scale, N(widen)(own), step)); }

/* The bin of every point along the side that is searched, less its slopes; returns its number. */
static inline mask N(choose_bin)(vec point, N(axis) *searched, const double *searched_base, N(axis) *other,
                                 const double *other_base, const N(settings) *s, N(bin) *b) {
    const vec *searched_terms = searched->terms, *other_terms = other->terms;
    const wide searched_scale = searched->scale, other_scale = other->scale, wide_point = N(widen)(point);
    vec from_low = point + s->bound, to_high = s->bound - point, low = splat(-s->bound), high = splat(s->bound);
    vec searched_below = splat(0), searched_own = searched_terms[0], other_below = splat(0), other_own = other_terms[0];
    mask index = point != point;
    index ^= index;
    for (int j = 0; j + 1 < s->count_bins; j++) {
        wide knot = N(affine)(searched_scale, searched->sums[j], searched_base[j + 1]);
        vec distance = N(narrow)(N(minus)(wide_point, knot));
        vec other_knot = N(narrow)(N(affine)(other_scale, other->sums[j], other_base[j + 1]));
        mask beyond = distance >= splat(0);
        from_low = select(beyond, distance, from_low);
        to_high = select(beyond, to_high, N(smaller)(-distance, to_high));
        low = select(beyond, other_knot, low);
        high = select(beyond, high, N(smaller)(other_knot, high));
        searched_own = select(beyond, searched_terms[j + 1], searched_own);
        other_own = select(beyond, other_terms[j + 1], other_own);
        searched_below += select(beyond, searched_terms[j], splat(0));
        other_below += select(beyond, other_terms[j], splat(0));
        COUNT(index, beyond);
    }
    b->from_low = from_low;
    b->to_high = to_high;
    b->low = low;
    b->high = high;
    searched->own = searched_own;
    searched->below = searched_below;
    other->own = other_own;
    other->below = other_below;
    return index;
}

/* Reads the 2 K logits of each lane into the tile, and leaves the terms of both softmaxes there. */
static inline mask N(read_bin)(vec point, const REAL *const *rows, const N(settings) *s, int inverse, vec *tile,
                               N(axis) *x, N(axis) *y, N(bin) *b) {
    mask index;
    N(gather_columns)(tile, rows, 2 * s->count_bins);
    N(make_axes)(tile, s, x, y);
    if (inverse) index = N(choose_bin)(point, y, s->base[HEIGHTS], x, s->base[WIDTHS], s, b);
    else index = N(choose_bin)(point, x, s->base[WIDTHS], y, s->base[HEIGHTS], s, b);
    b->width = N(side)(x->own, x->scale, s->step[WIDTHS]);
    b->height = N(side)(y->own, y->scale, s->step[HEIGHTS]);
    return index;
}

/* number of the raw slope at a knot, -1 where the slope is 1 */
static inline int N(slope_number)(int knot, const N(settings) *s) {
    if (s->tails == LINEAR) return knot == s->count_bins ? -1 : knot - 1;
    return s->tails == CIRCULAR && knot == s->count_bins ? 0 : knot;
}

/* Slopes at both knots of the bins, and their derivatives with respect to the raw ones, which are 0 where fixed. */
static inline void N(read_slopes)(const REAL *const *rows, mask index, const N(settings) *s, N(bin) *b,
                                  vec *derivative0, vec *derivative1) {
    b->slope0 = b->slope1 = splat(1);
    *derivative0 = *derivative1 = splat(0);
    if (s->num_slopes == 0) return;
    const int first = s->tails == LINEAR ? -1 : 0, most = s->num_slopes - 1, start = 2 * s->count_bins;
    REAL raw0[LANES], raw1[LANES];
    for (int l = 0; l < LANES; l++) { /* a number that is out of range stands for a slope that is fixed */
        int number = (int)LANE(index, l) + first, next = number + 1;
        if (s->tails == CIRCULAR) next = next > most ? 0 : next;
        raw0[l] = rows[l][start + (number < 0 ? 0 : number)];
        raw1[l] = rows[l][start + (next > most ? most : next)];
    }
    b->slope0 = N(softplus)(N(load)(raw0) + s->slope_offset, derivative0) + s->min_slope;
    b->slope1 = N(softplus)(N(load)(raw1) + s->slope_offset, derivative1) + s->min_slope;
    if (s->tails == LINEAR) {
        mask zero = index ^ index, last = zero;
        last += (INT)(s->count_bins - 1);
        mask fixed0 = index == zero, fixed1 = index == last;
        b->slope0 = select(fixed0, splat(1), b->slope0);
        b->slope1 = select(fixed1, splat(1), b->slope1);
        *derivative0 = select(fixed0, splat(0), *derivative0);
        *derivative1 = select(fixed1, splat(0), *derivative1);
    }
}

static inline void N(run_own)(vec input, const REAL *const *rows, const N(settings) *s, int inverse, vec *tile,
                              vec *value, vec *ladj) {
    N(axis) x, y;
    N(bin) b;
    vec unused0, unused1;
    N(place) p = N(enter_box)(input, s);
    mask index = N(read_bin)(p.point, rows, s, inverse, tile, &x, &y, &b);
    N(read_slopes)(rows, index, s, &b, &unused0, &unused1);
    N(locate)(&p, &b, inverse);
    N(evaluate)(&p, &b, inverse, value, ladj);
    N(leave_box)(input, &p, s, value, ladj);
}

/* terms of the softmax to the derivatives of the logits */
static inline void N(differentiate_axis)(const N(axis) *a, mask index, vec grad_low, vec grad_high, vec grad_side,
                                         int count_bins) {
    mask last = index ^ index;
    last += (INT)(count_bins - 1);
    grad_high = select(index == last, splat(0), grad_high);
    grad_low += grad_high;
    vec grad_own = grad_high + grad_side;
    vec mean = (grad_low * a->below + grad_own * a->own) / N(narrow)(a->total), scale = N(narrow)(a->scale);
    vec below = grad_low - mean, own = grad_own - mean;
    for (int j = 0; j < count_bins; j++) {
        mask number = index ^ index;
        number += (INT)j;
        vec factor = select(number < index, below, select(number == index, own, -mean));
        a->terms[j] = a->terms[j] * scale * factor;
    }
}

static inline vec N(run_own_backward)(vec input, const REAL *const *rows, const N(settings) *s, int inverse, vec *tile,
                                      vec grad_value, vec grad_ladj, REAL *const *grad_rows, int lanes) {
    N(axis) x, y;
    N(bin) b;
    vec derivatives[2];
    N(place) p = N(enter_box)(input, s);
    mask index = N(read_bin)(p.point, rows, s, inverse, tile, &x, &y, &b);
    N(read_slopes)(rows, index, s, &b, &derivatives[0], &derivatives[1]);
    N(locate)(&p, &b, inverse);
    N(gradient) d = N(differentiate)(&p, &b, s, inverse, grad_value, grad_ladj);
    N(differentiate_axis)(&x, index, d.x0, d.x1, d.width, s->count_bins);
    N(differentiate_axis)(&y, index, d.y0, d.y1, d.height, s->count_bins);
    N(scatter_columns)(tile, grad_rows, 2 * s->count_bins, lanes);
    vec slopes[2] = {d.slope0 * derivatives[0], d.slope1 * derivatives[1]};
    for (int l = 0; l < lanes; l++) {
        REAL *raw = grad_rows[l] + 2 * s->count_bins;
        for (int j = 0; j < s->num_slopes; j++) raw[j] = 0;
        for (int side = 0; side < 2; side++) {
            int number = N(slope_number)((int)LANE(index, l) + side, s);
            if (number >= 0) raw[number] += LANE(slopes[side], l);
        }
    }
    return d.input;
}

/* ---- splines whose parameters all rows share: a table of bins, filled once ---- */

/* The tables of LANES columns; each is TABLE_ROWS rows of K + 1 numbers. */
static inline void N(fill_tables)(const REAL *const *rows, const N(settings) *s, vec *tile, REAL *tables, int lanes) {
    const int count_bins = s->count_bins, length = count_bins + 1;
    N(gather_columns)(tile, rows, 2 * count_bins);
    N(axis) axes[2];
    N(make_axes)(tile, s, &axes[WIDTHS], &axes[HEIGHTS]);
    for (int which = 0; which < 2; which++) {
        const N(axis) a = axes[which];
        wide sum = N(widen)(splat(0));
        for (int j = 0; j < length; j++) {
            wide exact = N(widen)(splat(s->bound));
            vec side = splat(0);
            if (j < count_bins) {
                exact = N(affine)(a.scale, sum, s->base[which][j]);
                sum = a.sums[j];
                side = N(side)(a.terms[j], a.scale, s->step[which]);
            }
            vec knot = N(narrow)(exact), rest = N(narrow)(N(minus)(exact, N(widen)(knot)));
            for (int l = 0; l < lanes; l++) {
                REAL *table = tables + (size_t)l * TABLE_ROWS * length;
                table[(which ? KNOT_Y : KNOT_X) * length + j] = LANE(knot, l);
                table[(which ? REST_Y : REST_X) * length + j] = LANE(rest, l);
                table[(which ? HEIGHT : WIDTH) * length + j] = LANE(side, l);
            }
        }
    }
    for (int j = 0; j < length; j++) {
        int number = N(slope_number)(j, s);
        vec unused, slope = splat(1);
        if (number >= 0) {
            REAL raw[LANES];
            for (int l = 0; l < LANES; l++) raw[l] = rows[l][2 * count_bins + number];
            slope = N(softplus)(N(load)(raw) + s->slope_offset, &unused) + s->min_slope;
        }
        for (int l = 0; l < lanes; l++) tables[((size_t)l * TABLE_ROWS + SLOPE) * length + j] = LANE(slope, l);
    }
}

static inline N(bin) N(look_up)(vec point, const REAL *table, const N(settings) *s, int inverse, mask *index) {
    const int length = s->count_bins + 1;
    const REAL *width = table + WIDTH * length, *height = table + HEIGHT * length, *slope = table + SLOPE * length;
    const REAL *searched = table + (inverse ? KNOT_Y : KNOT_X) * length, *other = table + (inverse ? KNOT_X : KNOT_Y) * length;
    const REAL *rest = table + (inverse ? REST_Y : REST_X) * length;
    N(bin) b = {point + s->bound, s->bound - point, splat(-s->bound), splat(other[1]),
                splat(width[0]), splat(height[0]), splat(slope[0]), splat(slope[1])};
    *index = point != point;
    *index ^= *index;
    for (int j = 1; j < s->count_bins; j++) {
        vec distance = (point - searched[j]) - rest[j];
        mask beyond = distance >= splat(0);
        b.from_low = select(beyond, distance, b.from_low);
        b.to_high = select(beyond, b.to_high, N(smaller)(-distance, b.to_high));
        b.low = select(beyond, splat(other[j]), b.low);
        b.high = select(beyond, splat(other[j + 1]), b.high);
        b.width = select(beyond, splat(width[j]), b.width);
        b.height = select(beyond, splat(height[j]), b.height);
        b.slope0 = select(beyond, splat(slope[j]), b.slope0);
        b.slope1 = select(beyond, splat(slope[j + 1]), b.slope1);
        COUNT(*index, beyond);
    }
    return b;
}

static inline void N(run_shared)(vec input, const REAL *table, const N(settings) *s, int inverse, vec *value,
                                 vec *ladj) {
    mask index;
    N(place) p = N(enter_box)(input, s);
    N(bin) b = N(look_up)(p.point, table, s, inverse, &index);
    N(locate)(&p, &b, inverse);
    N(evaluate)(&p, &b, inverse, value, ladj);
    N(leave_box)(input, &p, s, value, ladj);
}

static inline vec N(run_shared_backward)(vec input, const REAL *table, const N(settings) *s, int inverse,
                                         vec grad_value, vec grad_ladj, double *sums, int lanes) {
    mask index;
    N(place) p = N(enter_box)(input, s);
    N(bin) b = N(look_up)(p.point, table, s, inverse, &index);
    N(locate)(&p, &b, inverse);
    N(gradient) d = N(differentiate)(&p, &b, s, inverse, grad_value, grad_ladj);
    for (int l = 0; l < lanes; l++) {
        double *sum = sums + SUMS * LANE(index, l);
        sum[SUM_X0] += LANE(d.x0, l);
        sum[SUM_X1] += LANE(d.x1, l);
        sum[SUM_WIDTH] += LANE(d.width, l);
        sum[SUM_Y0] += LANE(d.y0, l);
        sum[SUM_Y1] += LANE(d.y1, l);
        sum[SUM_HEIGHT] += LANE(d.height, l);
        sum[SUM_SLOPE0] += LANE(d.slope0, l);
        sum[SUM_SLOPE1] += LANE(d.slope1, l);
    }
    return d.input;
}

/* The sums over bins to derivatives with respect to one row of raw parameters. */
static void N(finish_shared)(const REAL *raw, const double *sums, const N(settings) *s, REAL *grad) {
    const int count_bins = s->count_bins;
    for (int which = 0; which < 2; which++) {
        const REAL *logits = raw + which * count_bins;
        const int low = which ? SUM_Y0 : SUM_X0, high = which ? SUM_Y1 : SUM_X1, side = which ? SUM_HEIGHT : SUM_WIDTH;
        double largest = logits[0], total = 0, mean = 0, later = 0;
        for (int j = 1; j < count_bins; j++) largest = logits[j] > largest ? logits[j] : largest;
        for (int j = 0; j < count_bins; j++) total += exp(logits[j] - largest);
        for (int pass = 0; pass < 2; pass++) { /* the mean of the shares' derivatives first */
            later = 0;
            for (int j = count_bins - 1; j >= 0; j--) {
                double share = exp(logits[j] - largest) / total;
                double grad_high = j == count_bins - 1 ? 0 : sums[SUMS * j + high];
                double derivative = sums[SUMS * j + side] + grad_high + later;
                later += sums[SUMS * j + low] + grad_high;
                if (pass == 0) mean += share * derivative;
                else grad[which * count_bins + j] = (REAL)(s->rest[which] * share * (derivative - mean));
            }
        }
    }
    REAL *grad_slopes = grad + 2 * count_bins;
    for (int j = 0; j < s->num_slopes; j++) grad_slopes[j] = 0;
    for (int knot = 0; knot <= count_bins; knot++) {
        int number = N(slope_number)(knot, s);
        if (number < 0) continue;
        double sum = (knot < count_bins ? sums[SUMS * knot + SUM_SLOPE0] : 0)
                   + (knot > 0 ? sums[SUMS * (knot - 1) + SUM_SLOPE1] : 0);
        double z = raw[2 * count_bins + number] + (double)s->slope_offset;
        grad_slopes[number] += (REAL)(sum / (1 + exp(-z)));
    }
}
