"""build/tokenizer.so, the trainers' tokenizer, for the test and the benchmark of it."""

import ctypes
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent / "build/tokenizer.so"


class Trainers:
    """The tokenizer of a file as the trainers read it. Text is bytes, of UTF-8 or not."""

    def __init__(self, path):
        self.library = ctypes.CDLL(LIBRARY)
        self.library.tokenizer_open.restype = ctypes.c_void_p
        for name in "encode", "decode":
            getattr(self.library, f"tokenizer_{name}").restype = ctypes.c_size_t
        error = ctypes.create_string_buffer(1000)
        handle = self.library.tokenizer_open(str(path).encode(), error, ctypes.c_size_t(len(error)))
        if not handle:
            raise ValueError(error.value.decode())
        self.handle = ctypes.c_void_p(handle)
        self.V = self.library.tokenizer_V(self.handle)

    def __del__(self):
        if hasattr(self, "handle"):
            self.library.tokenizer_close(self.handle)

    def buffer(self, text):
        """Room for the tokens of a text."""
        return (ctypes.c_int * len(text))()

    def encode_into(self, tokens, text, threads=1):
        return self.library.tokenizer_encode(self.handle, text, ctypes.c_size_t(len(text)), threads, tokens)

    def encode(self, text, threads=1):
        tokens = self.buffer(text)
        return tokens[: self.encode_into(tokens, text, threads)]

    def decode(self, tokens, size):
        """The bytes of tokens, whose number is size at most."""
        text = ctypes.create_string_buffer(size + 1)
        n = self.library.tokenizer_decode(self.handle, (ctypes.c_int * len(tokens))(*tokens), ctypes.c_size_t(len(tokens)),
                                          text, ctypes.c_size_t(size))
        if n > size:
            raise ValueError(f"expected at most {size} bytes, found {n}")
        return text.raw[:n]
