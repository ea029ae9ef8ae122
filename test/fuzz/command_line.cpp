// The command line: words end at a line's end.
#include "fuzz.h"

void fuzz(const unsigned char* data, size_t size) {
    std::vector<std::string> words = {"train"};
    std::string word;
    for (size_t i = 0; i < size; i++)
        if (data[i] == '\n') words.push_back(std::exchange(word, ""));
        else if (data[i]) word += char(data[i]);
    std::vector<const char*> argv;
    for (const std::string& w : words) argv.push_back(w.c_str());
    Options o = parse_command_line(int(argv.size()), argv.data());
    static const Tokenizer bytes;
    prompt_tokens(o, &bytes, 256);
    RunConfig run = resolve_run(o, nullptr, {256});
    if (run.total_batch % run.T || run.batch_sequences() < 1 || (run.B && run.accumulation() < 1)) abort();
    if (double lr = learning_rate(run, 1); !std::isfinite(lr)) abort();
    learning_rate(run, run.steps), learning_rate(run, run.steps / 2);
    prompt_tokens(o, nullptr, shard_formats[0].V);
}

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    for (const Flag& f : flags)
        for (const char* value : {"", "2", "4096", "0.5", "keel", "layer", "1,2,3"}) {
            std::string line = std::string(f.long_name) + (value[0] ? std::string("\n") + value : "") + "\n-L\n8\n";
            all.push_back(Bytes(line.begin(), line.end()));
        }
    return all;
}
