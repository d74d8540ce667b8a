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

int read_splines(PyObject *const *args, problem *p) {
    Py_ssize_t own_bytes, shared_bytes;
    char *own, *shared;
    if (PyBytes_AsStringAndSize(args[OWN_ARG - DIM_ARG], &own, &own_bytes)) return -1;
    if (PyBytes_AsStringAndSize(args[SHARED_ARG - DIM_ARG], &shared, &shared_bytes)) return -1;
    p->own = (const int32_t *)own;
    p->shared = (const int32_t *)shared;
    p->num_own = own_bytes / (Py_ssize_t)sizeof(int32_t);
    p->num_shared = shared_bytes / (Py_ssize_t)sizeof(int32_t);
    p->dim = PyLong_AsLongLong(args[0]);
    p->count_bins = (int)PyLong_AsLong(args[BINS_ARG - DIM_ARG]);
    p->num_params = (int)PyLong_AsLong(args[PARAMS_ARG - DIM_ARG]);
    p->tails = (int)PyLong_AsLong(args[TAILS_ARG - DIM_ARG]);
    p->bound = PyFloat_AsDouble(args[BOUND_ARG - DIM_ARG]);
    p->min_bin_width = PyFloat_AsDouble(args[WIDTH_ARG - DIM_ARG]);
    p->min_bin_height = PyFloat_AsDouble(args[HEIGHT_ARG - DIM_ARG]);
    p->min_slope = PyFloat_AsDouble(args[SLOPE_ARG - DIM_ARG]);
    return PyErr_Occurred() ? -1 : 0;
}

static int read_problem(PyObject *const *args, problem *p) {
    p->inverse = (int)PyLong_AsLong(args[INVERSE_ARG]);
    p->sum_ladj = (int)PyLong_AsLong(args[SUM_ARG]);
    p->rows = PyLong_AsLongLong(args[ROWS_ARG]);
    return read_splines(args + DIM_ARG, p);
}

static PyObject *call(PyObject *const *args, Py_ssize_t count, int addresses, int backward) {
    problem p;
    void *a[8] = {0};
    int failed;
    if (count != FIRST_ADDRESS + addresses)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", FIRST_ADDRESS + addresses, count);
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
static int read_perceptron(PyObject *const *args, perceptron *q, const void **weights, const void **biases) {
    PyObject *layers = args[LAYERS_ARG];
    const Py_ssize_t count = PyTuple_Size(layers);
    if (count < 0) return -1;
    q->num_layers = (int)((count - 1) / 3);
    if (count != 3 * q->num_layers + 1 || q->num_layers < 1 || q->num_layers > MAX_LAYERS) {
        PyErr_Format(PyExc_ValueError, "expected 1 to %d layers, got a tuple of %zd", MAX_LAYERS, count);
        return -1;
    }
    for (int i = 0; i <= q->num_layers; i++) q->sizes[i] = (int32_t)PyLong_AsLong(PyTuple_GetItem(layers, i));
    for (int i = 0; i < q->num_layers; i++) {
        weights[i] = PyLong_AsVoidPtr(PyTuple_GetItem(layers, q->num_layers + 1 + 2 * i));
        biases[i] = PyLong_AsVoidPtr(PyTuple_GetItem(layers, q->num_layers + 2 + 2 * i));
    }
    q->first = PyLong_AsLongLong(args[FIRST_ARG]);
    q->num_passed = PyLong_AsLongLong(args[PASSED_ARG]);
    q->context_dim = PyLong_AsLongLong(args[CONTEXT_DIM_ARG]);
    q->limit = PyFloat_AsDouble(args[LIMIT_ARG]);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *call_coupling(PyObject *const *args, Py_ssize_t count, int addresses, int backward) {
    problem p;
    perceptron q;
    const void *weights[MAX_LAYERS], *biases[MAX_LAYERS];
    void *a[9] = {0};
    int failed;
    if (count != FIRST_COUPLING_ADDRESS + addresses)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", FIRST_COUPLING_ADDRESS + addresses, count);
    const int is_double = (int)PyLong_AsLong(args[IS_DOUBLE_ARG]);
    if (read_problem(args, &p) || read_perceptron(args, &q, weights, biases)) return NULL;
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
    if (!found) return PyErr_Format(PyExc_ValueError, "expected an instruction set of instruction_sets(), got %R", name);
    return PyUnicode_FromString(before);
}

static PyMethodDef methods[] = {
    {"run", (PyCFunction)(void (*)(void))py_run, METH_FASTCALL, "Values and log-dets."},
    {"run_backward", (PyCFunction)(void (*)(void))py_run_backward, METH_FASTCALL, "Derivatives."},
    {"couple", (PyCFunction)(void (*)(void))py_couple, METH_FASTCALL, "Values and log-dets of a coupling."},
    {"couple_backward", (PyCFunction)(void (*)(void))py_couple_backward, METH_FASTCALL, "Their derivatives."},
    {"run_chain", (PyCFunction)(void (*)(void))py_run_chain, METH_FASTCALL, "Values and log-dets of layers."},
    {"push_chain", (PyCFunction)(void (*)(void))py_push_chain, METH_FASTCALL, "A derivative carried through them."},
    {"run_chain_backward", (PyCFunction)(void (*)(void))py_run_chain_backward, METH_FASTCALL, "Their derivatives."},
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
    return PyModule_Create(&definition);
}
