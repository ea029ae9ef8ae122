"""The trainers' data order in Python: text as bytes, its split and the shuffle of its sequences, as keel_common.h's Loader deals them.

With the same seed the reference sees the very batches of a trainer's run, and its losses can be laid beside its log.csv.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from keel import philox4x32_10

sys.path.append(str(Path(__file__).resolve().parents[2] / "data"))
from shards import glob_argument  # noqa: E402

STREAM_DATA = 1  # keel_common.h's PhiloxStream


def read_text(pattern):
    """(training bytes, validation bytes): the files of a path or glob in the order of their names; the last tenth is for validation."""
    try:
        files = glob_argument(pattern)
    except argparse.ArgumentTypeError as e:
        raise FileNotFoundError(f"-i: {e}") from None
    text = np.frombuffer(b"".join(Path(f).read_bytes() for f in files), np.uint8).astype(np.int64)
    split = len(text) - len(text) // 10
    return text[:split], text[split:]


def philox_word(key, c0, c1, c2, c3):
    """Word 0 of one Philox block."""
    words = philox4x32_10([np.array([c & 0xFFFFFFFF]) for c in (c0, c1, c2, c3)], (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF))
    return int(words[0][0])


class Loader:
    """Sequence s is a function of (seed, s): an epoch cuts the text into n = (count-1)/T sequences and permutes them by a Feistel network."""

    def __init__(self, text, T, seed, shuffle):
        self.text, self.T, self.seed, self.shuffle = text, T, seed, shuffle
        self.sequences = (len(text) - 1) // T
        self.spare = len(text) - 1 - self.sequences * T
        self.half_bits = 1
        while 1 << 2 * self.half_bits < self.sequences:
            self.half_bits += 1

    def permuted(self, i, epoch):
        mask = (1 << self.half_bits) - 1
        while True:
            left, right = i >> self.half_bits, i & mask
            for step in range(6):
                f = philox_word(self.seed ^ epoch >> 32, right, epoch, step, STREAM_DATA)
                left, right = right, (left ^ f) & mask
            i = left << self.half_bits | right
            if i < self.sequences:
                return i

    def position(self, s):
        epoch, i = divmod(s, self.sequences)
        if not self.shuffle:
            return i * self.T
        shift = philox_word(self.seed, epoch, epoch >> 32, 0xFFFFFFFF, STREAM_DATA) % (self.spare + 1)
        return shift + self.permuted(i, epoch) * self.T

    def batch(self, s, B):
        """Tokens and targets (B,T) of sequences s .. s+B-1."""
        at = np.array([self.position(s + b) for b in range(B)])[:, None] + np.arange(self.T + 1)
        rows = self.text[at]
        return rows[:, :-1], rows[:, 1:]
