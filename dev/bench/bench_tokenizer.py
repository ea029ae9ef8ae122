#!/usr/bin/env python3
"""The trainers' encoder beside tiktoken's, in MB of text a second: `make build/tokenizer.so`, then

    dev/bench/bench_tokenizer.py [-t TOK.bin] [-n TURNS] [FILES...]

without -t a vocabulary of 16384 trained on the text, without FILES Python's own library. Who is compared takes turns; a
figure is the median, beside it the slowest and the fastest. On one thread each encodes document by document, tiktoken by
encode_ordinary, whose list of ids is part of its time; on two it has encode_ordinary_batch, the trainers what they read a
text file by. The goal is twice tiktoken's speed on one thread. Speed is shown, not tested.
"""

import argparse
import glob
import os
import sys
import sysconfig
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "test"), str(ROOT / "data")]
sys.path.append(str(ROOT / "build" / "python"))  # where .ci/run puts tiktoken and tokenizers

import shards
import tokenizer
from tokenizer_library import Trainers

GOAL = 2.0  # times tiktoken, on one thread


def documents(files):
    for path in files:
        try:
            yield Path(path).read_bytes().decode()
        except UnicodeDecodeError:
            pass


def measure(turns, calls):
    """{name: (function, bytes)} -> {name: MB/s in each turn}"""
    speeds = {name: [] for name in calls}
    for turn in range(turns + 1):  # the first is not counted
        for name, (function, size) in calls.items():
            start = time.perf_counter()
            function()
            if turn:
                speeds[name].append(size / 1e6 / (time.perf_counter() - start))
    return speeds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-t", "--tokenizer", metavar="TOK", help="a tokenizer file, or what data/tokenizer.py's import takes")
    parser.add_argument("-n", "--turns", type=int, default=5, help="default: %(default)s")
    parser.add_argument("files", metavar="FILES", nargs="*", help="UTF-8 text")
    args = parser.parse_args()
    texts = list(documents(args.files or sorted(glob.glob(sysconfig.get_path("stdlib") + "/*.py"))))
    tok = tokenizer.load(args.tokenizer) if args.tokenizer else tokenizer.train(
        [(text.encode(), True, 0) for text in texts], 16384, 2, ["<|endoftext|>"])
    path = ROOT / "build" / "bench_tokenizer.bin"
    path.write_bytes(tok.data)
    ours, theirs = Trainers(path), tokenizer.encoder(tok)

    encoded = [text.encode() for text in texts]
    rooms = [ours.buffer(text) for text in encoded]
    whole = b"\n".join(encoded)
    room, size = ours.buffer(whole), sum(map(len, encoded))
    counts = [ours.encode_into(tokens, text) for tokens, text in zip(rooms, encoded)]
    for text, tokens, count in zip(texts, rooms, counts):
        if tokens[:count] != theirs.encode_ordinary(text):
            raise shards.DataError("the ids differ from tiktoken's: test/test_tokenizer.py shows where")
    print(f"{args.tokenizer or 'trained'}: V {tok.size}, split {tokenizer.SPLITS[tok.split]}; {len(texts)} documents, {size / 1e6:.1f} MB,"
          f" {size / sum(counts):.2f} bytes a token, the same ids; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    speeds = measure(args.turns, {
        ("trainers", 1): (lambda: [ours.encode_into(*pair) for pair in zip(rooms, encoded)], size),
        ("tiktoken", 1): (lambda: [theirs.encode_ordinary(text) for text in texts], size),
        ("trainers", 2): (lambda: ours.encode_into(room, whole, threads=2), len(whole)),
        ("tiktoken", 2): (lambda: theirs.encode_ordinary_batch(texts, num_threads=2), size)})
    for threads in 1, 2:
        figures = [f"{name} {median(mine):6.1f} ({min(mine):.1f} to {max(mine):.1f}) MB/s"
                   for name in ("trainers", "tiktoken") for mine in [speeds[name, threads]]]
        ratio = median(speeds["trainers", threads]) / median(speeds["tiktoken", threads])
        print(f"{threads} thread{'s' * (threads > 1)}: {', '.join(figures)}: {ratio:.2f} times"
              + (f", goal {GOAL:g}: {'met' if ratio >= GOAL else 'not met'}" if threads == 1 else ""))
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    shards.run(main)
