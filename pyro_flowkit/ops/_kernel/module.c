/* The kernel as a Python extension on the stable ABI. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "module.h"

#include <string.h>

const instance *chosen;
static const instance *available;
static int num_available;

/* below this many splines it is not worth while to let other threads run */
#define MANY_SPLINES 4096

enum { IS_DOUBLE_ARG, INVERSE_ARG, SUM_ARG, ROWS_ARG, DIM_ARG, OWN_ARG, SHARED_ARG, BINS_ARG, PARAMS_ARG, TAILS_ARG,
       BOUND_ARG, WIDTH_ARG, HEIGHT_ARG, SLOPE_ARG, FIRST_ADDRESS };

/* Py_RETURN_NONE of Python 3.12's headers counts on an immortal None, which Python 3.11 has not: an extension on the
   stable ABI that was built there would take a reference from None with every call here, until there is none left. */
PyObject *none(void) {
    Py_IncRef(Py_None);
    return Py_None;
}

int fail(const char *what, long long got, long long want) {
    PyErr_Format(PyExc_ValueError, "Expected %s %lld, got %lld.", what, want, got);
    return -1;
}

int check_columns(const int32_t *columns, int64_t count, int64_t dim) {
    for (int64_t i = 0; i < count; i++)
        if (columns[i] < 0 || columns[i] >= dim) return fail("a column of at least 0 and below", columns[i], dim);
    return 0;
}

static int read_columns(PyObject *bytes, int64_t dim, const int32_t **columns, int64_t *count) {
    Py_ssize_t size;
    char *start;
    if (PyBytes_AsStringAndSize(bytes, &start, &size)) return -1;
    if (size % (Py_ssize_t)sizeof(int32_t)) return fail("bytes of columns: a multiple of", size, sizeof(int32_t));
    *columns = (const int32_t *)start;
    *count = size / (Py_ssize_t)sizeof(int32_t);
    return check_columns(*columns, *count, dim);
}

int read_splines(PyObject *const *args, problem *p) {
    const int64_t count_bins = PyLong_AsLongLong(args[BINS_ARG - DIM_ARG]);
    const int64_t num_params = PyLong_AsLongLong(args[PARAMS_ARG - DIM_ARG]);
    const int64_t tails = PyLong_AsLongLong(args[TAILS_ARG - DIM_ARG]);
    p->dim = PyLong_AsLongLong(args[0]);
    p->bound = PyFloat_AsDouble(args[BOUND_ARG - DIM_ARG]);
    p->min_bin_width = PyFloat_AsDouble(args[WIDTH_ARG - DIM_ARG]);
    p->min_bin_height = PyFloat_AsDouble(args[HEIGHT_ARG - DIM_ARG]);
    p->min_slope = PyFloat_AsDouble(args[SLOPE_ARG - DIM_ARG]);
    if (PyErr_Occurred()) return -1;
    if (p->dim < 0) return fail("a dimension of at least", p->dim, 0);
    if (count_bins < 1) return fail("bins: at least", count_bins, 1);
    if (count_bins > MAX_BINS) return fail("bins: at most", count_bins, MAX_BINS);
    if (tails < LINEAR || tails > NO_TAILS) return fail("tails from 0 to", tails, NO_TAILS);
    /* two sizes for each bin, and the slopes that are free: the first and the last, one for both, or neither */
    const int64_t expected = 3 * count_bins + (tails == LINEAR ? -1 : tails == NO_TAILS);
    if (num_params != expected) return fail("parameters of a spline:", num_params, expected);
    p->count_bins = (int)count_bins;
    p->num_params = (int)num_params;
    p->tails = (int)tails;
    if (read_columns(args[OWN_ARG - DIM_ARG], p->dim, &p->own, &p->num_own)) return -1;
    if (read_columns(args[SHARED_ARG - DIM_ARG], p->dim, &p->shared, &p->num_shared)) return -1;
    if (p->num_own + p->num_shared > p->dim) return fail("columns: at most", p->num_own + p->num_shared, p->dim);
    return 0;
}

int read_sizes(PyObject *sizes, Py_ssize_t count, perceptron *q) {
    if (count < 2) return fail("layers: at least", count - 1, 1);
    if (count > MAX_LAYERS + 1) return fail("layers: at most", count - 1, MAX_LAYERS);
    q->num_layers = (int)count - 1;
    for (int i = 0; i < count; i++) {
        const int64_t size = PyLong_AsLongLong(PyTuple_GetItem(sizes, i));
        if (PyErr_Occurred()) return -1;
        if (size < (i > 0)) return fail("a layer of at least", size, i > 0);
        if (size > INT32_MAX) return fail("a layer of at most", size, INT32_MAX);
        q->sizes[i] = (int32_t)size;
    }
    return 0;
}

int check_network(const perceptron *q, const problem *p) {
    const int64_t inputs = q->num_passed + q->context_dim, outputs = p->num_own * p->num_params;
    if (q->first < 0) return fail("a first column that passes of at least", q->first, 0);
    if (q->num_passed < 0) return fail("columns that pass: at least", q->num_passed, 0);
    if (q->first > p->dim || q->num_passed > p->dim - q->first)
        return fail("columns that pass: up to", q->first + q->num_passed, p->dim);
    if (q->context_dim < 0) return fail("a context of at least", q->context_dim, 0);
    if (q->sizes[0] != inputs) return fail("a network's inputs:", q->sizes[0], inputs);
    if (q->sizes[q->num_layers] != outputs)
        return fail("a network's outputs:", q->sizes[q->num_layers], outputs);
    return 0;
}

static int read_problem(PyObject *const *args, problem *p) {
    p->inverse = (int)PyLong_AsLong(args[INVERSE_ARG]);
    p->sum_ladj = (int)PyLong_AsLong(args[SUM_ARG]);
    p->rows = PyLong_AsLongLong(args[ROWS_ARG]);
    if (PyErr_Occurred()) return -1;
    if (p->rows < 0) return fail("rows: at least", p->rows, 0);
    return read_splines(args + DIM_ARG, p);
}

static PyObject *call(PyObject *const *args, Py_ssize_t count, int addresses, int backward) {
    problem p;
    void *a[8] = {0};
    int failed;
    if (count != FIRST_ADDRESS + addresses)
        return PyErr_Format(PyExc_TypeError, "Expected %d arguments, got %zd.", FIRST_ADDRESS + addresses, count);
    const int is_double = (int)PyLong_AsLong(args[IS_DOUBLE_ARG]);
    if (read_problem(args, &p)) return NULL;
    for (int i = 0; i < addresses; i++) a[i] = PyLong_AsVoidPtr(args[FIRST_ADDRESS + i]);
    if (PyErr_Occurred()) return NULL;

    PyThreadState *saved = p.rows * (p.num_own + p.num_shared) > MANY_SPLINES ? PyEval_SaveThread() : NULL;
    if (backward)
        failed = is_double ? chosen->double_run_backward(&p, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7])
                           : chosen->float_run_backward(&p, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
    else
        failed = is_double ? chosen->double_run(&p, a[0], a[1], a[2], a[3], a[4])
                           : chosen->float_run(&p, a[0], a[1], a[2], a[3], a[4]);
    if (saved) PyEval_RestoreThread(saved);
    if (failed) return PyErr_NoMemory();
    return none();
}

static PyObject *py_run(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return call(args, count, 5, 0);
}

static PyObject *py_run_backward(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return call(args, count, 8, 1);
}

enum { FIRST_ARG = FIRST_ADDRESS, PASSED_ARG, CONTEXT_DIM_ARG, LIMIT_ARG, LAYERS_ARG, FIRST_COUPLING_ADDRESS };

/* layers: addresses of weight and bias of every layer, after the sizes of the first inputs and of every layer's outputs */
static int read_perceptron(PyObject *const *args, const problem *p, perceptron *q, const void **weights,
                           const void **biases) {
    PyObject *layers = args[LAYERS_ARG];
    const Py_ssize_t count = PyTuple_Size(layers);
    if (count < 0) return -1;
    if (count % 3 != 1) return fail("sizes and addresses of layers: by 3 a remainder of", count % 3, 1);
    if (read_sizes(layers, (count - 1) / 3 + 1, q)) return -1;
    for (int i = 0; i < q->num_layers; i++) {
        weights[i] = PyLong_AsVoidPtr(PyTuple_GetItem(layers, q->num_layers + 1 + 2 * i));
        biases[i] = PyLong_AsVoidPtr(PyTuple_GetItem(layers, q->num_layers + 2 + 2 * i));
    }
    q->first = PyLong_AsLongLong(args[FIRST_ARG]);
    q->num_passed = PyLong_AsLongLong(args[PASSED_ARG]);
    q->context_dim = PyLong_AsLongLong(args[CONTEXT_DIM_ARG]);
    q->limit = PyFloat_AsDouble(args[LIMIT_ARG]);
    return PyErr_Occurred() ? -1 : check_network(q, p);
}

static PyObject *call_coupling(PyObject *const *args, Py_ssize_t count, int addresses, int backward) {
    problem p;
    perceptron q;
    const void *weights[MAX_LAYERS], *biases[MAX_LAYERS];
    void *a[9] = {0};
    int failed;
    if (count != FIRST_COUPLING_ADDRESS + addresses)
        return PyErr_Format(PyExc_TypeError, "Expected %d arguments, got %zd.", FIRST_COUPLING_ADDRESS + addresses, count);
    const int is_double = (int)PyLong_AsLong(args[IS_DOUBLE_ARG]);
    if (read_problem(args, &p) || read_perceptron(args, &p, &q, weights, biases)) return NULL;
    for (int i = 0; i < addresses; i++) a[i] = PyLong_AsVoidPtr(args[FIRST_COUPLING_ADDRESS + i]);
    if (PyErr_Occurred()) return NULL;

    PyThreadState *saved = p.rows * p.num_own > MANY_SPLINES / 4 ? PyEval_SaveThread() : NULL;
#define CALL(type)                                                                                                   \
    (backward ? chosen->type##_couple_backward(&p, &q, a[0], a[1], (const type *const *)weights, a[2], a[3], a[4],    \
                                               a[5], a[6], a[7], a[8])                                               \
              : chosen->type##_couple(&p, &q, a[0], a[1], a[2], (const type *const *)weights,                         \
                                      (const type *const *)biases, a[3], a[4], a[5]))
    failed = is_double ? CALL(double) : CALL(float);
#undef CALL
    if (saved) PyEval_RestoreThread(saved);
    if (failed) return PyErr_NoMemory();
    return none();
}

static PyObject *py_couple(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return call_coupling(args, count, 6, 0);
}

static PyObject *py_couple_backward(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return call_coupling(args, count, 9, 1);
}

static PyObject *py_kept_per_row(PyObject *module, PyObject *sizes) {
    perceptron q;
    const Py_ssize_t count = PyTuple_Size(sizes);
    (void)module;
    if (count < 0 || read_sizes(sizes, count, &q)) return NULL;
    return PyLong_FromLongLong(kernel_kept_per_row(&q));
}

static PyObject *py_instruction_sets(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < num_available; i++) {
        PyObject *name = PyUnicode_FromString(available[i].name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_choose(PyObject *module, PyObject *name) {
    (void)module;
    const char *before = chosen->name;
    PyObject *encoded = PyUnicode_AsUTF8String(name);
    if (!encoded) return NULL;
    const char *wanted = PyBytes_AsString(encoded);
    int found = 0;
    for (int i = 0; i < num_available; i++) {
        if (strcmp(available[i].name, wanted)) continue;
        chosen = &available[i];
        found = 1;
    }
    Py_DECREF(encoded);
    if (!found) return PyErr_Format(PyExc_ValueError, "Expected an instruction set of instruction_sets(), got %R.", name);
    return PyUnicode_FromString(before);
}

static PyMethodDef methods[] = {
    {"run", (PyCFunction)(void (*)(void))py_run, METH_FASTCALL, "Values and log-dets."},
    {"run_backward", (PyCFunction)(void (*)(void))py_run_backward, METH_FASTCALL, "Derivatives."},
    {"couple", (PyCFunction)(void (*)(void))py_couple, METH_FASTCALL, "Values and log-dets of a coupling."},
    {"couple_backward", (PyCFunction)(void (*)(void))py_couple_backward, METH_FASTCALL, "Their derivatives."},
    {"kept_per_row", py_kept_per_row, METH_O, "Numbers that a coupling keeps of a row, for the sizes of its network."},
    {"run_chain", (PyCFunction)(void (*)(void))py_run_chain, METH_FASTCALL, "Values and log-dets of layers."},
    {"push_chain", (PyCFunction)(void (*)(void))py_push_chain, METH_FASTCALL, "A derivative carried through them."},
    {"run_chain_backward", (PyCFunction)(void (*)(void))py_run_chain_backward, METH_FASTCALL, "Their derivatives."},
    {"pull_chain", (PyCFunction)(void (*)(void))py_pull_chain, METH_FASTCALL, "Inputs of layers and their log-dets."},
    {"pull_chain_backward", (PyCFunction)(void (*)(void))py_pull_chain_backward, METH_FASTCALL, "Their derivatives."},
    {"kept_of_chain", (PyCFunction)(void (*)(void))py_kept_of_chain, METH_FASTCALL, "Room for what they keep."},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, "Names of the instances that run here, best last."},
    {"choose", py_choose, METH_O, "Take the instance of this name; returns the name of the one before."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_fused",
    .m_doc = "The fused spline kernel; see pyro_flowkit.ops.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__fused(void);

PyMODINIT_FUNC PyInit__fused(void) {
    available = kernel_instances(&num_available);
    chosen = &available[num_available - 1];
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddIntConstant(module, "MAX_LAYERS", MAX_LAYERS) ||
                   PyModule_AddIntConstant(module, "MAX_BLOCKS", MAX_BLOCKS) ||
                   PyModule_AddIntConstant(module, "MAX_CHAIN", MAX_CHAIN)))
        Py_CLEAR(module);
    return module;
}
