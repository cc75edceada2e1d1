/* The functions of swifti2v.h: each checks its arguments, calls runtime/capi.py and reads the answer. */
#include "internal.h"

#include <stdio.h>

typedef unsigned long long handle_t; /* what Py_BuildValue calls K */

static swifti2v_status null(const char *name)
{
    return swifti2v_fail(SWIFTI2V_INVALID_ARGUMENT, "%s: got NULL, want a pointer; pass one", name);
}

/* OK for a struct of this version; all begin with the same two fields. */
static swifti2v_status check(const void *given, size_t size, const char *name)
{
    const swifti2v_info *head = given;
    if (head == NULL) {
        return null(name);
    }
    if (head->struct_size == size && head->version == SWIFTI2V_ABI_VERSION) {
        return SWIFTI2V_OK;
    }
    return swifti2v_fail(SWIFTI2V_INVALID_ARGUMENT,
        "%s: got struct_size %zu and version %u, want %zu and %u; set them by its _INIT macro, compile with this header",
        name, head->struct_size, (unsigned)head->version, size, (unsigned)SWIFTI2V_ABI_VERSION);
}

uint32_t swifti2v_abi_version(void)
{
    return SWIFTI2V_ABI_VERSION;
}

swifti2v_status swifti2v_start(void)
{
    return swifti2v_start_once();
}

const char *swifti2v_version(void)
{
    static char text[64]; /* written once, with the GIL held */
    PyGILState_STATE gil;
    PyObject *result;
    int api;
    const char *version;
    swifti2v_status status = swifti2v_enter(&gil);
    if (status != SWIFTI2V_OK) {
        return NULL;
    }
    status = swifti2v_call("version", &result, "()");
    if (status == SWIFTI2V_OK && PyArg_ParseTuple(result, "is", &api, &version) && text[0] == '\0') {
        snprintf(text, sizeof text, "%s", version);
    }
    return swifti2v_leave(gil, status, result) == SWIFTI2V_OK ? text : NULL;
}

const char *swifti2v_last_error(swifti2v_session session)
{
    static _Thread_local char text[4096];
    PyGILState_STATE gil;
    PyObject *result;
    swifti2v_status status = SWIFTI2V_FAILED;
    if (session != 0 && (status = swifti2v_enter(&gil)) == SWIFTI2V_OK) {
        status = swifti2v_call("last_error", &result, "(K)", (handle_t)session);
        if (status == SWIFTI2V_OK) {
            const char *said = PyUnicode_AsUTF8(result);
            swifti2v_copy_text(text, sizeof text, said == NULL ? "" : said);
        }
        status = swifti2v_leave(gil, status, result);
    }
    if (status != SWIFTI2V_OK) { /* a copy: the next call that fails writes over the thread's own */
        const char *said = swifti2v_thread_error();
        swifti2v_copy_text(text, sizeof text, said[0] != '\0' ? said : swifti2v_start_error());
    }
    return text;
}

swifti2v_status swifti2v_create(const char *config_json, swifti2v_session *session)
{
    PyGILState_STATE gil;
    PyObject *result;
    if (session == NULL) {
        return null("session");
    }
    *session = 0;
    if (config_json == NULL) {
        return null("config_json");
    }
    swifti2v_status status = swifti2v_enter(&gil);
    if (status != SWIFTI2V_OK) {
        return status;
    }
    status = swifti2v_call("create", &result, "(y)", config_json);
    if (status == SWIFTI2V_OK) {
        *session = PyLong_AsUnsignedLongLong(result);
    }
    return swifti2v_leave(gil, status, result);
}

/* A call on a session whose answer is its status alone. */
static swifti2v_status call_plain(const char *name, swifti2v_session session)
{
    PyGILState_STATE gil;
    PyObject *result;
    swifti2v_status status = swifti2v_enter(&gil);
    if (status != SWIFTI2V_OK) {
        return status;
    }
    status = swifti2v_call(name, &result, "(K)", (handle_t)session);
    return swifti2v_leave(gil, status, result);
}

swifti2v_status swifti2v_destroy(swifti2v_session session)
{
    return call_plain("destroy", session);
}

swifti2v_status swifti2v_cancel(swifti2v_session session)
{
    return call_plain("cancel", session);
}

swifti2v_status swifti2v_get_info(swifti2v_session session, swifti2v_info *info)
{
    PyGILState_STATE gil;
    PyObject *result;
    Py_ssize_t bytes = 0;
    swifti2v_status status = check(info, sizeof *info, "info");
    if (status != SWIFTI2V_OK || (status = swifti2v_enter(&gil)) != SWIFTI2V_OK) {
        return status;
    }
    status = swifti2v_call("info", &result, "(K)", (handle_t)session);
    if (status == SWIFTI2V_OK && PyArg_ParseTuple(result, "IIIIInd", &info->width, &info->height, &info->frames,
            &info->segments, &info->segment_frames, &bytes, &info->fps)) {
        info->segment_bytes = (size_t)bytes;
    }
    return swifti2v_leave(gil, status, result);
}

/* The image as Python reads it: a view of the caller's memory that ends with the call. NULL: an exception is set. */
static PyObject *pixels_of(const swifti2v_image *image)
{
    PyObject *rows = PyMemoryView_FromMemory((char *)image->rgb, (Py_ssize_t)image->rgb_bytes, PyBUF_READ);
    PyObject *pixels = rows == NULL ? NULL
                                    : PyObject_CallMethod(swifti2v_module(), "Pixels", "OIII", rows, image->width,
                                          image->height, image->row_bytes);
    Py_XDECREF(rows);
    return pixels;
}

swifti2v_status swifti2v_submit(swifti2v_session session, const char *request_json, const swifti2v_image *image)
{
    PyGILState_STATE gil;
    PyObject *result = NULL;
    if (request_json == NULL) {
        return null("request_json");
    }
    swifti2v_status status = image == NULL ? SWIFTI2V_OK : check(image, sizeof *image, "image");
    if (status != SWIFTI2V_OK) {
        return status;
    }
    if (image != NULL && (image->rgb == NULL || image->rgb_bytes > PY_SSIZE_T_MAX)) {
        return swifti2v_fail(SWIFTI2V_INVALID_ARGUMENT, "image.rgb: got %zu bytes at %p, want all rows; pass them",
            image->rgb_bytes, (const void *)image->rgb);
    }
    if ((status = swifti2v_enter(&gil)) != SWIFTI2V_OK) {
        return status;
    }
    PyObject *pixels = image == NULL ? Py_NewRef(Py_None) : pixels_of(image);
    if (pixels != NULL) {
        status = swifti2v_call("submit", &result, "(KyO)", (handle_t)session, request_json, pixels);
        Py_DECREF(pixels);
    }
    return swifti2v_leave(gil, status, result);
}

swifti2v_status swifti2v_poll(swifti2v_session session, swifti2v_progress *progress)
{
    PyGILState_STATE gil;
    PyObject *result;
    swifti2v_status status = check(progress, sizeof *progress, "progress");
    if (status != SWIFTI2V_OK || (status = swifti2v_enter(&gil)) != SWIFTI2V_OK) {
        return status;
    }
    status = swifti2v_call("poll", &result, "(K)", (handle_t)session);
    if (status == SWIFTI2V_OK) {
        PyArg_ParseTuple(result, "iidII", &progress->state, &progress->stage, &progress->progress,
            &progress->segments_made, &progress->segments_waiting);
    }
    return swifti2v_leave(gil, status, result);
}

/* Fills what copied and borrowed segments have in common. Not read: an exception is set. */
static int read_segment(PyObject *description, swifti2v_segment *segment)
{
    Py_ssize_t bytes = 0;
    int read = PyArg_ParseTuple(description, "IIIIIn", &segment->segment, &segment->first_frame, &segment->frames,
        &segment->width, &segment->height, &bytes);
    segment->bytes = (size_t)bytes;
    return read;
}

static double seconds(int32_t timeout_ms)
{
    return timeout_ms < 0 ? -1.0 : timeout_ms / 1000.0;
}

swifti2v_status swifti2v_next_segment(
    swifti2v_session session, void *buffer, size_t buffer_bytes, int32_t timeout_ms, swifti2v_segment *segment)
{
    PyGILState_STATE gil;
    PyObject *result = NULL;
    swifti2v_status status = check(segment, sizeof *segment, "segment");
    if (status != SWIFTI2V_OK) {
        return status;
    }
    if (buffer == NULL || buffer_bytes > PY_SSIZE_T_MAX) {
        return swifti2v_fail(SWIFTI2V_INVALID_ARGUMENT, "buffer: got %zu bytes at %p, want memory; pass some",
            buffer_bytes, buffer);
    }
    if ((status = swifti2v_enter(&gil)) != SWIFTI2V_OK) {
        return status;
    }
    PyObject *memory = PyMemoryView_FromMemory(buffer, (Py_ssize_t)buffer_bytes, PyBUF_WRITE);
    if (memory != NULL) {
        status = swifti2v_call(
            "next_segment", &result, "(KOd)", (handle_t)session, memory, seconds(timeout_ms));
        Py_DECREF(memory);
    }
    if (result != NULL && read_segment(result, segment)) {
        segment->data = buffer;
        segment->lease = 0;
    }
    return swifti2v_leave(gil, status, result);
}

swifti2v_status swifti2v_borrow_segment(swifti2v_session session, int32_t timeout_ms, swifti2v_segment *segment)
{
    PyGILState_STATE gil;
    PyObject *result, *description, *frames;
    Py_buffer view;
    handle_t lease;
    swifti2v_status status = check(segment, sizeof *segment, "segment");
    if (status != SWIFTI2V_OK || (status = swifti2v_enter(&gil)) != SWIFTI2V_OK) {
        return status;
    }
    status = swifti2v_call("borrow_segment", &result, "(Kd)", (handle_t)session, seconds(timeout_ms));
    if (result != NULL && PyArg_ParseTuple(result, "OKO", &description, &lease, &frames)
        && read_segment(description, segment) && PyObject_GetBuffer(frames, &view, PyBUF_SIMPLE) == 0) {
        segment->data = view.buf; /* the session holds the array until the lease is released */
        segment->lease = lease;
        PyBuffer_Release(&view);
    }
    return swifti2v_leave(gil, status, result);
}

swifti2v_status swifti2v_release_segment(swifti2v_session session, uint64_t lease)
{
    PyGILState_STATE gil;
    PyObject *result;
    swifti2v_status status = swifti2v_enter(&gil);
    if (status != SWIFTI2V_OK) {
        return status;
    }
    status = swifti2v_call("release_segment", &result, "(KK)", (handle_t)session, (handle_t)lease);
    return swifti2v_leave(gil, status, result);
}
