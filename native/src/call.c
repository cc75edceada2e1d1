/* One call of runtime/capi.py: the GIL, the arguments, the answer. */
#include "internal.h"

#include <stdarg.h>

swifti2v_status swifti2v_enter(PyGILState_STATE *gil)
{
    swifti2v_status status = swifti2v_start_once();
    if (status == SWIFTI2V_OK) {
        *gil = PyGILState_Ensure();
    }
    return status;
}

/* Keeps the text of the failure that a call has just reported. */
static void keep_error(int status)
{
    int kept;
    const char *text;
    PyObject *said = PyObject_CallMethod(swifti2v_module(), "last_error", NULL);
    if (said == NULL || !PyArg_ParseTuple(said, "is", &kept, &text)) {
        swifti2v_fail_python("last_error");
    } else {
        swifti2v_fail(status, "%s", text);
    }
    Py_XDECREF(said);
}

swifti2v_status swifti2v_call(const char *name, PyObject **result, const char *format, ...)
{
    int status;
    va_list values;
    va_start(values, format);
    PyObject *arguments = Py_VaBuildValue(format, values);
    va_end(values);
    PyObject *function = arguments == NULL ? NULL : PyObject_GetAttrString(swifti2v_module(), name);
    PyObject *answer = function == NULL ? NULL : PyObject_Call(function, arguments, NULL);
    *result = NULL;
    if (answer == NULL || !PyArg_ParseTuple(answer, "iO", &status, result)) {
        status = swifti2v_fail_python(name);
    } else if (status < 0) {
        keep_error(status);
    }
    if (status == SWIFTI2V_OK) {
        Py_INCREF(*result);
    } else {
        *result = NULL;
    }
    Py_XDECREF(answer);
    Py_XDECREF(function);
    Py_XDECREF(arguments);
    return status;
}

swifti2v_status swifti2v_leave(PyGILState_STATE gil, swifti2v_status status, PyObject *result)
{
    if (PyErr_Occurred()) {
        status = swifti2v_fail_python("answer");
    }
    Py_XDECREF(result);
    PyGILState_Release(gil);
    return status;
}
