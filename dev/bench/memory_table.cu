// What a model takes of a GPU's memory at each level of recomputation and each type of the optimizer's numbers: the
// trainer's own plan, without a GPU. `make memory_table` runs it for the paper's largest run.
#include "train_keel.cu"

namespace {

double gib(size_t bytes) { return double(bytes) / double(size_t(1) << 30); }

int memory_table(const Options& o, double memory_gib) {
    RunConfig run = resolve_run(o, nullptr, {shard_formats[0].V});
    const ModelConfig& c = run.model;
    size_t available = size_t(memory_gib * double(size_t(1) << 30));
    ParameterLayout layout(c);
    print("%s, L %d, C %d, H %d, T %d, V %d: %zu parameters; %.0f GiB for everything\n\n", placements[c.norm].name, c.L,
          c.C, c.H, run.T, c.V, layout.count, memory_gib);
    print("| gradients | moments | parameters and states, GiB | -r | KiB a token | largest B*T | us a token there, "
          "predicted |\n|---|---|---|---|---|---|---|\n");
    for (StateTypes types : {StateTypes{}, StateTypes{false, true}, StateTypes{true, false}, StateTypes{true, true}}) {
        StateCounts counts(c, types);
        size_t states = sizeof(float) * (counts.parameters + counts.grads + counts.grad_scratch + 2 * counts.moments) +
                        2 * (counts.branch_copy + counts.grads_bf16 + 2 * counts.moments_bf16);  // BF16
        for (Recompute level : {Recompute{0}, Recompute{-1}, Recompute{1}, Recompute{32}}) {
            auto bytes = [&](int B) { return total_bytes(Model::plan(c, counts, B, run.T, level)); };
            int B = 0;
            while (B < 4096 && bytes(B + 1) <= available) B++;
            std::string time =
                B ? format("%.1f", 1e6 * predicted_seconds(c, B, run.T, level, types) / (double(B) * run.T)) : "-";
            print("| %s | %s | %.0f | %s | %.1f | %d | %s |\n", types.grads_bf16 ? "BF16" : "FP32",
                  types.moments_bf16 ? "BF16" : "FP32", gib(states), level.name(),
                  double(bytes(9) - bytes(8)) / run.T / 1024, B * run.T, time);
        }
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        double memory_gib = argc > 1 ? parse_real("memory_table: GiB", argv[1], 1, 1e6) : 135;
        return memory_table(parse_command_line(argc - (argc > 1), argv + (argc > 1)), memory_gib);
    } catch (const Error& e) {
        fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
