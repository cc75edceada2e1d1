/* Every function used as meant, and misused: a status for each, never a crash. */
#include "check.h"

#include <pthread.h>
#include <string.h>

#define REQUEST "{\"prompt\": \"slow zoom in\", \"seed\": 3}"

static uint8_t pixels[64 * 128 * 3];

static swifti2v_image picture(void)
{
    swifti2v_image image = SWIFTI2V_IMAGE_INIT;
    for (size_t at = 0; at < sizeof pixels; at++) {
        pixels[at] = (uint8_t)(at * 7 % 251);
    }
    image.rgb = pixels;
    image.rgb_bytes = sizeof pixels;
    image.width = 128;
    image.height = 64;
    return image;
}

static void null_pointers(swifti2v_session session)
{
    swifti2v_session none = 5;
    swifti2v_image image = picture();
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    CHECK(swifti2v_create(NULL, &none) == SWIFTI2V_INVALID_ARGUMENT && none == 0);
    CHECK(swifti2v_create(CONFIG, NULL) == SWIFTI2V_INVALID_ARGUMENT);
    CHECK(swifti2v_submit(session, NULL, &image) == SWIFTI2V_INVALID_ARGUMENT);
    CHECK(swifti2v_submit(session, REQUEST, NULL) == SWIFTI2V_INVALID_IMAGE); /* no path either */
    image.rgb = NULL;
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_INVALID_ARGUMENT);
    CHECK(swifti2v_get_info(session, NULL) == SWIFTI2V_INVALID_ARGUMENT);
    CHECK(swifti2v_poll(session, NULL) == SWIFTI2V_INVALID_ARGUMENT);
    CHECK(swifti2v_next_segment(session, NULL, 100, 0, &segment) == SWIFTI2V_INVALID_ARGUMENT);
    CHECK(swifti2v_next_segment(session, pixels, sizeof pixels, 0, NULL) == SWIFTI2V_INVALID_ARGUMENT);
    CHECK(swifti2v_borrow_segment(session, 0, NULL) == SWIFTI2V_INVALID_ARGUMENT);
    CHECK(strstr(swifti2v_last_error(0), "segment: got NULL") != NULL);
}

static void wrong_structs(swifti2v_session session)
{
    swifti2v_image image = picture();
    swifti2v_info info = SWIFTI2V_INFO_INIT;
    swifti2v_progress progress = SWIFTI2V_PROGRESS_INIT;
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    image.struct_size = info.struct_size = progress.struct_size = segment.struct_size = 8;
    for (int turn = 0; turn < 2; turn++) {
        CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_INVALID_ARGUMENT);
        CHECK(swifti2v_get_info(session, &info) == SWIFTI2V_INVALID_ARGUMENT && info.width == 0);
        CHECK(swifti2v_poll(session, &progress) == SWIFTI2V_INVALID_ARGUMENT);
        CHECK(swifti2v_next_segment(session, pixels, sizeof pixels, 0, &segment) == SWIFTI2V_INVALID_ARGUMENT);
        CHECK(swifti2v_borrow_segment(session, 0, &segment) == SWIFTI2V_INVALID_ARGUMENT);
        CHECK(strstr(swifti2v_last_error(0), turn ? "version 9" : "struct_size 8") != NULL);
        image.struct_size = sizeof image;
        info.struct_size = sizeof info;
        progress.struct_size = sizeof progress;
        segment.struct_size = sizeof segment;
        image.version = info.version = progress.version = segment.version = 9;
    }
}

static void wrong_contents(swifti2v_session session)
{
    swifti2v_session none = 0;
    swifti2v_image image = picture();
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    CHECK(swifti2v_create("{\"profile\": \"tiny\", \"color\": 1}", &none) == SWIFTI2V_INVALID_JSON && none == 0);
    CHECK(swifti2v_create("{\"profile\": \"\xff\"}", &none) == SWIFTI2V_INVALID_JSON);
    CHECK(swifti2v_create("{\"bundle\": \"/nowhere\"}", &none) == SWIFTI2V_MODEL);
    CHECK(swifti2v_next_segment(session, pixels, sizeof pixels, 0, &segment) == SWIFTI2V_INVALID_STATE);
    CHECK(swifti2v_submit(session, "{\"seed\": \"three\"}", &image) == SWIFTI2V_INVALID_JSON);
    CHECK(strstr(swifti2v_last_error(session), "request.seed: got 'three', want int") != NULL);
    CHECK(strcmp(swifti2v_last_error(session), swifti2v_last_error(0)) == 0);
    const char *said = swifti2v_last_error(0);
    CHECK(swifti2v_destroy(0) == SWIFTI2V_INVALID_HANDLE);
    CHECK(strstr(said, "request.seed: got 'three', want int") != NULL); /* until it is asked again */
    image.height = 65;
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_INVALID_IMAGE);
    image.height = 0;
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_INVALID_IMAGE);
    image.width = image.height = UINT32_MAX;
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_INVALID_IMAGE);
    image.width = image.height = 32;
    CHECK(swifti2v_submit(session, "{\"fit\": \"exact\"}", &image) == SWIFTI2V_INVALID_IMAGE);
    CHECK(swifti2v_submit(session, "{\"image\": \"/no such picture.png\"}", NULL) == SWIFTI2V_INVALID_IMAGE);
    CHECK(swifti2v_release_segment(session, 12345) == SWIFTI2V_INVALID_ARGUMENT);
}

/* The same request twice, once copied and once borrowed: the same frames. */
static void as_meant(swifti2v_session session)
{
    swifti2v_image image = picture();
    swifti2v_info info = SWIFTI2V_INFO_INIT;
    swifti2v_progress progress = SWIFTI2V_PROGRESS_INIT;
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    CHECK(swifti2v_get_info(session, &info) == SWIFTI2V_OK);
    CHECK(info.width == 128 && info.height == 64 && info.frames == 25 && info.segments == 2 && info.fps == 8);
    uint8_t *buffer = malloc(info.segment_bytes);
    uint64_t copied = 7, borrowed = 7;
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_OK);
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_INVALID_STATE);
    CHECK(swifti2v_next_segment(session, buffer, 10, -1, &segment) == SWIFTI2V_BUFFER_TOO_SMALL);
    for (uint32_t count = 0; count < info.segments; count++) {
        CHECK(swifti2v_next_segment(session, buffer, info.segment_bytes, -1, &segment) == SWIFTI2V_OK);
        CHECK(segment.segment == count && segment.data == buffer && segment.lease == 0);
        CHECK(segment.bytes == (size_t)segment.frames * 64 * 128 * 3 && segment.bytes <= info.segment_bytes);
        CHECK(segment.first_frame == (count == 0 ? 0u : 13u) && segment.frames == (count == 0 ? 13u : 12u));
        CHECK(count != 0 || memcmp(buffer, pixels, sizeof pixels) == 0);
        copied = hash_of(copied, buffer, segment.bytes);
    }
    CHECK(swifti2v_next_segment(session, buffer, info.segment_bytes, -1, &segment) == SWIFTI2V_END);
    CHECK(swifti2v_poll(session, &progress) == SWIFTI2V_OK);
    CHECK(progress.state == SWIFTI2V_STATE_FINISHED && progress.progress == 1.0 && progress.segments_made == 2);
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_OK);
    CHECK(swifti2v_borrow_segment(session, 0, &segment) == SWIFTI2V_TIMEOUT);
    while (swifti2v_borrow_segment(session, -1, &segment) == SWIFTI2V_OK) {
        borrowed = hash_of(borrowed, segment.data, segment.bytes);
        CHECK(swifti2v_release_segment(session, segment.lease) == SWIFTI2V_OK);
        CHECK(swifti2v_release_segment(session, segment.lease) == SWIFTI2V_INVALID_ARGUMENT);
    }
    CHECK(copied == borrowed);
    free(buffer);
}

static void after_destroy(swifti2v_session session)
{
    swifti2v_image image = picture();
    swifti2v_info info = SWIFTI2V_INFO_INIT;
    swifti2v_progress progress = SWIFTI2V_PROGRESS_INIT;
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    CHECK(swifti2v_destroy(session) == SWIFTI2V_INVALID_HANDLE);
    CHECK(swifti2v_get_info(session, &info) == SWIFTI2V_INVALID_HANDLE);
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_INVALID_HANDLE);
    CHECK(swifti2v_poll(session, &progress) == SWIFTI2V_INVALID_HANDLE);
    CHECK(swifti2v_next_segment(session, pixels, sizeof pixels, -1, &segment) == SWIFTI2V_INVALID_HANDLE);
    CHECK(swifti2v_borrow_segment(session, -1, &segment) == SWIFTI2V_INVALID_HANDLE);
    CHECK(swifti2v_release_segment(session, 1) == SWIFTI2V_INVALID_HANDLE);
    CHECK(swifti2v_cancel(session) == SWIFTI2V_INVALID_HANDLE);
    CHECK(strstr(swifti2v_last_error(session), "want one that create gave") != NULL);
}

static int lines;

static void count_line(int32_t level, const char *text, void *user)
{
    CHECK(level >= 20 && strncmp(text, "session ", 8) == 0 && user == &lines);
    CHECK(strcmp(swifti2v_version(), "") != 0); /* calls are allowed here */
    lines++;
}

/* A thread that waits for a segment of a session that another one destroys. */
static void *wait_for_segment(void *session)
{
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    swifti2v_status status;
    do {
        status = swifti2v_borrow_segment(*(swifti2v_session *)session, -1, &segment);
    } while (status == SWIFTI2V_OK);
    CHECK(status == SWIFTI2V_INVALID_HANDLE || status == SWIFTI2V_CANCELLED || status == SWIFTI2V_END);
    return NULL;
}

static void stops(void)
{
    swifti2v_session session = 0;
    swifti2v_image image = picture();
    swifti2v_progress progress = SWIFTI2V_PROGRESS_INIT;
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    pthread_t waiter;
    CHECK(swifti2v_set_log(count_line, &lines, 20) == SWIFTI2V_OK);
    CHECK(swifti2v_create(CONFIG, &session) == SWIFTI2V_OK && lines == 1);
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_OK);
    CHECK(swifti2v_cancel(session) == SWIFTI2V_OK);
    CHECK(swifti2v_borrow_segment(session, -1, &segment) == SWIFTI2V_CANCELLED);
    CHECK(swifti2v_poll(session, &progress) == SWIFTI2V_OK && progress.state == SWIFTI2V_STATE_CANCELLED);
    CHECK(swifti2v_submit(session, REQUEST, &image) == SWIFTI2V_OK);
    CHECK(pthread_create(&waiter, NULL, wait_for_segment, &session) == 0);
    CHECK(swifti2v_destroy(session) == SWIFTI2V_OK); /* while it runs and a thread waits */
    pthread_join(waiter, NULL);
    CHECK(swifti2v_set_log(NULL, NULL, 0) == SWIFTI2V_OK);
    int before = lines;
    CHECK(before >= 2); /* opened and closed at least; how far the requests came is chance */
    CHECK(swifti2v_create(CONFIG, &session) == SWIFTI2V_OK && swifti2v_destroy(session) == SWIFTI2V_OK);
    CHECK(lines == before);
}

int main(void)
{
    swifti2v_session session = 0;
    CHECK(swifti2v_abi_version() == SWIFTI2V_ABI_VERSION);
    CHECK(strcmp(swifti2v_last_error(0), "") == 0);
    CHECK(swifti2v_get_info(0, NULL) == SWIFTI2V_INVALID_ARGUMENT); /* before anything is started */
    CHECK(swifti2v_start() == SWIFTI2V_OK && swifti2v_start() == SWIFTI2V_OK);
    CHECK(swifti2v_version() != NULL);
    CHECK(swifti2v_destroy(0) == SWIFTI2V_INVALID_HANDLE && swifti2v_destroy(UINT64_MAX) == SWIFTI2V_INVALID_HANDLE);
    CHECK(strcmp(swifti2v_status_name(-5), "BUFFER_TOO_SMALL") == 0 && strcmp(swifti2v_status_name(77), "UNKNOWN") == 0);
    CHECK(swifti2v_create(CONFIG, &session) == SWIFTI2V_OK && session != 0);
    null_pointers(session);
    wrong_structs(session);
    wrong_contents(session);
    as_meant(session);
    CHECK(swifti2v_destroy(session) == SWIFTI2V_OK);
    after_destroy(session);
    stops();
    puts("calls: ok");
    return 0;
}
