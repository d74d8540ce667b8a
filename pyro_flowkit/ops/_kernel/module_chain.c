/* Chains of layers for Python: what describes the layers is read and checked against the sizes of the memory given. */
#include "module.h"

#include <string.h>

/* below this many rows it is not worth while to let other threads run */
#define MANY_ROWS 256

enum { IS_DOUBLE_ARG, ROWS_ARG, DIM_ARG, CHAIN_ARG, TENSORS_ARG, KEPT_ARG, KEPT_SIZE_ARG, FIRST_ARG };

static int64_t num_packed(const perceptron *q) {
    int64_t sum = 0;
    for (int i = 0; i < q->num_layers; i++) sum += ((int64_t)q->sizes[i] + 1) * q->sizes[i + 1];
    return sum;
}

static int read_all_sizes(PyObject *sizes, perceptron *q) {
    const Py_ssize_t count = PyTuple_Size(sizes);
    return count < 0 ? -1 : read_sizes(sizes, count, q);
}

/* (kind, splines' arguments, first, num_passed, limit, sizes) */
static int read_coupling(PyObject *const *items, Py_ssize_t count, int64_t dim, layer *l, int64_t *numbers) {
    problem *p = &l->splines;
    perceptron *q = &l->network;
    if (count != SPLINE_ARGS + 5) return fail("arguments of a coupling:", count, SPLINE_ARGS + 5);
    if (read_splines(items + 1, p) || read_all_sizes(items[SPLINE_ARGS + 4], q)) return -1;
    q->first = PyLong_AsLongLong(items[SPLINE_ARGS + 1]);
    q->num_passed = PyLong_AsLongLong(items[SPLINE_ARGS + 2]);
    q->limit = PyFloat_AsDouble(items[SPLINE_ARGS + 3]);
    q->context_dim = 0;
    if (PyErr_Occurred()) return -1;
    if (p->dim != dim) return fail("a dimension of", p->dim, dim);
    if (check_network(q, p)) return -1;
    l->num_tensors = 2;
    numbers[0] = num_packed(q);
    numbers[1] = p->num_shared * p->num_params;
    return 0;
}

/* (kind, block, block, ...) with blocks (start, size, of_network, of_line, sizes); the linear map may be missing */
static int read_hierarchy(PyObject *const *items, Py_ssize_t count, int64_t dim, layer *l, int64_t *numbers) {
    if (count < 2) return fail("blocks: at least", count - 1, 1);
    if (count > MAX_BLOCKS + 1) return fail("blocks: at most", count - 1, MAX_BLOCKS);
    l->num_blocks = (int)count - 1;
    l->num_tensors = 3 * l->num_blocks;
    for (int i = 0; i < l->num_blocks; i++) {
        block *b = &l->blocks[i];
        PyObject *const item = items[i + 1];
        if (PyTuple_Size(item) != 5) return fail("arguments of a block:", PyTuple_Size(item), 5);
        b->start = PyLong_AsLongLong(PyTuple_GetItem(item, 0));
        b->size = PyLong_AsLongLong(PyTuple_GetItem(item, 1));
        b->of_network = PyFloat_AsDouble(PyTuple_GetItem(item, 2));
        b->of_line = PyFloat_AsDouble(PyTuple_GetItem(item, 3));
        if (read_all_sizes(PyTuple_GetItem(item, 4), &b->network) || PyErr_Occurred()) return -1;
        if (b->start < 1) return fail("a block from at least", b->start, 1);
        if (b->size < 1) return fail("a block of at least", b->size, 1);
        if (b->start > dim || b->size > dim - b->start) return fail("a block up to", b->start + b->size, dim);
        if (b->network.sizes[0] != b->start) return fail("inputs of a block:", b->network.sizes[0], b->start);
        if (b->network.sizes[b->network.num_layers] != 2 * b->size)
            return fail("outputs of a block:", b->network.sizes[b->network.num_layers], 2 * b->size);
        b->network.first = 0;
        b->network.num_passed = b->start;
        b->network.context_dim = 0;
        b->network.limit = 0;
        numbers[3 * i] = num_packed(&b->network);
        numbers[3 * i + 1] = 2 * b->size * b->start;
        numbers[3 * i + 2] = 2 * b->size;
    }
    return 0;
}

/* (kind, permutation), (kind,) or (kind, rate, matrix_rate) */
static int read_linear(PyObject *const *items, Py_ssize_t count, int64_t dim, layer *l, int64_t *numbers) {
    const int arguments[LAYER_KINDS] = {[LU] = 1, [PERMUTATION] = 2, [DIAGONAL] = 3, [TRIANGLE] = 3};
    const int tensors[LAYER_KINDS] = {[LU] = 2, [PERMUTATION] = 0, [DIAGONAL] = 4, [TRIANGLE] = 5};
    if (count != arguments[l->kind]) return fail("arguments of a layer:", count, arguments[l->kind]);
    l->num_tensors = tensors[l->kind];
    for (int i = 0; i < l->num_tensors; i++) numbers[i] = dim;
    if (l->kind == LU) numbers[0] = dim * dim;
    if (l->kind == TRIANGLE) numbers[1] = numbers[4] = dim * dim;
    if (l->kind == PERMUTATION) {
        char *order;
        Py_ssize_t bytes;
        if (PyBytes_AsStringAndSize(items[1], &order, &bytes)) return -1;
        l->order = (const int32_t *)order;
        if (bytes != dim * (Py_ssize_t)sizeof(int32_t)) return fail("bytes of a permutation:", bytes, 4 * dim);
        return check_columns(l->order, dim, dim);
    }
    if (l->kind != LU) {
        l->rate = PyFloat_AsDouble(items[1]);
        l->matrix_rate = PyFloat_AsDouble(items[2]);
    }
    return PyErr_Occurred() ? -1 : 0;
}

static int read_layer(PyObject *item, int64_t dim, layer *l, int64_t *numbers) {
    PyObject *items[SPLINE_ARGS + 6];
    const Py_ssize_t count = PyTuple_Size(item);
    if (count < 1) return -1;
    if (count > SPLINE_ARGS + 6) return fail("arguments of a layer: at most", count, SPLINE_ARGS + 6);
    for (int i = 0; i < count; i++) items[i] = PyTuple_GetItem(item, i);
    memset(l, 0, sizeof *l);
    l->kind = (int)PyLong_AsLong(items[0]);
    if (PyErr_Occurred()) return -1;
    if (l->kind < 0 || l->kind >= LAYER_KINDS) return fail("a kind of at least 0 and below", l->kind, LAYER_KINDS);
    if (l->kind == COUPLING) return read_coupling(items, count, dim, l, numbers);
    if (l->kind == HIERARCHY) return read_hierarchy(items, count, dim, l, numbers);
    return read_linear(items, count, dim, l, numbers);
}

/* may_miss: whether the layer does without this tensor */
static int may_miss(const layer *l, int number, int64_t numbers) {
    return numbers == 0 || (l->kind == HIERARCHY && number % 3 == 1);
}

/* The layers, whose memory has to be freed, with their tensors (address and numbers of each, in turns) and the addresses
 * of derivatives, where there are such tuples. */
static int read_chain(PyObject *const *args, PyObject *tensors, PyObject *grads, chain *c, layer **memory) {
    int64_t numbers[MAX_TENSORS];
    int at = 0;
    const Py_ssize_t count = PyTuple_Size(args[2]);
    c->rows = PyLong_AsLongLong(args[0]);
    c->dim = PyLong_AsLongLong(args[1]);
    if (count < 0 || PyErr_Occurred()) return -1;
    if (count < 1) return fail("layers: at least", count, 1);
    if (count > MAX_CHAIN) return fail("layers: at most", count, MAX_CHAIN);
    if (c->rows < 0) return fail("rows: at least", c->rows, 0);
    if (c->dim < 1) return fail("a dimension of at least", c->dim, 1);
    c->num_layers = (int)count;
    c->layers = *memory = PyMem_Malloc((size_t)count * sizeof(layer));
    if (!*memory) return PyErr_NoMemory(), -1;
    for (int i = 0; i < c->num_layers; i++) {
        layer *l = *memory + i;
        if (read_layer(PyTuple_GetItem(args[2], i), c->dim, l, numbers)) return -1;
        for (int j = 0; tensors && j < l->num_tensors; j++, at++) {
            if (2 * at + 1 >= PyTuple_Size(tensors)) return fail("tensors: at least", PyTuple_Size(tensors) / 2, at + 1);
            l->tensors[j] = PyLong_AsVoidPtr(PyTuple_GetItem(tensors, 2 * at));
            const int64_t got = PyLong_AsLongLong(PyTuple_GetItem(tensors, 2 * at + 1));
            if (PyErr_Occurred()) return -1;
            if (!l->tensors[j] && may_miss(l, j, numbers[j])) continue;
            if (!l->tensors[j] || got != numbers[j]) return fail("numbers in a tensor:", got, numbers[j]);
            if (!grads) continue;
            PyObject *address = PyTuple_GetItem(grads, at);
            if (!address) return -1;
            l->grads[j] = PyLong_AsVoidPtr(address);
            const int may_be_fixed = l->kind == COUPLING ? j == 0 : (l->kind == DIAGONAL || l->kind == TRIANGLE) && j < 2;
            if (!l->grads[j] && !may_be_fixed) return fail("an address for the derivative of tensor", 0, at);
        }
    }
    if (tensors && PyTuple_Size(tensors) != 2 * at) return fail("tensors:", PyTuple_Size(tensors) / 2, at);
    return PyErr_Occurred() ? -1 : 0;
}

enum { FORWARD, PUSH, BACKWARD, PULL, PULL_BACKWARD };

/* addresses come after the ones of derivatives, and for PUSH after a number, which BACKWARD has at its end */
static PyObject *call(PyObject *const *args, Py_ssize_t count, int what) {
    const int further[] = {[FORWARD] = 3, [PUSH] = 5, [BACKWARD] = 8, [PULL] = 3, [PULL_BACKWARD] = 4};
    const int expected = FIRST_ARG + further[what];
    const int has_grads = what == BACKWARD || what == PULL_BACKWARD, is_back = what == PULL || what == PULL_BACKWARD;
    chain c;
    layer *memory = NULL;
    void *a[8] = {0};
    int failed = 0, number = 0; /* of a layer, or whether the path gradient is taken */
    PyObject *result = NULL;
    if (count != expected)
        return PyErr_Format(PyExc_TypeError, "Expected %d arguments, got %zd.", expected, count);
    const int is_double = (int)PyLong_AsLong(args[IS_DOUBLE_ARG]);
    if (read_chain(args + ROWS_ARG, args[TENSORS_ARG], has_grads ? args[FIRST_ARG] : NULL, &c, &memory)) goto end;
    void *kept = PyLong_AsVoidPtr(args[KEPT_ARG]);
    const int64_t kept_size = PyLong_AsLongLong(args[KEPT_SIZE_ARG]);
    if (what == PUSH || what == BACKWARD) number = (int)PyLong_AsLong(args[what == PUSH ? FIRST_ARG : expected - 1]);
    for (int i = has_grads || what == PUSH; i < further[what] - (what == BACKWARD); i++)
        a[i] = PyLong_AsVoidPtr(args[FIRST_ARG + i]);
    if (PyErr_Occurred()) goto end;
    if (kept_size < kernel_kept_of_chain(&c)) {
        fail("room to keep: at least", kept_size, kernel_kept_of_chain(&c));
        goto end;
    }
    if (what == BACKWARD && a[6] && !(a[4] && a[5])) {
        fail("weights and derivatives for noise:", 0, 2);
        goto end;
    }
    if (what == PUSH && (number < 0 || number > c.num_layers)) {
        fail("a layer from 0 to", number, c.num_layers);
        goto end;
    }
    for (int i = 0; is_back && i < c.num_layers; i++)
        if (c.layers[i].kind == HIERARCHY) {
            fail("for the way back a kind of layer below", HIERARCHY, HIERARCHY);
            goto end;
        }
    PyThreadState *saved = c.rows > MANY_ROWS ? PyEval_SaveThread() : NULL;
#define CALL(type)                                                                                      \
    (what == FORWARD    ? chosen->type##_run_chain(&c, a[0], a[1], a[2], kept)                            \
     : what == PUSH     ? chosen->type##_push_chain(&c, a[1], kept, number, a[2], a[3], a[4])             \
     : what == BACKWARD ? chosen->type##_run_chain_backward(&c, kept, a[1], a[2], a[3], a[4], a[5], number, a[6]) \
     : what == PULL     ? chosen->type##_pull_chain(&c, a[0], a[1], a[2], kept)                           \
                        : chosen->type##_pull_chain_backward(&c, kept, a[1], a[2], a[3]))
    failed = is_double ? CALL(double) : CALL(float);
#undef CALL
    if (saved) PyEval_RestoreThread(saved);
    result = failed ? PyErr_NoMemory() : none();
end:
    PyMem_Free(memory);
    return result;
}

PyObject *py_run_chain(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return call(args, count, FORWARD);
}

PyObject *py_push_chain(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return call(args, count, PUSH);
}

PyObject *py_run_chain_backward(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return call(args, count, BACKWARD);
}

PyObject *py_pull_chain(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return call(args, count, PULL);
}

PyObject *py_pull_chain_backward(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return call(args, count, PULL_BACKWARD);
}

PyObject *py_kept_of_chain(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    chain c;
    layer *memory = NULL;
    PyObject *result = NULL;
    (void)module;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "Expected 3 arguments, got %zd.", count);
    if (!read_chain(args, NULL, NULL, &c, &memory)) result = PyLong_FromLongLong(kernel_kept_of_chain(&c));
    PyMem_Free(memory);
    return result;
}
