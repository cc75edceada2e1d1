/* 100 sessions made and destroyed, some while they run: resident memory stays flat. */
#include "check.h"

#include <malloc.h>
#include <unistd.h>

#define CYCLES 100
#define SETTLED 20 /* pools and caches are full by then */
#define MOST_GROWTH_KIB 4096 /* one session's weights and state are about 2 MiB, so a leak of each shows as 160 */

static long resident_kib(void)
{
    long total = 0, resident = 0;
    malloc_trim(0);
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%ld %ld", &total, &resident) == 2);
    fclose(file);
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

int main(void)
{
    static uint8_t pixels[64 * 128 * 3];
    swifti2v_image image = SWIFTI2V_IMAGE_INIT;
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    long settled = 0;
    /* What the process holds, without what malloc keeps for later. */
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_THRESHOLD, 100000);
    image.rgb = pixels;
    image.rgb_bytes = sizeof pixels;
    image.width = 128;
    image.height = 64;
    for (int cycle = 0; cycle < CYCLES; cycle++) {
        swifti2v_session session = 0;
        CHECK(swifti2v_create(CONFIG, &session) == SWIFTI2V_OK);
        if (cycle % 10 < 2) {
            CHECK(swifti2v_submit(session, "{}", &image) == SWIFTI2V_OK);
        }
        if (cycle % 10 == 0) { /* and never released */
            CHECK(swifti2v_borrow_segment(session, -1, &segment) == SWIFTI2V_OK);
        }
        CHECK(swifti2v_destroy(session) == SWIFTI2V_OK);
        if (cycle + 1 == SETTLED) {
            settled = resident_kib();
        }
    }
    long grown = resident_kib() - settled;
    printf("cycles: %ld KiB after %d, %+ld KiB after %d\n", settled, SETTLED, grown, CYCLES);
    CHECK(grown < MOST_GROWTH_KIB);
    return 0;
}
