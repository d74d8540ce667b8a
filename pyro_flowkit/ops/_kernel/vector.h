/* Vectors of LANES numbers, and the elementary functions of them: one instance, see instance.h.
 *
 * Comparisons give masks of all ones or all zeros (1 or 0 for scalars); nothing branches on the value of a lane.
 */

#if VECTOR_BYTES
#define LANES ((int)(VECTOR_BYTES / sizeof(REAL)))
typedef REAL N(vec) __attribute__((vector_size(VECTOR_BYTES)));
typedef INT N(mask) __attribute__((vector_size(VECTOR_BYTES)));
typedef UINT N(bits) __attribute__((vector_size(VECTOR_BYTES)));
#define LANE(v, l) ((v)[l])
#define BITS(v) ((bits)(v))
#define FROM_BITS(b) ((vec)(b))
#else
#define LANES 1
#define LANE(v, l) (*(&(v) + (l)))
typedef REAL N(vec);
typedef INT N(mask);
typedef UINT N(bits);
static inline N(bits) N(to_bits)(REAL v) { UINT b; memcpy(&b, &v, sizeof b); return b; }
static inline REAL N(from_bits)(UINT b) { REAL v; memcpy(&v, &b, sizeof v); return v; }
#define BITS(v) N(to_bits)(v)
#define FROM_BITS(b) N(from_bits)(b)
#endif
#define vec N(vec)
#define mask N(mask)
#define bits N(bits)

/* count one more where the mask is set */
#if VECTOR_BYTES
#define COUNT(index, m) ((index) -= (m))
#else
#define COUNT(index, m) ((index) += (m))
#endif
#define R(constant) ((REAL)(constant))

static inline vec N(splat)(REAL a) {
#if VECTOR_BYTES
    return a - (vec){0};
#else
    return a;
#endif
}

static inline vec N(select)(mask m, vec a, vec b) {
#if HAS_AVX2 && IS_DOUBLE
    return (vec)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)m);
#elif HAS_AVX2
    return (vec)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)m);
#elif VECTOR_BYTES
    return FROM_BITS(((bits)m & BITS(a)) | (~(bits)m & BITS(b)));
#else
    return m ? a : b;
#endif
}

static inline vec N(load)(const REAL *numbers) { vec v; memcpy(&v, numbers, sizeof v); return v; }
static inline void N(store)(REAL *numbers, vec v) { memcpy(numbers, &v, sizeof v); }

#define splat N(splat)
#define select N(select)

/* LANES doubles: knots are sums, and what is left of an input after subtracting one should be as precise as REAL is */
#if !IS_DOUBLE && VECTOR_BYTES
typedef float N(quarter) __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef double N(half) __attribute__((vector_size(VECTOR_BYTES)));
typedef struct { N(half) first, last; } N(wide);

static inline N(wide) N(widen)(vec v) {
#if HAS_AVX2
    N(wide) w = {(N(half))_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
                 (N(half))_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#else
    N(quarter) parts[2];
    memcpy(parts, &v, sizeof v);
    N(wide) w = {__builtin_convertvector(parts[0], N(half)), __builtin_convertvector(parts[1], N(half))};
#endif
    return w;
}

static inline vec N(narrow)(N(wide) w) {
#if HAS_AVX2
    return (vec)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)w.last), _mm256_cvtpd_ps((__m256d)w.first));
#else
    N(quarter) parts[2] = {__builtin_convertvector(w.first, N(quarter)), __builtin_convertvector(w.last, N(quarter))};
    vec v;
    memcpy(&v, parts, sizeof v);
    return v;
#endif
}

static inline N(wide) N(plus)(N(wide) a, N(wide) b) { a.first += b.first; a.last += b.last; return a; }
static inline N(wide) N(minus)(N(wide) a, N(wide) b) { a.first -= b.first; a.last -= b.last; return a; }
static inline N(wide) N(affine)(N(wide) a, N(wide) b, double c) { /* a b + c */
    a.first = a.first * b.first + c;
    a.last = a.last * b.last + c;
    return a;
}
static inline N(wide) N(quotient)(double a, N(wide) b) { b.first = a / b.first; b.last = a / b.last; return b; }
#else
#if VECTOR_BYTES
typedef vec N(wide);
#else
typedef double N(wide);
#endif
static inline N(wide) N(widen)(vec v) { return v; }
static inline vec N(narrow)(N(wide) w) { return (vec)w; }
static inline N(wide) N(plus)(N(wide) a, N(wide) b) { return a + b; }
static inline N(wide) N(minus)(N(wide) a, N(wide) b) { return a - b; }
static inline N(wide) N(affine)(N(wide) a, N(wide) b, double c) { return a * b + c; }
static inline N(wide) N(quotient)(double a, N(wide) b) { return a / b; }
#endif
#define wide N(wide)

/* the larger and the smaller of two; b where either is NaN */
static inline vec N(larger)(vec a, vec b) {
#if HAS_AVX2 && IS_DOUBLE
    return (vec)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif HAS_AVX2
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(a > b, a, b);
#endif
}

static inline vec N(smaller)(vec a, vec b) {
#if HAS_AVX2 && IS_DOUBLE
    return (vec)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif HAS_AVX2
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select(a < b, a, b);
#endif
}

static inline vec N(absolute)(vec x) {
    const UINT sign = (UINT)1 << (8 * sizeof(REAL) - 1);
    return FROM_BITS(BITS(x) & ~sign);
}

static inline vec N(root)(vec x) {
    REAL r[LANES];
    N(store)(r, x);
    for (int l = 0; l < LANES; l++) r[l] = IS_DOUBLE ? R(sqrt((double)r[l])) : R(sqrtf((float)r[l]));
    return N(load)(r);
}

static inline vec N(nearest)(vec x) {
    REAL r[LANES];
    N(store)(r, x);
    for (int l = 0; l < LANES; l++) r[l] = IS_DOUBLE ? R(rint((double)r[l])) : R(rintf((float)r[l]));
    return N(load)(r);
}

/* exp and log to about one unit in the last place, after FreeBSD's e_exp.c and e_log.c ("Copyright (C) 1993 by Sun
 * Microsystems, Inc. All rights reserved. Developed at SunPro, a Sun Microsystems, Inc. business. Permission to use,
 * copy, modify, and distribute this software is freely granted, provided that this notice is preserved."), their
 * single-precision forms, and the polynomial of Cephes' expf. */
#if IS_DOUBLE
#define MANTISSA 52
#define BIAS 1023
#define TWO_TO_MANTISSA 4503599627370496.0
#define EXP_LOWEST (-708.0)
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#define ONE_BITS 0x3ff0000000000000ULL
#define SQRT_HALF_BITS 0x3fe6a09e667f3bcdULL
#define FRACTION_BITS 0x000fffffffffffffULL
#else
#define MANTISSA 23
#define BIAS 127
#define TWO_TO_MANTISSA 8388608.0f
#define EXP_LOWEST (-87.0f)
#define LN2_HIGH 6.9313812256e-01f
#define LN2_LOW 9.0580006145e-06f
#define ONE_BITS 0x3f800000U
#define SQRT_HALF_BITS 0x3f3504f3U
#define FRACTION_BITS 0x007fffffU
#endif

/* exp of a number <= 0; not below exp(EXP_LOWEST), NaN for NaN */
static inline vec N(exponential)(vec x) {
    const REAL rounder = R(1.5) * TWO_TO_MANTISSA; /* adding it leaves the nearest integer in the low bits */
    vec clamped = N(larger)(splat(EXP_LOWEST), x);
    vec shifted = clamped * R(1.44269504088896338700) + rounder;
    vec n = shifted - rounder;
    vec high = clamped - n * LN2_HIGH, low = n * LN2_LOW;
    vec r = high - low, z = r * r;
#if IS_DOUBLE
    vec p = z * R(4.13813679705723846039e-08) + R(-1.65339022054652515390e-06);
    p = p * z + R(6.61375632143793436117e-05);
    p = p * z + R(-2.77777777770155933842e-03);
    p = p * z + R(1.66666666666666019037e-01);
    vec c = r - z * p;
    vec y = R(1.0) - ((low - (r * c) / (R(2.0) - c)) - high);
#else
    vec p = r * R(1.9875691500e-4) + R(1.3981999507e-3);
    p = p * r + R(8.3334519073e-3);
    p = p * r + R(4.1665795894e-2);
    p = p * r + R(1.6666665459e-1);
    p = p * r + R(5.0000001201e-1);
    vec y = (p * z + r) + R(1.0);
#endif
    bits power = ((BITS(shifted) - BITS(splat(rounder))) + (UINT)BIAS) << MANTISSA;
    return y * FROM_BITS(power);
}

/* log((1 + f) 2^k) for 1 + f between sqrt(1/2) and sqrt(2) */
static inline vec N(log_reduced)(vec f, vec k) {
    vec s = f / (f + R(2.0)), z = s * s, half_square = f * f * R(0.5);
#if IS_DOUBLE
    vec p = z * R(1.479819860511658591e-01) + R(1.531383769920937332e-01);
    p = p * z + R(1.818357216161805012e-01);
    p = p * z + R(2.222219843214978396e-01);
    p = p * z + R(2.857142874366239149e-01);
    p = p * z + R(3.999999999940941908e-01);
    p = p * z + R(6.666666666666735130e-01);
#else
    vec p = z * R(0.24279078841) + R(0.28498786688);
    p = p * z + R(0.40000972152);
    p = p * z + R(0.66666662693);
#endif
    return k * LN2_HIGH - ((half_square - (s * (half_square + z * p) + k * LN2_LOW)) - f);
}

/* log of a positive normal number; infinity and NaN stay what they are */
static inline vec N(logarithm)(vec x) {
    bits b = BITS(x) + (UINT)(ONE_BITS - SQRT_HALF_BITS);
    vec k = FROM_BITS((b >> MANTISSA) | BITS(splat(TWO_TO_MANTISSA))) - R(TWO_TO_MANTISSA + BIAS);
    vec f = FROM_BITS((b & (UINT)FRACTION_BITS) + (UINT)SQRT_HALF_BITS) - R(1.0);
    return select(x < splat(R(INFINITY)), N(log_reduced)(f, k), x);
}

/* log(1 + x) of a number in [0, 1], NaN for NaN */
static inline vec N(logarithm_of_one_plus)(vec x) {
    mask large = x > splat(R(0.4142135623730951));
    vec f = select(large, (x - R(1.0)) * R(0.5), x);
    return N(log_reduced)(f, select(large, splat(1), splat(0)));
}

/* ---- numbers of one row lie side by side in memory, those of one column in a vector ---- */

#if VECTOR_BYTES
/* transpose a square of LANES vectors: pairs, pairs of pairs, halves */
static inline void N(transpose)(vec *a) {
    vec b[LANES];
#if VECTOR_BYTES == 16 && IS_DOUBLE
    b[0] = SHUFFLE(a[0], a[1], 0, 2);
    b[1] = SHUFFLE(a[0], a[1], 1, 3);
    a[0] = b[0], a[1] = b[1];
#elif VECTOR_BYTES == 16
    for (int i = 0; i < 4; i += 2) {
        b[i] = SHUFFLE(a[i], a[i + 1], 0, 4, 1, 5);
        b[i + 1] = SHUFFLE(a[i], a[i + 1], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; i++) {
        a[2 * i] = SHUFFLE(b[i], b[i + 2], 0, 1, 4, 5);
        a[2 * i + 1] = SHUFFLE(b[i], b[i + 2], 2, 3, 6, 7);
    }
#elif IS_DOUBLE
    for (int i = 0; i < 4; i += 2) {
        b[i] = SHUFFLE(a[i], a[i + 1], 0, 4, 2, 6);
        b[i + 1] = SHUFFLE(a[i], a[i + 1], 1, 5, 3, 7);
    }
    for (int i = 0; i < 2; i++) {
        a[i] = SHUFFLE(b[i], b[i + 2], 0, 1, 4, 5);
        a[i + 2] = SHUFFLE(b[i], b[i + 2], 2, 3, 6, 7);
    }
#else
    vec c[LANES];
    for (int i = 0; i < 8; i += 2) {
        b[i] = SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[i + 1] = SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; j++) {
            c[i + 2 * j] = SHUFFLE(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            c[i + 2 * j + 1] = SHUFFLE(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; i++) {
        a[i] = SHUFFLE(c[i], c[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        a[i + 4] = SHUFFLE(c[i], c[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#endif
}
#else
static inline void N(transpose)(vec *a) { (void)a; }
#endif

/* tile[j] = the j-th numbers of LANES rows, for j < n */
static inline void N(gather_columns)(vec *tile, const REAL *const *rows, int n) {
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        for (int l = 0; l < LANES; l++) tile[j + l] = N(load)(rows[l] + j);
        N(transpose)(tile + j);
    }
    for (; j < n; j++) {
        REAL column[LANES];
        for (int l = 0; l < LANES; l++) column[l] = rows[l][j];
        tile[j] = N(load)(column);
    }
}

/* and back, for the first lanes; leaves the tile in disorder */
static inline void N(scatter_columns)(vec *tile, REAL *const *rows, int n, int lanes) {
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        N(transpose)(tile + j);
        for (int l = 0; l < lanes; l++) N(store)(rows[l] + j, tile[j + l]);
    }
    for (; j < n; j++) {
        REAL column[LANES];
        N(store)(column, tile[j]);
        for (int l = 0; l < lanes; l++) rows[l][j] = column[l];
    }
}
