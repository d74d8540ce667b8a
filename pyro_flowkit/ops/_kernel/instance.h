/* One instance of the kernel. kernel.c includes this file once for every instance, after defining
 *   SUFFIX          of the instance's names
 *   IS_DOUBLE       0 or 1
 *   VECTOR_BYTES    16 or 32, more with another MAX_LANES; 0 where the compiler has no vectors, which makes every "vector" a scalar
 *   HAS_AVX2       1 where AVX2's instructions may be used
 */
#define N(name) JOIN(name, SUFFIX)
#if IS_DOUBLE
#define REAL double
#define INT int64_t
#define UINT uint64_t
#else
#define REAL float
#define INT int32_t
#define UINT uint32_t
#endif

#include "vector.h"

typedef char N(lanes_at_most)[LANES <= MAX_LANES ? 1 : -1]; /* what is kept of a row is in whole vectors */

#include "spline.h"

#include "loops.h"

#include "perceptron.h"

#include "linear.h"

#include "hierarchy.h"

#include "chain.h"

#undef SUFFIX
#undef IS_DOUBLE
#undef VECTOR_BYTES
#undef HAS_AVX2
#undef N
#undef REAL
#undef INT
#undef UINT
#undef LANES
#undef vec
#undef mask
#undef bits
#undef wide
#undef BITS
#undef FROM_BITS
#undef COUNT
#undef LANE
#undef R
#undef splat
#undef select
#undef MANTISSA
#undef BIAS
#undef TWO_TO_MANTISSA
#undef EXP_LOWEST
#undef LN2_HIGH
#undef LN2_LOW
#undef ONE_BITS
#undef SQRT_HALF_BITS
#undef FRACTION_BITS
