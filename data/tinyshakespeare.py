#!/usr/bin/env python3
"""Tiny Shakespeare, 1.1 MB of text: the smallest data set on which a language model shows something.

    python3 data/tinyshakespeare.py                      fetch data/tinyshakespeare/tiny_shakespeare.txt
    python3 data/tinyshakespeare.py --tokenizer gpt2     and write shards (needs tiktoken)

The .txt trains a model on bytes as it is. GPT-2's shards hold the tokens of llm.c's tinyshakespeare.py: a speech is a
document, the first 32768 tokens are tiny_shakespeare_val_000000.bin, the others
tiny_shakespeare_train_000001.bin. What is there already is neither fetched nor written again.
"""

import argparse
import itertools
import os
import urllib.request

import shards
import tokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1115394  # bytes
VAL_TOKENS = 32768


def fetch(path):
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            text = response.read()
    except OSError as error:
        raise shards.DataError(f"cannot fetch {URL} ({error}): fetch it elsewhere and give the file with --local") from None
    if len(text) != SIZE:
        raise shards.DataError(f"{URL}: expected {SIZE} bytes, received {len(text)}: try again, or give the file with --local")
    shards.write_whole(path, text)


def provide_text(path, local):
    """Put the text at `path`, where a file that differs from what is wanted is never overwritten."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if local:
        with open(local, "rb") as file:
            text = file.read()
        if not text:
            raise shards.DataError(f"{local}: the file is empty")
        if not os.path.exists(path):
            shards.write_whole(path, text)
        elif shards.fingerprint(path)[1:] != shards.fingerprint(local)[1:]:
            raise shards.DataError(f"{path} exists and differs from {local}: remove it, or choose another -o")
    elif not os.path.exists(path):
        fetch(path)
    elif os.path.getsize(path) != SIZE:
        raise shards.DataError(f"{path}: expected {SIZE} bytes, the file has {os.path.getsize(path)}: remove it to fetch it again")


def read_speeches(path, start):
    """Yield (speech, True, share read), speeches ending at an empty line, which belongs to the one before it."""
    with open(path, "rb") as file:
        text = file.read()
    speeches = [speech + b"\n\n" for speech in text.split(b"\n\n")]
    speeches[-1] = speeches[-1][:-2]
    for number, speech in itertools.islice(enumerate(speeches, 1), start, None):
        yield speech, True, number / len(speeches)


def main():
    parser = shards.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", metavar="NAME|FILE", type=shards.path_argument,
                        help="write shards too, by a tokenizer file or what tokenizer.py import takes (default: only the text)")
    parser.add_argument("--local", metavar="FILE", type=shards.path_argument, help="a text to take instead of fetching, of any size")
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tinyshakespeare")
    shards.add_writer_options(parser, folder, "tiny_shakespeare", VAL_TOKENS)
    args = parser.parse_args()

    path = os.path.join(args.out, "tiny_shakespeare.txt")
    provide_text(path, args.local)
    print(path)
    if args.tokenizer:
        args.workers = 1
        tokenizer.write_text_shards(tokenizer.load(args.tokenizer), args, {"inputs": [shards.fingerprint(path)]},
                                    lambda start: read_speeches(path, start))


if __name__ == "__main__":
    shards.run(main)
