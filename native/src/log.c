/* The host's log callback, as a Python function. */
#include "internal.h"

#include <stdlib.h>

typedef struct log_target {
    swifti2v_log_callback callback;
    void *user;
} log_target;

/* What Python calls for a line of the log; the GIL is free while the host's function runs. */
static PyObject *send_log(PyObject *capsule, PyObject *arguments)
{
    int level;
    const char *text;
    const log_target *target = PyCapsule_GetPointer(capsule, NULL);
    if (target == NULL || !PyArg_ParseTuple(arguments, "is", &level, &text)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    target->callback(level, text, target->user);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static void free_target(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, NULL));
}

/* A Python function that calls the host's; None for NULL. NULL and an exception if there is no memory. */
static PyObject *log_function(swifti2v_log_callback callback, void *user)
{
    static PyMethodDef method = {"send_log", send_log, METH_VARARGS, NULL};
    if (callback == NULL) {
        return Py_NewRef(Py_None);
    }
    log_target *target = malloc(sizeof *target);
    if (target == NULL) {
        return PyErr_NoMemory();
    }
    *target = (log_target){callback, user};
    PyObject *capsule = PyCapsule_New(target, NULL, free_target);
    if (capsule == NULL) {
        free(target);
        return NULL;
    }
    PyObject *function = PyCFunction_New(&method, capsule);
    Py_DECREF(capsule);
    return function;
}

swifti2v_status swifti2v_set_log(swifti2v_log_callback callback, void *user, int32_t min_level)
{
    PyGILState_STATE gil;
    PyObject *result = NULL;
    swifti2v_status status = swifti2v_enter(&gil);
    if (status != SWIFTI2V_OK) {
        return status;
    }
    PyObject *function = log_function(callback, user);
    if (function != NULL) {
        status = swifti2v_call("set_log", &result, "(Oi)", function, (int)min_level);
        Py_DECREF(function);
    }
    return swifti2v_leave(gil, status, result);
}
