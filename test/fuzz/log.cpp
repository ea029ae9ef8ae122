// log.csv, as a resume reads it.
#include "fuzz.h"

void fuzz(const unsigned char* data, size_t size) {
    std::string path = file_of(Bytes(data, data + size), ".csv");
    DivergenceDetector divergence(400, 2, 3.0);
    int64_t before = 0;
    read_csv_rows(path, 1000, [&](int64_t step, const std::string& line) {
        if (step < before || step > 1000 || line.empty() || line.back() != '\n') abort();
        before = step;
        divergence.add(step, atof(line.c_str() + std::min(line.size(), line.find(',') + 1)));
    });
}

std::vector<Bytes> seeds() {
    std::string log = "step,loss,val_loss,lr,grad_norm,ms,tokens_per_second,mfu\n1,5.25,,0.001,0.5,1.0,100.0,0.5\n2,"
                      "nan,3.1,0.002,"
                      "nan,1.0,100.0,0.5\n";
    for (int step = 3; step < 130; step++) log += format("%d,3,\n", step);
    return {Bytes(log.begin(), log.end())};
}
