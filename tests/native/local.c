/*
 * A host that opens the library by dlopen(RTLD_LOCAL), as plugin hosts do.
 *
 *     local LIBRARY run             one clip
 *     local LIBRARY refused TEXT    start fails, and every thread reads the same reason with TEXT in it
 */
#include <swifti2v.h>

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONFIG "{\"profile\": \"tiny\", \"size\": [128, 64], \"frames\": 13, \"stage1_steps\": 1, \"stage2_steps\": 1}"

typedef const char *(*text_function)(swifti2v_session);

static void *symbol(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (found == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return found;
}

static int run(void *library)
{
    static uint8_t pixels[64 * 128 * 3];
    swifti2v_status (*create)(const char *, swifti2v_session *) = symbol(library, "swifti2v_create");
    swifti2v_status (*submit)(swifti2v_session, const char *, const swifti2v_image *) = symbol(library, "swifti2v_submit");
    swifti2v_status (*borrow)(swifti2v_session, int32_t, swifti2v_segment *) = symbol(library, "swifti2v_borrow_segment");
    swifti2v_status (*destroy)(swifti2v_session) = symbol(library, "swifti2v_destroy");
    swifti2v_image image = SWIFTI2V_IMAGE_INIT;
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    swifti2v_session session = 0;
    image.rgb = pixels;
    image.rgb_bytes = sizeof pixels;
    image.width = 128;
    image.height = 64;
    int ok = create(CONFIG, &session) == SWIFTI2V_OK && submit(session, "{}", &image) == SWIFTI2V_OK
          && borrow(session, -1, &segment) == SWIFTI2V_OK && segment.frames == 13
          && borrow(session, -1, &segment) == SWIFTI2V_END && destroy(session) == SWIFTI2V_OK;
    return ok;
}

static void *read_error(void *library)
{
    return strdup(((text_function)symbol(library, "swifti2v_last_error"))(0));
}

static int refused(void *library, const char *want)
{
    swifti2v_status (*start)(void) = symbol(library, "swifti2v_start");
    void *said[2] = {NULL, NULL};
    int ok = start() == SWIFTI2V_ENVIRONMENT;
    for (int at = 0; at < 2; at++) {
        pthread_t thread;
        pthread_create(&thread, NULL, read_error, library);
        pthread_join(thread, &said[at]);
        ok = ok && strstr(said[at], want) != NULL;
    }
    printf("%s\n", (char *)said[1]);
    free(said[0]);
    free(said[1]);
    return ok && start() == SWIFTI2V_ENVIRONMENT;
}

int main(int count, char **words)
{
    void *library = count > 2 ? dlopen(words[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    if (library == NULL) {
        fprintf(stderr, "%s\n", count > 2 ? dlerror() : "usage: local LIBRARY run | refused TEXT");
        return 2;
    }
    int ok = strcmp(words[2], "run") == 0 ? run(library) : refused(library, words[3]);
    if (!ok) {
        fprintf(stderr, "not as expected: %s\n", ((text_function)symbol(library, "swifti2v_last_error"))(0));
    }
    dlclose(library); /* stays loaded, as Python does */
    return ok ? 0 : 1;
}
