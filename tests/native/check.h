/* What the test hosts share: stopping at the first thing that is not as it should be. */
#ifndef CHECK_H
#define CHECK_H

#include <swifti2v.h>

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: not so: %s (%s)\n", __FILE__, __LINE__, #condition, swifti2v_last_error(0)); \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

/* The toy profile at its smallest: 25 frames of 128x64 in two segments. */
#define CONFIG                                                                                             \
    "{\"profile\": \"tiny\", \"size\": [128, 64], \"frames\": 25, \"stage1_steps\": 1, \"stage2_steps\": 1, " \
    "\"device\": \"cpu\", \"dtype\": \"fp32\"}"

/* FNV-1a: equal frames have equal ones. */
static inline uint64_t hash_of(uint64_t hash, const uint8_t *data, size_t size)
{
    for (size_t at = 0; at < size; at++) {
        hash = (hash ^ data[at]) * 1099511628211u;
    }
    return hash;
}

#endif
