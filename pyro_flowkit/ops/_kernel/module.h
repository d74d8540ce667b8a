/* What the files of the Python extension share. */
#ifndef PYRO_FLOWKIT_MODULE_H
#define PYRO_FLOWKIT_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernel.h"

extern const instance *chosen;

/* None, with a reference of its own. */
PyObject *none(void);

/* What of a problem does not depend on the call: SPLINE_ARGS arguments, as Columns.packed and SplineSettings.packed. */
enum { SPLINE_ARGS = 10, MAX_BINS = 1 << 20 };
int read_splines(PyObject *const *args, problem *p);

/* The sizes of a network, the first of a tuple of this many or more. */
int read_sizes(PyObject *sizes, Py_ssize_t count, perceptron *q);

/* Whether the network fits the splines; and columns a dimension. */
int check_network(const perceptron *q, const problem *p);
int check_columns(const int32_t *columns, int64_t count, int64_t dim);

/* -1, with a ValueError that says both sides. */
int fail(const char *what, long long got, long long want);

PyObject *py_run_chain(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *py_push_chain(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *py_run_chain_backward(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *py_pull_chain(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *py_pull_chain_backward(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *py_kept_of_chain(PyObject *module, PyObject *const *args, Py_ssize_t count);

#endif
