/*
 * swifti2v.h: 2K video from one image, from C and C++.
 *
 * The library runs the Python package `swifti2v` inside the process: it starts Python on the first call that needs it,
 * or joins the one that the process runs already. docs/EMBED.md says how it finds its Python environment.
 *
 *     swifti2v_session session = 0;
 *     swifti2v_image image = SWIFTI2V_IMAGE_INIT;             rgb, rgb_bytes, width, height set by you
 *     swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
 *     swifti2v_create("{\"profile\": \"nano\"}", &session);
 *     swifti2v_submit(session, "{\"prompt\": \"slow zoom in\"}", &image);
 *     while (swifti2v_borrow_segment(session, -1, &segment) == SWIFTI2V_OK) {
 *         ...                                                 segment.data: uint8 [frames][height][width][3]
 *         swifti2v_release_segment(session, segment.lease);
 *     }
 *     swifti2v_destroy(session);
 *
 * Threads. Every function may be called from any thread. Sessions share nothing: many threads, one session each, is the
 * intended use. Calls on one session take turns; one that waits for a segment lets the others through, so cancel and
 * destroy reach it. Generation runs on a thread of the session's own. Whoever waits holds no Python lock (GIL).
 *
 * Structs. Set struct_size and version by the _INIT macros; another size or version is refused, nothing is read.
 *
 * Texts are UTF-8. Numbers of this file never change their meaning; what changes a struct raises the version.
 */
#ifndef SWIFTI2V_H
#define SWIFTI2V_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SWIFTI2V_API __attribute__((visibility("default")))
#else
#define SWIFTI2V_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SWIFTI2V_ABI_VERSION 1

/* How a call ended: 0 or more is no error; less is one, and swifti2v_last_error has its text. */
typedef enum swifti2v_status {
    SWIFTI2V_OK = 0,
    SWIFTI2V_END = 1,     /* the request has no more segments */
    SWIFTI2V_TIMEOUT = 2, /* nothing came within the time given */
    SWIFTI2V_INVALID_HANDLE = -1,   /* never given out, or destroyed */
    SWIFTI2V_INVALID_ARGUMENT = -2, /* null, a wrong struct_size or version */
    SWIFTI2V_INVALID_JSON = -3,     /* malformed, an unknown or mistyped field, numbers that cannot work */
    SWIFTI2V_INVALID_IMAGE = -4,    /* unreadable, or not the size it should have */
    SWIFTI2V_BUFFER_TOO_SMALL = -5, /* the segment stays where it is */
    SWIFTI2V_INVALID_STATE = -6,    /* nothing submitted, or the last request is not finished */
    SWIFTI2V_CANCELLED = -7,
    SWIFTI2V_ENVIRONMENT = -8, /* Python, a package, a device is missing */
    SWIFTI2V_MODEL = -9,       /* a bundle or weights that are damaged, missing, or do not fit */
    SWIFTI2V_NUMERICS = -10,   /* values that are not finite */
    SWIFTI2V_NO_MEMORY = -11,
    SWIFTI2V_FAILED = -12 /* anything else */
} swifti2v_status;

/* Where the request last submitted is. */
typedef enum swifti2v_state {
    SWIFTI2V_STATE_IDLE = 0,
    SWIFTI2V_STATE_RUNNING = 1,
    SWIFTI2V_STATE_FINISHED = 2, /* every segment is made; some may still have to be fetched */
    SWIFTI2V_STATE_CANCELLED = 3,
    SWIFTI2V_STATE_FAILED = 4 /* fetching the next segment gives the status */
} swifti2v_state;

/* What is being computed. */
typedef enum swifti2v_stage {
    SWIFTI2V_STAGE_NONE = 0,
    SWIFTI2V_STAGE_PROMPT = 1,
    SWIFTI2V_STAGE_1 = 2,
    SWIFTI2V_STAGE_2 = 3
} swifti2v_stage;

/* A session. 0 is none; a number is never used twice, so one that was destroyed is known as such. */
typedef uint64_t swifti2v_session;

/* In: an 8-bit RGB image. It is copied by submit. */
typedef struct swifti2v_image {
    size_t struct_size;
    uint32_t version;
    uint32_t width;
    uint32_t height;
    uint32_t row_bytes; /* from one row to the next; 0 is 3 * width */
    const uint8_t *rgb;
    size_t rgb_bytes; /* of all rows; compared with the size */
} swifti2v_image;

/* Out: what a session makes. */
typedef struct swifti2v_info {
    size_t struct_size;
    uint32_t version;
    uint32_t width;
    uint32_t height;
    uint32_t frames;   /* of the clip */
    uint32_t segments; /* of the clip */
    uint32_t segment_frames; /* the most that one segment has */
    size_t segment_bytes;    /* the most that one segment takes */
    double fps;
} swifti2v_info;

/* Out: where a request is. */
typedef struct swifti2v_progress {
    size_t struct_size;
    uint32_t version;
    int32_t state; /* swifti2v_state */
    int32_t stage; /* swifti2v_stage */
    uint32_t segments_made;
    uint32_t segments_waiting; /* made and not fetched; generation waits when config.queue of them do */
    double progress;           /* 0 to 1, by parts of the work, which do not take equal time */
} swifti2v_progress;

/* Out: finished frames, uint8 [frames][height][width][3], final when they arrive. */
typedef struct swifti2v_segment {
    size_t struct_size;
    uint32_t version;
    uint32_t segment;
    uint32_t first_frame; /* the first one's index in the clip */
    uint32_t frames;
    uint32_t width;
    uint32_t height;
    size_t bytes;
    const uint8_t *data; /* your buffer, or borrowed memory */
    uint64_t lease;      /* of borrowed memory, else 0 */
} swifti2v_segment;

#define SWIFTI2V_IMAGE_INIT {sizeof(swifti2v_image), SWIFTI2V_ABI_VERSION, 0, 0, 0, NULL, 0}
#define SWIFTI2V_INFO_INIT {sizeof(swifti2v_info), SWIFTI2V_ABI_VERSION, 0, 0, 0, 0, 0, 0, 0.0}
#define SWIFTI2V_PROGRESS_INIT {sizeof(swifti2v_progress), SWIFTI2V_ABI_VERSION, 0, 0, 0, 0, 0.0}
#define SWIFTI2V_SEGMENT_INIT {sizeof(swifti2v_segment), SWIFTI2V_ABI_VERSION, 0, 0, 0, 0, 0, 0, NULL, 0}

/* SWIFTI2V_ABI_VERSION of the library that is loaded. Needs no Python. */
SWIFTI2V_API uint32_t swifti2v_abi_version(void);

/* Start Python and import the package now (seconds) rather than in the first call. What fails here fails for good. */
SWIFTI2V_API swifti2v_status swifti2v_start(void);

/* Version of the Python package, such as "0.1.0"; NULL if it cannot be started. Never freed. */
SWIFTI2V_API const char *swifti2v_version(void);

/* The name of a status, such as "INVALID_JSON"; "UNKNOWN" for another number. Never freed. */
SWIFTI2V_API const char *swifti2v_status_name(int32_t status);

/*
 * The text of the last failed call: of a session, or, for 0, of this thread; where this thread has none, why the
 * library could not start. A pointer or struct that is refused is said for 0 alone. Never NULL. Valid until this thread
 * calls swifti2v_last_error again.
 */
SWIFTI2V_API const char *swifti2v_last_error(swifti2v_session session);

/* Open a session on what a JSON object names: {"bundle": "FOLDER"} or {"profile": "nano"}, and more (docs/EMBED.md). */
SWIFTI2V_API swifti2v_status swifti2v_create(const char *config_json, swifti2v_session *session);

/* Cancel what runs, wait for its current step to end, free everything. Borrowed memory of the session is gone then. */
SWIFTI2V_API swifti2v_status swifti2v_destroy(swifti2v_session session);

SWIFTI2V_API swifti2v_status swifti2v_get_info(swifti2v_session session, swifti2v_info *info);

/*
 * Start a request: a JSON object such as {"prompt": "slow zoom in", "seed": 7}, and the image: its pixels, or NULL and
 * a path in "image". INVALID_STATE while segments of the last request are still to come.
 */
SWIFTI2V_API swifti2v_status swifti2v_submit(
    swifti2v_session session, const char *request_json, const swifti2v_image *image);

SWIFTI2V_API swifti2v_status swifti2v_poll(swifti2v_session session, swifti2v_progress *progress);

/*
 * Copy the next segment into `buffer`, waiting up to timeout_ms (0: not at all, less: for ever). END after the last
 * one. BUFFER_TOO_SMALL leaves it for the next call; swifti2v_info.segment_bytes is always enough.
 */
SWIFTI2V_API swifti2v_status swifti2v_next_segment(
    swifti2v_session session, void *buffer, size_t buffer_bytes, int32_t timeout_ms, swifti2v_segment *segment);

/* The same without a copy: segment->data is valid until its lease is released, or the session destroyed. */
SWIFTI2V_API swifti2v_status swifti2v_borrow_segment(
    swifti2v_session session, int32_t timeout_ms, swifti2v_segment *segment);

SWIFTI2V_API swifti2v_status swifti2v_release_segment(swifti2v_session session, uint64_t lease);

/* Stop the request after its current step and drop what was not fetched; the next may be submitted at once. */
SWIFTI2V_API swifti2v_status swifti2v_cancel(swifti2v_session session);

/*
 * Gets a line of the package's log: level 20 info, 30 warning, 40 error. Called from any thread. From here create,
 * destroy and waiting for a segment (timeout_ms other than 0) give INVALID_STATE: others may be waiting to log.
 */
typedef void (*swifti2v_log_callback)(int32_t level, const char *text, void *user);

/*
 * Send log lines from min_level up to a callback in place of the last one; NULL sends none. When this returns, the
 * former callback is not running and is never called again.
 */
SWIFTI2V_API swifti2v_status swifti2v_set_log(swifti2v_log_callback callback, void *user, int32_t min_level);

#ifdef __cplusplus
}
#endif

#endif
