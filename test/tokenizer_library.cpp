// The trainers' tokenizer as a shared library, for tokenizer_library.py.
#include "keel/tokenizer.h"

extern "C" {

// Reads a tokenizer's file. Where it cannot: null, and what is wrong in error (size bytes).
Tokenizer* tokenizer_open(const char* path, char* error, size_t size) {
    try {
        return new Tokenizer(Tokenizer::read(path));
    } catch (const Error& e) {
        snprintf(error, size, "%s", e.what());
        return nullptr;
    }
}
void tokenizer_close(Tokenizer* t) { delete t; }
int tokenizer_V(const Tokenizer* t) { return t->V(); }

// Writes the tokens of a text of n bytes into tokens (n) and returns how many they are.
size_t tokenizer_encode(const Tokenizer* t, const char* text, size_t n, int threads, int* tokens) {
    std::vector<int> all;
    if (threads > 1) t->encode_parallel({text, n}, threads, all);
    else t->encode({text, n}, all);
    std::copy(all.begin(), all.end(), tokens);
    return all.size();
}

// Writes the bytes of n tokens into text, as far as its size allows, and returns how many they are.
size_t tokenizer_decode(const Tokenizer* t, const int* tokens, size_t n, char* text, size_t size) {
    std::string bytes = t->decode({tokens, n});
    memcpy(text, bytes.data(), std::min(size, bytes.size()));
    return bytes.size();
}
}
