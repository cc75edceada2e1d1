/* Finds a Python environment, starts Python in it or joins the one that runs, and imports the package; once. */
#define _GNU_SOURCE
#include "internal.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static char error[PATH_MAX + 5000]; /* written inside `once`, read after it */
static PyObject *module;

/* An interpreter in a folder above this library: that of the virtual environment it is installed in. */
static int find_beside_library(char *path, size_t size)
{
    Dl_info self;
    char folder[PATH_MAX];
    if (dladdr((void *)&swifti2v_abi_version, &self) == 0 || realpath(self.dli_fname, folder) == NULL) {
        return 0;
    }
    for (char *slash; (slash = strrchr(folder, '/')) != NULL;) {
        *slash = '\0';
        int fits = snprintf(path, size, "%s/pyvenv.cfg", folder) < (int)size;
        if (fits && access(path, R_OK) == 0) {
            return snprintf(path, size, "%s/bin/python", folder) < (int)size;
        }
    }
    return 0;
}

static int is_program(const char *path)
{
    struct stat found;
    return path[0] == '/' && stat(path, &found) == 0 && S_ISREG(found.st_mode) && access(path, X_OK) == 0;
}

/* The interpreter whose environment is used: the first that is named, whether it works or not. */
static int find_python(char *path, size_t size)
{
    const char *named = getenv("SWIFTI2V_PYTHON");
    const char *from = "$SWIFTI2V_PYTHON";
    int fits = 1;
    if (named != NULL && named[0] != '\0') {
        fits = snprintf(path, size, "%s", named) < (int)size;
    } else if (find_beside_library(path, size)) {
        from = "the virtual environment of this library";
    } else {
        from = "the build of this library";
        fits = snprintf(path, size, "%s", SWIFTI2V_BUILD_PYTHON) < (int)size;
    }
    if (fits && is_program(path)) {
        return 1;
    }
    snprintf(error, sizeof error,
        "Python: got %s from %s, want the absolute path of an interpreter; set SWIFTI2V_PYTHON to .../bin/python of an "
        "environment with swifti2v", path, from);
    return 0;
}

/* In a library opened by dlopen(RTLD_LOCAL) libpython is local too, and the extension modules would not find it. */
static void make_python_global(void)
{
    Dl_info python;
    if (dladdr((void *)&Py_IsInitialized, &python) != 0) {
        dlopen(python.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
    }
}

/* Isolated: PYTHONPATH, PYTHONHOME and the locale of the host change nothing; texts and paths are UTF-8. */
static PyStatus start_python(const char *path)
{
    PyPreConfig before;
    PyConfig config;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1;
    PyStatus status = Py_PreInitialize(&before);
    if (PyStatus_Exception(status)) {
        return status;
    }
    PyConfig_InitIsolatedConfig(&config);
    config.install_signal_handlers = 0;
    status = PyConfig_SetBytesString(&config, &config.program_name, path);
    if (!PyStatus_Exception(status)) {
        status = Py_InitializeFromConfig(&config);
    }
    PyConfig_Clear(&config);
    return status;
}

/* runtime/capi.py of this library's version, or NULL and the text why not. The GIL is held. */
static PyObject *import_package(const char *path)
{
    PyObject *imported = PyImport_ImportModule("swifti2v.runtime.capi");
    PyObject *version = imported == NULL ? NULL : PyObject_GetAttrString(imported, "API_VERSION");
    if (version != NULL && PyLong_AsLong(version) == SWIFTI2V_ABI_VERSION) {
        Py_DECREF(version);
        return imported;
    }
    if (version == NULL) {
        swifti2v_fail_python("package swifti2v");
    } else {
        swifti2v_fail(SWIFTI2V_ENVIRONMENT, "package swifti2v: got another version of its calls");
    }
    Py_XDECREF(version);
    Py_XDECREF(imported);
    snprintf(error, sizeof error,
        "%s, in the environment of %s; want the one that belongs to this library, for Python %d.%d; pip install it "
        "there, or set SWIFTI2V_PYTHON", swifti2v_thread_error(), path, PY_MAJOR_VERSION, PY_MINOR_VERSION);
    return NULL;
}

/* In a host that runs Python already its environment is used, whatever SWIFTI2V_PYTHON says. */
static void join_python(void)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    module = import_package("the Python that this process runs");
    PyGILState_Release(gil);
}

static void start(void)
{
    char wanted[16], path[PATH_MAX];
    snprintf(wanted, sizeof wanted, "%d.%d.", PY_MAJOR_VERSION, PY_MINOR_VERSION);
    if (strncmp(Py_GetVersion(), wanted, strlen(wanted)) != 0) {
        snprintf(error, sizeof error, "Python: got version %.20s in this process, want %d.%d; build the library for it",
            Py_GetVersion(), PY_MAJOR_VERSION, PY_MINOR_VERSION);
        return;
    }
    make_python_global();
    if (Py_IsInitialized()) {
        join_python();
        return;
    }
    if (!find_python(path, sizeof path)) {
        return;
    }
    PyStatus status = start_python(path);
    if (PyStatus_Exception(status)) {
        snprintf(error, sizeof error,
            "Python: got '%s' from %s, want a Python %d.%d that starts; set SWIFTI2V_PYTHON to .../bin/python of one",
            status.err_msg == NULL ? "no reason" : status.err_msg, path, PY_MAJOR_VERSION, PY_MINOR_VERSION);
        return;
    }
    module = import_package(path);
    PyEval_SaveThread(); /* from here on no thread holds the GIL between calls; Python is never finalized */
}

/* As PyGILState_Check, which says yes to every thread once the host has made a subinterpreter. */
static int holds_gil(void)
{
#if PY_VERSION_HEX >= 0x030D0000
    PyThreadState *current = PyThreadState_GetUnchecked();
#else
    PyThreadState *current = _PyThreadState_UncheckedGet();
#endif
    return current != NULL && current == PyGILState_GetThisThreadState();
}

swifti2v_status swifti2v_start_once(void)
{
    /* A caller that holds the GIL would keep it from the thread that starts. */
    PyThreadState *held = Py_IsInitialized() && holds_gil() ? PyEval_SaveThread() : NULL;
    pthread_once(&once, start);
    if (held != NULL) {
        PyEval_RestoreThread(held);
    }
    if (error[0] != '\0') {
        return swifti2v_fail(SWIFTI2V_ENVIRONMENT, "%s", error);
    }
    if (!Py_IsInitialized()) {
        return swifti2v_fail(SWIFTI2V_ENVIRONMENT, "Python: got one that was shut down, want it running; call earlier");
    }
    return SWIFTI2V_OK;
}

const char *swifti2v_start_error(void)
{
    return error;
}

PyObject *swifti2v_module(void)
{
    return module;
}
