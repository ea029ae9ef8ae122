// A debug state, as --check reads it.
#include "fuzz.h"

void fuzz(const unsigned char* data, size_t size) {
    DebugState<float> s = DebugState<float>::read(file_of(keel_file(data, size, FILE_DEBUG), ".bin"));
    compare_debug_states(s, s);
}

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    for (int norm = 0; norm < NUM_PLACEMENTS; norm++)
        for (RealType type : {REAL_FP32, REAL_FP64}) {
            FileHeader h = make_header(FILE_DEBUG, type, tiny_model(NormPlacement(norm)), 0);
            h.word[H_B] = 2, h.word[H_T] = 3;
            all.push_back(keel_seed(h));
        }
    return all;
}
