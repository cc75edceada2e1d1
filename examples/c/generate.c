/*
 * One image to a clip, from C: frames are written as PPM files segment by segment, while later ones are being made.
 *
 *     generate photo.ppm FOLDER [--profile nano] [--prompt "slow zoom in"] [--seed 7] [--config '{"bundle": "..."}']
 *
 * FOLDER must exist. Any picture is converted by, for instance, `magick photo.jpg photo.ppm`.
 */
#include <swifti2v.h>

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    const char *photo, *folder, *profile, *prompt, *seed, *config;
} options;

/* Prints the library's own words for what went wrong; 1 to leave the program with. */
static int failed(const char *what, swifti2v_status status)
{
    fprintf(stderr, "%s: %s: %s\n", what, swifti2v_status_name(status), swifti2v_last_error(0));
    return 1;
}

static int read_options(int count, char **words, options *given)
{
    struct {
        const char *name, **value;
    } known[] = {{"--profile", &given->profile}, {"--prompt", &given->prompt}, {"--seed", &given->seed},
        {"--config", &given->config}};
    if (count < 3) {
        return 0;
    }
    given->photo = words[1];
    given->folder = words[2];
    for (int word = 3; word < count; word += 2) {
        size_t at = 0;
        while (at < sizeof known / sizeof known[0] && strcmp(words[word], known[at].name) != 0) {
            at++;
        }
        if (at == sizeof known / sizeof known[0] || word + 1 == count) {
            return 0;
        }
        *known[at].value = words[word + 1];
    }
    return 1;
}

/* Reads a binary PPM (P6, 8 bits). 0 if it is none; else image->rgb is to be freed. */
static int read_ppm(const char *path, swifti2v_image *image)
{
    FILE *file = fopen(path, "rb");
    unsigned width = 0, height = 0, most = 0;
    if (file == NULL) {
        return 0;
    }
    int ok = fscanf(file, "P6 %u %u %u", &width, &height, &most) == 3 && most == 255 && isspace(fgetc(file)) && width > 0
          && width <= 16384 && height > 0 && height <= 16384;
    size_t bytes = (size_t)width * height * 3;
    uint8_t *rgb = ok ? malloc(bytes) : NULL;
    ok = rgb != NULL && fread(rgb, 1, bytes, file) == bytes;
    fclose(file);
    if (!ok) {
        free(rgb);
        return 0;
    }
    image->rgb = rgb;
    image->rgb_bytes = bytes;
    image->width = width;
    image->height = height;
    return 1;
}

/* Writes the frames of a segment as FOLDER/0000.ppm and on. */
static int write_frames(const char *folder, const swifti2v_segment *segment)
{
    size_t frame_bytes = segment->bytes / segment->frames;
    for (uint32_t frame = 0; frame < segment->frames; frame++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%04u.ppm", folder, (unsigned)(segment->first_frame + frame));
        FILE *file = fopen(path, "wb");
        if (file == NULL) {
            perror(path);
            return 0;
        }
        fprintf(file, "P6\n%u %u\n255\n", (unsigned)segment->width, (unsigned)segment->height);
        int ok = fwrite(segment->data + frame * frame_bytes, 1, frame_bytes, file) == frame_bytes;
        if (fclose(file) != 0 || !ok) {
            perror(path);
            return 0;
        }
    }
    return 1;
}

/* Fetches segment after segment, and prints progress while it waits. */
static int write_clip(swifti2v_session session, const char *folder)
{
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    swifti2v_progress progress = SWIFTI2V_PROGRESS_INIT;
    for (;;) {
        swifti2v_status status = swifti2v_borrow_segment(session, 500, &segment);
        if (status == SWIFTI2V_END) {
            return 0;
        }
        if (status < 0) {
            return failed("segment", status);
        }
        if (status == SWIFTI2V_OK) {
            int ok = write_frames(folder, &segment);
            swifti2v_release_segment(session, segment.lease);
            if (!ok) {
                return 1;
            }
            printf("segment %u: frames %u to %u\n", (unsigned)segment.segment, (unsigned)segment.first_frame,
                (unsigned)(segment.first_frame + segment.frames - 1));
        }
        if (swifti2v_poll(session, &progress) == SWIFTI2V_OK) {
            printf("%3.0f %%\n", 100 * progress.progress);
            fflush(stdout);
        }
    }
}

/* A JSON string of a text: quotes and backslashes are escaped, control characters become spaces. */
static void quote(const char *text, char *json, size_t size)
{
    size_t end = 0;
    json[end++] = '"';
    for (; *text != '\0' && end + 3 < size; text++) {
        if (*text == '"' || *text == '\\') {
            json[end++] = '\\';
        }
        json[end++] = (unsigned char)*text < 0x20 ? ' ' : *text;
    }
    json[end++] = '"';
    json[end] = '\0';
}

int main(int count, char **words)
{
    options given = {NULL, NULL, "nano", "", "0", NULL};
    swifti2v_image image = SWIFTI2V_IMAGE_INIT;
    swifti2v_session session = 0;
    char config[4096], request[8192], text[4096];
    if (!read_options(count, words, &given)) {
        fprintf(stderr, "usage: generate photo.ppm FOLDER [--profile NAME] [--prompt TEXT] [--seed N] [--config JSON]\n");
        return 2;
    }
    if (!read_ppm(given.photo, &image)) {
        fprintf(stderr, "%s: not a readable binary PPM of 8 bits\n", given.photo);
        return 1;
    }
    quote(given.profile, text, sizeof text);
    snprintf(config, sizeof config, "{\"profile\": %s}", text);
    quote(given.prompt, text, sizeof text);
    snprintf(request, sizeof request, "{\"prompt\": %s, \"seed\": %lld}", text, strtoll(given.seed, NULL, 10));

    int result = 1;
    swifti2v_status status = swifti2v_create(given.config == NULL ? config : given.config, &session);
    if (status != SWIFTI2V_OK) {
        failed("session", status);
    } else if ((status = swifti2v_submit(session, request, &image)) != SWIFTI2V_OK) {
        failed("request", status);
    } else {
        result = write_clip(session, given.folder);
    }
    swifti2v_destroy(session);
    free((void *)image.rgb);
    return result;
}
