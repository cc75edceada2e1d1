/* Texts of errors, one per thread. */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char text[4096];

/* Ends a text that did not fit into `size` bytes, so that no half of a UTF-8 character stays. */
static void cut(char *cut_text, size_t size)
{
    size_t end = size - 1;
    while (end > 0 && ((unsigned char)cut_text[end - 1] & 0xC0) == 0x80) {
        end--;
    }
    cut_text[end > 0 ? end - 1 : 0] = '\0';
}

void swifti2v_copy_text(char *to, size_t size, const char *from)
{
    if (snprintf(to, size, "%s", from) >= (int)size) {
        cut(to, size);
    }
}

swifti2v_status swifti2v_fail(swifti2v_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (vsnprintf(text, sizeof text, format, arguments) >= (int)sizeof text) {
        cut(text, sizeof text);
    }
    va_end(arguments);
    return status;
}

const char *swifti2v_thread_error(void)
{
    return text;
}

swifti2v_status swifti2v_fail_python(const char *what)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (type != NULL && PyErr_GivenExceptionMatches(type, PyExc_KeyboardInterrupt)) {
        PyErr_SetInterrupt(); /* the host's Python sees its Ctrl-C after this call */
    }
    PyObject *said = value == NULL ? NULL : PyObject_Str(value);
    const char *utf8 = said == NULL ? NULL : PyUnicode_AsUTF8(said);
    const char *kind = type == NULL ? "no exception" : ((PyTypeObject *)type)->tp_name;
    swifti2v_fail(SWIFTI2V_FAILED, "%s: got %s: %s", what, kind, utf8 == NULL ? "" : utf8);
    PyErr_Clear(); /* of a __str__ that failed */
    Py_XDECREF(said);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return SWIFTI2V_FAILED;
}

const char *swifti2v_status_name(int32_t status)
{
    switch (status) {
    case SWIFTI2V_OK: return "OK";
    case SWIFTI2V_END: return "END";
    case SWIFTI2V_TIMEOUT: return "TIMEOUT";
    case SWIFTI2V_INVALID_HANDLE: return "INVALID_HANDLE";
    case SWIFTI2V_INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case SWIFTI2V_INVALID_JSON: return "INVALID_JSON";
    case SWIFTI2V_INVALID_IMAGE: return "INVALID_IMAGE";
    case SWIFTI2V_BUFFER_TOO_SMALL: return "BUFFER_TOO_SMALL";
    case SWIFTI2V_INVALID_STATE: return "INVALID_STATE";
    case SWIFTI2V_CANCELLED: return "CANCELLED";
    case SWIFTI2V_ENVIRONMENT: return "ENVIRONMENT";
    case SWIFTI2V_MODEL: return "MODEL";
    case SWIFTI2V_NUMERICS: return "NUMERICS";
    case SWIFTI2V_NO_MEMORY: return "NO_MEMORY";
    case SWIFTI2V_FAILED: return "FAILED";
    default: return "UNKNOWN";
    }
}
