#!/usr/bin/env python3
"""The trainers' encoder beside tiktoken and Hugging Face's tokenizers: the same ids on text found here and on strings of all Unicode.

    test/test_tokenizer.py                                                  3 MB and 20 000 strings; LONG=1: 10 MB, 100 000
    MB=100 STRINGS=1000000 TEXTS='/usr/share/doc:/usr/src/*' test/test_tokenizer.py     on the texts of these folders

Vocabularies are trained here on the spot; VOCABULARIES=gpt2.bin:cl100k.bin compares these tokenizer files too, or
whatever else data/tokenizer.py's import takes.
"""

import glob
import gzip
import heapq
import json
import os
import random
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "test"), str(ROOT / "data")]
sys.path.append(str(ROOT / "build" / "python"))  # where .ci/run puts the libraries

import suite
import tokenizer
from tokenizer_library import Trainers

MEGABYTES = float(os.environ.get("MB") or (10 if suite.LONG else 3))
STRINGS = int(os.environ.get("STRINGS") or (100_000 if suite.LONG else 20_000))
# Text that most machines have: this repository, Python's library, packages' documents, locales, translated messages.
FOLDERS = [ROOT / folder for folder in ("data", "dev", "keel", "test")] + [
    sysconfig.get_path("stdlib"), *(f"/usr/share/{name}" for name in ("doc", "i18n", "locale", "perl", "man"))]
TEXTS = [folder for pattern in os.environ.get("TEXTS", "").split(":") for folder in sorted(glob.glob(pattern))] or FOLDERS
BATCH = 1000  # texts or strings that a library gets at once

# ------------------------------------------------------------------------------------------------
# What is encoded


def read_text(path):
    """At most a megabyte of a file's UTF-8 text, of a .gz what is in it; "" where it has none."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            data = file.read(1 << 20)
        if path.endswith(".mo"):  # messages of many languages, between bytes that are none
            return data.decode(errors="ignore")
        while data and data[-1] >= 0x80:  # perhaps a cut character
            data = data[:-1]
        return "" if b"\0" in data else data.decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return ""


def texts(megabytes):
    """Yield (folder of TEXTS, text), from each folder as many bytes as it has, up to so many of all; always the same ones."""
    def files(folder):
        found = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
        return iter(sorted((path for path in found if os.path.isfile(path) and not os.path.islink(path)),
                           key=lambda path: zlib.crc32(path.encode(errors="surrogateescape"))))

    waiting = [(0, number, files(folder)) for number, folder in enumerate(TEXTS)]
    left = megabytes * 1e6
    while waiting and left > 0:
        done, number, paths = heapq.heappop(waiting)
        for path in paths:
            if text := read_text(path):
                size = len(text.encode())
                left -= size
                yield str(TEXTS[number]), text
                heapq.heappush(waiting, (done + size, number, paths))
                break


# Where splits decide: white space, line ends, contractions and what folds to their letters, digits, marks, symbols.
DECISIVE = [*" \n\r\t\v\f'sSdtmlLvVrReE.,!-(0123 a_", "\x1c", "\x85", "\xa0", "\u1680", "\u180e", "\u2009", "\u2028", "\u200b", "\u3000",
            "\ufeff", "\u017f", "\u212a", "\u0130", "\ufb05", "é", "ß", "Σ", "ǅ", "中", "٣", "½", "Ⅷ", "〇", "\u0301", "\u0903", "😀",
            "\U0001f9d1\u200d\U0001f680", "\ue000", "\U000e0100", "\U0010ffff", "'s", "'LL", "'\u017f", "\r\n", "  "]


def strings(count):
    """Yield strings of 1 to 24 characters: decisive ones, one script's, any of Unicode's, in changing parts."""
    choose = random.Random(1)

    def character(limit, first=0):
        code = first + choose.randrange(limit)
        return chr(code if not 0xD800 <= code < 0xE000 else code - 0x800)  # no surrogate

    for _ in range(count):
        share, script = choose.random(), choose.choice((choose.randrange(0x3000), choose.randrange(0xD700), choose.randrange(0x1F900)))
        kinds = (lambda: character(0x110000)), (lambda: character(0x3000)), (lambda: character(128, script))
        kind = choose.choice(kinds)
        yield "".join(choose.choice(DECISIVE) if choose.random() < share else kind() for _ in range(choose.randrange(1, 25)))


def characters():
    """Each character of Unicode, behind a letter, a digit and a space; without LONG=1 those of the first two planes."""
    planes = range(17) if suite.LONG else (0, 1)
    for first in (code for plane in planes for code in range(plane << 16, plane + 1 << 16, 1 << 12)):
        codes = (code for code in range(first, first + (1 << 12)) if not 0xD800 <= code < 0xE000)
        yield "".join(f"{chr(code)}a{chr(code)}1{chr(code)} " for code in codes)


# ------------------------------------------------------------------------------------------------
# Vocabularies and encoders


# Those that know the characters of Unicode 16.0, as the trainers do.
VERSIONS = {"tiktoken": "0.14", "tokenizers": "0.23"}


def library(name):
    install = f"({sys.executable} -m pip install --target build/python " + " ".join(f"{n}=={v}.*" for n, v in VERSIONS.items()) + ")"
    try:
        module = __import__(name)
    except ImportError:
        raise suite.Skip(f"no {name} {install}") from None
    if not module.__version__.startswith(VERSIONS[name] + "."):
        raise suite.Skip(f"{name} {module.__version__} may know other characters than {VERSIONS[name]} {install}")
    return module


def cached(function, made={}):
    return lambda: made[function] if function in made else made.setdefault(function, function())


def given():
    return [(os.path.basename(name), tokenizer.load(name)) for name in os.environ.get("VOCABULARIES", "").split(":") if name]


@cached
def vocabularies():
    """[(name, data/tokenizer.py's Tokenizer)]: one trained on each split, one whose ranks no text teaches, those given."""
    library("tokenizers")
    pieces = [(text.encode(), True, 0) for _, text in texts(3)]
    trained = [(f"trained, {split}", tokenizer.train(pieces, 4096, number, ["<|endoftext|>"]))
               for number, split in enumerate(tokenizer.SPLITS) if number]
    shuffled = list(trained[1][1].ranks)
    random.Random(2).shuffle(shuffled)
    return trained + [("shuffled, cl100k", tokenizer.Tokenizer(shuffled, 2, ["", "<|endoftext|>"], "shuffled ranks"))] + given()


@cached
def borders():
    """The same, to see splits by: a token over the border of any two characters that these strings have, so that no two can
    be in one piece here and in two there, and give the same ids. For each split, in an order of its own."""
    plain = {ord(character) for character in "".join(DECISIVE) if character < "\x80"}
    pairs = [bytes([end, start]) for end in [*plain, *range(0x80, 0xC0)] for start in [*plain, *range(0xC2, 0xF5)]]
    made = []
    for number, split in enumerate(tokenizer.SPLITS):
        if number:
            ranks = [*(bytes([byte]) for byte in range(256)), *pairs]
            random.Random(number).shuffle(ranks)
            made.append((f"borders, {split}", tokenizer.Tokenizer(ranks, number, [], "borders")))
    return made


def trainers(tok, folder):
    path = folder / f"{tok.crc:08x}.bin"
    path.write_bytes(tok.data)
    return Trainers(path)


def by_tiktoken(tok):
    """A function: texts -> their ids."""
    library("tiktoken")
    encoding = tokenizer.encoder(tok)
    return lambda some: encoding.encode_ordinary_batch(some, num_threads=1)


def by_hugging_face(tok):
    """The same of the tokenizer.json that export writes, without special tokens, which that library finds in any text."""
    tokenizers = library("tokenizers")
    plain = tokenizer.Tokenizer(tok.ranks, tok.split, [], "the ranks alone")
    encode = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_hugging_face(plain))).encode_batch_fast
    return lambda some: [encoding.ids for encoding in encode(some, add_special_tokens=False)]


PEERS = {"tiktoken": by_tiktoken, "tokenizers": by_hugging_face}


def compare(name, tok, folder, peer, made):
    """Raise where ids of the texts that made() yields differ; returns how many tokens they have."""
    ours, theirs, tokens = trainers(tok, folder), PEERS[peer](tok), 0
    batch, size = [], 0

    def check():
        nonlocal tokens
        for text, expected in zip(batch, theirs(batch)):
            found = ours.encode(text.encode())
            tokens += len(found)
            if found != expected:
                at = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
                before = len(b"".join(map(tok.table.__getitem__, found[:at])))
                beside = text.encode()[max(0, before - 40) : before + 40].decode(errors="replace")
                raise AssertionError(f"{name}, beside {beside!r}: {peer} has {[tok.table[i] for i in expected[at:][:5]]},"
                                     f" the trainers {[tok.table[i] for i in found[at:][:5]]}")

    for text in made():
        batch.append(text)
        size += len(text)
        if len(batch) == BATCH or size > 4_000_000:
            check()
            batch, size = [], 0
    check()
    return tokens


def compare_all(folder, peer, some, made, what):
    library(peer)
    for name, tok in some:
        print(f"  {name}: {compare(name, tok, folder, peer, made):,} tokens of {what} as {peer} has them", flush=True)


@cached
def found_texts():
    found, sizes = list(texts(MEGABYTES)), {}
    for folder, text in found:
        sizes[folder] = sizes.get(folder, 0) + len(text.encode())
    for folder in sorted(sizes, key=sizes.get, reverse=True):
        print(f"  {sizes[folder] / 1e6:8.2f} MB of {folder}")
    print(f"  {sum(sizes.values()) / 1e6:8.2f} MB in all, {len(found)} files", flush=True)
    return [text for _, text in found]


# ------------------------------------------------------------------------------------------------
# The cases


def test_text_has_tiktokens_ids(folder):
    """The ids of text found here are tiktoken's."""
    compare_all(folder, "tiktoken", vocabularies(), found_texts, "text")


def test_text_has_hugging_faces_ids(folder):
    """The ids of text found here are those of Hugging Face's tokenizers."""
    compare_all(folder, "tokenizers", vocabularies(), found_texts, "text")


def test_strings_have_tiktokens_ids(folder):
    """The ids of strings of all Unicode are tiktoken's."""
    compare_all(folder, "tiktoken", borders() + given(), lambda: strings(STRINGS), f"{STRINGS:,} strings")


def test_strings_have_hugging_faces_ids(folder):
    """The ids of strings of all Unicode are those of Hugging Face's tokenizers."""
    compare_all(folder, "tokenizers", borders() + given(), lambda: strings(STRINGS), f"{STRINGS:,} strings")


def test_characters_have_their_ids(folder):
    """Every character is a letter, a number, white space or none of these as the libraries have it."""
    for peer in PEERS:
        compare_all(folder, peer, borders(), characters, "single characters")


def test_splits_are_tiktokens(folder):
    """The expressions of data/tokenizer.py, by which these cases split, are those that tiktoken gives GPT-2 and cl100k."""
    library("tiktoken")
    from tiktoken_ext import openai_public
    load, openai_public.load_tiktoken_bpe = openai_public.load_tiktoken_bpe, lambda *_, **__: {}
    try:
        theirs = [openai_public.r50k_pat_str, openai_public.cl100k_base()["pat_str"]]
    finally:
        openai_public.load_tiktoken_bpe = load
    assert tokenizer.PATTERNS[1:3] == theirs, f"expected {theirs}, found {tokenizer.PATTERNS[1:3]}"


def test_threads_find_the_same_ids(folder):
    """encode_parallel finds the ids that encode finds, on text found here."""
    for name, tok in vocabularies():
        ours = trainers(tok, folder)
        text = "\n".join(found_texts())[:40_000_000].encode()
        assert ours.encode(text, threads=4) == ours.encode(text), name


def test_bytes_come_back(folder):
    """Tokens of bytes that are no UTF-8 decode to the same bytes."""
    choose = random.Random(3)
    whole = "".join(strings(200)).encode()
    for name, tok in vocabularies():
        ours = trainers(tok, folder)
        for _ in range(STRINGS // 10):
            text = bytearray(whole[(at := choose.randrange(len(whole))) : at + choose.randrange(1, 50)])
            for _ in range(choose.randrange(3)):
                text[choose.randrange(len(text))] = choose.randrange(256)
            ids = ours.encode(bytes(text))
            assert ours.decode(ids, len(text)) == text, f"{name}: {bytes(text)!r} is {ours.decode(ids, len(text))!r}"
            assert b"".join(map(tok.table.__getitem__, ids)) == text, f"{name}: {bytes(text)!r}: {ids}"


def test_training_from_text_is_training_from_its_shards(folder):
    """The trainer sees in text files the very tokens that data/tokenizer.py encode writes of them: the same model, state and
    validation, for tokens of 16 and of 32 bits."""
    library("tiktoken")
    documents = {"a b.txt": "".join(text for _, text in texts(0.1)).replace("\0", " "), "c.txt": "CR LF,\r\n中文。\r\n\u3000全角\r\n" * 300 + "\t \n ", "d.txt": " \n"}
    for name, text in documents.items():
        (folder / name).write_bytes(text.encode())
    trained = vocabularies()[1][1]
    for number, gaps in enumerate(([], [""] * 65536)):
        tok = tokenizer.Tokenizer(trained.ranks, trained.split, ["<|endoftext|>", *gaps], "a vocabulary")
        (folder / "tok.bin").write_bytes(tok.data)
        run(sys.executable, ROOT / "data/tokenizer.py", "encode", "-t", folder / "tok.bin", "-o", folder / f"shards{number}",
            "--shard-tokens", "9000", *(folder / name for name in documents))
        for source, data in ("text", "*.txt"), ("shards", f"shards{number}/text_train_*.bin"):
            run(ROOT / "train_keel_cpu", "--tokenizer", folder / "tok.bin", "-i", folder / data, "-o", folder / f"{source}_run{number}",
                *"-L 4 -C 16 -t 16 -b 4 -x 4 -v 2 -s 0".split())
        for name in "model_00000004.bin", "state_00000004_00000.bin", "tokenizer.bin":
            text, shards = ((folder / f"{source}_run{number}" / name).read_bytes() for source in ("text", "shards"))
            assert text == shards, name
        text, shards = ([row[:5] + row[8:] for row in map(lambda line: line.split(","), (folder / f"{source}_run{number}/log.csv").open())]
                        for source in ("text", "shards"))
        assert text == shards and float(text[-1][-1]) > 0, (text, shards)


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


if __name__ == "__main__":
    sys.exit(suite.main(sys.modules[__name__]))
