/* What the files of the library share. */
#ifndef SWIFTI2V_INTERNAL_H
#define SWIFTI2V_INTERNAL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "swifti2v.h"

/* Keeps a text for swifti2v_last_error(0) of this thread, and gives the status back. */
swifti2v_status swifti2v_fail(swifti2v_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Copies a text, cut between UTF-8 characters where it does not fit. */
void swifti2v_copy_text(char *to, size_t size, const char *from);

/* The text that this thread keeps; empty if it has none. */
const char *swifti2v_thread_error(void);

/* Starts Python and imports runtime/capi.py, once for the process. Not OK: the text is kept for this thread. */
swifti2v_status swifti2v_start_once(void);

/* Why the start failed, for every thread; empty if it did not. */
const char *swifti2v_start_error(void);

/* The imported runtime/capi.py; only after a start that was OK, with the GIL held. */
PyObject *swifti2v_module(void);

/* Turns the Python exception that is set into a status and a text, and clears it. The GIL is held. */
swifti2v_status swifti2v_fail_python(const char *what);

/* Starts the library and takes the GIL. Not OK: it is not taken. */
swifti2v_status swifti2v_enter(PyGILState_STATE *gil);

/*
 * Calls NAME of runtime/capi.py with a tuple made by `format` of Py_BuildValue. Its answer is (status, result): OK gives
 * a new reference to the result, anything else NULL, and an error keeps its text for this thread.
 */
swifti2v_status swifti2v_call(const char *name, PyObject **result, const char *format, ...);

/* Frees a result (or NULL) and the GIL. An exception that reading the result has set becomes a status. */
swifti2v_status swifti2v_leave(PyGILState_STATE gil, swifti2v_status status, PyObject *result);

#endif
