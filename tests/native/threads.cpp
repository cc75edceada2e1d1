// Four threads, one session each: equal seeds give equal frames, whatever the others do; then four threads on one.
#include "check.h"

#include <array>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int THREADS = 4;

swifti2v_image picture(const std::vector<uint8_t> &pixels)
{
    swifti2v_image image = SWIFTI2V_IMAGE_INIT;
    image.rgb = pixels.data();
    image.rgb_bytes = pixels.size();
    image.width = 128;
    image.height = 64;
    return image;
}

uint64_t run(int thread)
{
    const std::vector<uint8_t> pixels(64 * 128 * 3, 90);
    const swifti2v_image image = picture(pixels);
    const char *request = thread % 2 == 0 ? "{\"seed\": 1}" : "{\"seed\": 2}";
    swifti2v_session session = 0;
    swifti2v_info info = SWIFTI2V_INFO_INIT;
    swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
    CHECK(swifti2v_create(CONFIG, &session) == SWIFTI2V_OK);
    CHECK(swifti2v_get_info(session, &info) == SWIFTI2V_OK);
    CHECK(swifti2v_submit(session, request, &image) == SWIFTI2V_OK);
    std::vector<uint8_t> frames(info.segment_bytes);
    uint64_t hash = 7;
    while (swifti2v_next_segment(session, frames.data(), frames.size(), -1, &segment) == SWIFTI2V_OK) {
        hash = hash_of(hash, frames.data(), segment.bytes);
    }
    CHECK(segment.first_frame + segment.frames == info.frames);
    // Errors belong to the thread that made them.
    swifti2v_session none = 0;
    CHECK(swifti2v_create(thread % 2 == 0 ? "{\"even\": 1}" : "{\"odd\": 1}", &none) == SWIFTI2V_INVALID_JSON);
    CHECK(std::string(swifti2v_last_error(0)).find(thread % 2 == 0 ? "'even'" : "'odd'") != std::string::npos);
    CHECK(swifti2v_destroy(session) == SWIFTI2V_OK);
    return hash;
}

}  // namespace

int main()
{
    std::array<uint64_t, THREADS> hashes{};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < THREADS; thread++) {
        threads.emplace_back([thread, &hashes] { hashes[thread] = run(thread); });
    }
    for (auto &thread : threads) {
        thread.join();
    }
    CHECK(hashes[0] == hashes[2] && hashes[1] == hashes[3] && hashes[0] != hashes[1]);

    // One session, many threads: calls take turns, each segment goes to one of them.
    const std::vector<uint8_t> pixels(64 * 128 * 3, 90);
    const swifti2v_image image = picture(pixels);
    swifti2v_session shared = 0;
    std::array<uint32_t, THREADS> got{};
    CHECK(swifti2v_create(CONFIG, &shared) == SWIFTI2V_OK);
    CHECK(swifti2v_submit(shared, "{\"seed\": 1}", &image) == SWIFTI2V_OK);
    threads.clear();
    for (int thread = 0; thread < THREADS; thread++) {
        threads.emplace_back([thread, shared, &got] {
            swifti2v_segment segment = SWIFTI2V_SEGMENT_INIT;
            swifti2v_progress progress = SWIFTI2V_PROGRESS_INIT;
            while (swifti2v_borrow_segment(shared, -1, &segment) == SWIFTI2V_OK) {
                got[thread] += segment.frames;
                CHECK(swifti2v_poll(shared, &progress) == SWIFTI2V_OK);
            }
        });
    }
    for (auto &thread : threads) {
        thread.join();
    }
    CHECK(got[0] + got[1] + got[2] + got[3] == 25);
    CHECK(swifti2v_destroy(shared) == SWIFTI2V_OK);
    std::puts("threads: ok");
    return 0;
}
