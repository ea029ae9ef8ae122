// A model file, as -e reads it.
#include "fuzz.h"

void fuzz(const unsigned char* data, size_t size) {
    FileReader in(file_of(keel_file(data, size, FILE_MODEL), ".bin"), FILE_MODEL);
    RunConfig run = resolve_run(Options(), &in.header, {});
    ParameterLayout layout(run.model);
    if (layout.count != parameter_count(run.model)) abort();
    std::vector<float> params(layout.count);
    in.read_reals(params.data(), params.size());
    in.finish();
}

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    for (int norm = 0; norm < NUM_PLACEMENTS; norm++)
        for (RealType type : {REAL_FP32, REAL_BF16, REAL_FP64})
            all.push_back(keel_seed(make_header(FILE_MODEL, type, tiny_model(NormPlacement(norm)), 7)));
    return all;
}
