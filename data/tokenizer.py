#!/usr/bin/env python3
"""Vocabularies: train one on text or take one from elsewhere, encode text as token shards, decode.

    python3 data/tokenizer.py train -V 32768 -o TOK.bin FILES...     a byte-level BPE of 32768 ids from these texts
    python3 data/tokenizer.py import gpt2 -o TOK.bin                 tiktoken's, or a .tiktoken or tokenizer.json file
    python3 data/tokenizer.py export TOK.bin -o tokenizer.json       for Hugging Face's tokenizers and transformers
    python3 data/tokenizer.py encode -t TOK.bin -o DIR FILES...      text to shards (shards.py says what these are)
    python3 data/tokenizer.py decode -t TOK.bin SHARD.bin            tokens to text; of "1,2,3" or - (ids on stdin) too
    python3 data/tokenizer.py count -t TOK.bin FILES...              tokens, bytes and bytes a token

FILES: a .jsonl file holds a document a line, in the field "text"; a .parquet file (needs pyarrow) a document a row,
in the column "text"; any other file is one document of UTF-8 text; - is standard input. They are taken in the order
given, those of a quoted glob in the order of their names' bytes, as the trainers do. Before each document stands the
vocabulary's first special token; in the text, special tokens' names are ordinary text.

A tokenizer file, little-endian: 256 int32 (bytes 'KEEL', 1, 4, then at [5] the number of ids V, [7] the split, [8] the
number of special entries S, zeros), V entries in the order of ids, each uint16 length and bytes, and the
CRC-32 of all that. The first V-S entries are the ranks: text is split by the split's expression, and in a piece that is
no token as a whole, beginning from its bytes, the two neighbours whose joined bytes have the lowest rank are merged,
the leftmost first, until none have one. The last S are special tokens' names; an empty one is an id that nothing has.

    split 0 none     every byte is a token, and nothing else
          1 gpt2     words with the space before them, numbers, other characters, white space
          2 cl100k   numbers of at most three digits, line ends apart: GPT-4's
          3 llama3   as cl100k, but for white space at the text's end: Llama 3's, and Hugging Face's copies of cl100k

Standard library only, but for tiktoken (encode, count), tokenizers (train, import of a tokenizer.json) and pyarrow. The
trainers' own encoder, keel/tokenizer.h, gives the ids of these libraries: test/test_tokenizer.py shows it.
"""

import argparse
import array
import base64
import codecs
import collections
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import re
import signal
import struct
import sys
import threading
import time
import zlib

import shards
from shards import DataError, import_or_explain, one_line

# The splits by number: name, tiktoken's expression, and the one that Hugging Face's Split gets, whose engine reads
# {1,3}+ as a repetition of a repetition and $ as any line's end.
SPLITS = ["none", "gpt2", "cl100k", "llama3"]
PATTERNS = [
    r"(?s:.)",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
SPLIT_PATTERNS = [pattern.replace("$", r"\z").replace("{1,3}+", "{1,3}") for pattern in PATTERNS]
KNOWN_PATTERNS = {pattern: split for patterns in (PATTERNS, SPLIT_PATTERNS) for split, pattern in enumerate(patterns) if split} | {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": 1,  # GPT-2's as first published,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": 1,  # and as older tiktokens have it
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": 3,
}

ENDOFTEXT = "<|endoftext|>"
# Rank files known by their SHA-256: split and special tokens, as tiktoken has them.
KNOWN_RANK_FILES = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": (1, {ENDOFTEXT: 50256}),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (2, {
        ENDOFTEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
}

BATCH_BYTES = 1 << 18  # text that goes to a worker process at once: enough that the transfer costs little

# ------------------------------------------------------------------------------------------------
# The tokenizer file


class Tokenizer:
    """ranks: (V-S) byte strings; split: index into SPLITS; entries: (S) special tokens' names, "" for an id that nothing has."""

    def __init__(self, ranks, split, entries, source):
        self.ranks, self.split, self.entries = ranks, split, entries
        self.size = len(ranks) + len(entries)  # V, ids
        self.specials = {name: len(ranks) + i for i, name in enumerate(entries) if name}
        self.separator = min(self.specials.values(), default=None)
        self.id_of = {token: i for i, token in enumerate(ranks)}
        self.typecode = "H" if self.size <= 1 << 16 else "I"  # of a token in arrays and shards

        def wrong(why):
            raise DataError(f"{source}: {why}")

        missing = [byte for byte in range(256) if bytes([byte]) not in self.id_of]
        if missing:
            wrong(f"all 256 bytes are expected among the tokens, byte 0x{missing[0]:02x} is not: no byte-level vocabulary")
        if b"" in self.id_of or len(self.id_of) < len(ranks):
            twice = next((t for t, n in collections.Counter(ranks).items() if n > 1), b"")
            wrong(f"each token is expected once and not empty, found {twice!r}")
        if sum(map(bool, entries)) > len(self.specials):
            wrong("each special token is expected once, found one twice")
        if split == 0 and len(ranks) != 256:
            wrong(f"256 tokens are expected without a split, found {len(ranks)}")
        self.table = ranks + [name.encode() for name in entries]  # by id
        longest = max(self.table, key=len)
        if len(longest) > 65535:
            wrong(f"tokens of at most 65535 bytes are expected, one has {len(longest)}: {longest[:40]!r}...")
        header = [int.from_bytes(b"KEEL", "little"), 1, 4, 0, 0, self.size, 0, split, len(entries)]
        data = struct.pack("<256i", *header, *[0] * (256 - len(header)))
        data += b"".join(struct.pack("<H", len(token)) + token for token in self.table)
        self.crc = zlib.crc32(data)
        self.data = data + struct.pack("<I", self.crc)  # the file's bytes

    def __reduce__(self):  # for worker processes
        return Tokenizer, (self.ranks, self.split, self.entries, "a tokenizer")


def parse_tokenizer(data, path):
    if len(data) < 1028 or data[:12] != b"KEEL" + struct.pack("<2i", 1, 4):
        raise DataError(f"{path}: not a tokenizer file: expected 'KEEL', 1, 4 at its start and at least 1028 bytes,"
                        f" found {data[:12]!r} and {len(data)} bytes")
    crc, = struct.unpack("<I", data[-4:])
    if zlib.crc32(data[:-4]) != crc:
        raise DataError(f"{path}: damaged or cut short: its CRC-32 is {zlib.crc32(data[:-4]):08x}, it says {crc:08x}: write it again")
    header = struct.unpack("<256i", data[:1024])
    size, split, special = header[5], header[7], header[8]
    if any(header[3:5] + header[6:7] + header[9:]) or not 0 <= split < len(SPLITS) or not 0 <= special <= size:
        raise DataError(f"{path}: not a tokenizer file of this version: V {size}, split {split}, {special} special entries,"
                        " all other words expected to be 0")
    table, position, end = [], 1024, len(data) - 4
    while position + 2 <= end and len(table) < size:
        length, = struct.unpack_from("<H", data, position)
        table.append(data[position + 2 : position + 2 + length])
        position += 2 + length
    if position != end or len(table) != size:
        raise DataError(f"{path}: {size} tokens are expected to fill the file's {len(data)} bytes, {len(table)} end at {position + 4}")
    try:
        names = [name.decode() for name in table[size - special :]]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: special tokens are expected to be UTF-8, found {error.object!r}") from None
    return Tokenizer(table[: size - special], split, names, path)


def read_tokenizer(path):
    with open(path, "rb") as file:
        return parse_tokenizer(file.read(), path)


def encoder(tok):
    """The tokenizer as a tiktoken.Encoding."""
    tiktoken = import_or_explain("tiktoken", "tiktoken")
    return tiktoken.Encoding("keel", pat_str=PATTERNS[tok.split], mergeable_ranks=tok.id_of, special_tokens=tok.specials)


def need_library(tok):
    """A missing package shows before anything is written, or a worker is started."""
    if tok.split:
        import_or_explain("tiktoken", "tiktoken")


def piece_encoder(tok):
    """A function (UTF-8 bytes, whether they begin a document) -> array of tokens, the separator first where they do."""
    separator = [] if tok.separator is None else [tok.separator]
    if tok.split == 0:
        table = bytes(tok.id_of[bytes([byte])] for byte in range(256))
        ids = lambda text: text.translate(table)  # noqa: E731
    else:
        encoding = encoder(tok)

        def ids(text):
            try:
                return encoding.encode_ordinary(text.decode())
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # of the library's Rust; derived from BaseException alone
                    raise
                raise DataError("tiktoken cannot split a text with so much white space at one place, about a million characters:"
                                f" take some out; the text begins with {text[:60]!r}") from None

    def encode(text, opens):
        tokens = array.array(tok.typecode, separator if opens else [])
        tokens.extend(ids(text))
        return tokens
    return encode


# ------------------------------------------------------------------------------------------------
# Vocabularies of others


def load(source, split=None, specials=None):
    """A tokenizer file, or what import takes: see import's help. split, specials: of a rank file alone."""
    if source == "bytes":
        tok = Tokenizer([bytes([byte]) for byte in range(256)], 0, [ENDOFTEXT], source)
    elif os.path.splitext(source)[1] in (".bin", ".json", ".tiktoken") or os.path.exists(source):
        with open(source, "rb") as file:
            data = file.read()
        if data[:4] == b"KEEL":
            tok = parse_tokenizer(data, source)
        elif source.endswith(".json"):
            tok = from_hugging_face(data, source)
        else:
            return from_rank_file(data, source, split, specials)
    else:
        tok = from_tiktoken(source)
    if split or specials:
        raise DataError(f"{source}: --split and --special are for a .tiktoken file; this one brings its own")
    return tok


def special_entries(first, specials, source):
    """{name: id} -> the entries from id `first` on, "" where there is a gap."""
    by_id = {number: name for name, number in specials.items()}
    for name, number in specials.items():
        if not first <= number < first + (1 << 16) or by_id[number] != name:
            raise DataError(f"{source}: special tokens are expected right behind the {first} others, one an id, found {name!r} at {number}")
    return [by_id.get(number, "") for number in range(first, max(by_id, default=first - 1) + 1)]


def from_ranks(ranks, split, specials, source):
    """{token: rank} -> Tokenizer"""
    ordered = sorted(ranks, key=ranks.get)
    gap = next((i for i, token in enumerate(ordered) if ranks[token] != i), None)
    if gap is not None:
        raise DataError(f"{source}: ranks are expected to be 0 to {len(ranks) - 1}, {gap} is missing"
                        " (a special token in their midst?): a vocabulary that cannot be imported")
    return Tokenizer(ordered, split, special_entries(len(ranks), specials, source), source)


def from_tiktoken(name):
    tiktoken = import_or_explain("tiktoken", "tiktoken")
    if name not in tiktoken.list_encoding_names():
        raise DataError(f"{name}: expected bytes, a .tiktoken file, a tokenizer.json, or one of tiktoken's: gpt2, r50k_base, cl100k_base")
    if name.startswith("o200k"):  # here and below: refused before it is fetched
        raise DataError(f"{name}: it splits text by an expression of its own, which is none of {', '.join(SPLITS[1:])}")
    if name.startswith("p50k"):
        raise DataError(f"{name}: a special token stands in the midst of its ranks, 50256: take gpt2, which is the same below it")
    try:  # the first use fetches the vocabulary, by a library whose errors are not OSErrors
        encoding = tiktoken.get_encoding(name)
    except Exception as error:
        raise DataError(f"tiktoken cannot load {name} ({one_line(error)}): its first use needs the network,"
                        " or TIKTOKEN_CACHE_DIR set to a folder that holds it") from None
    return from_ranks(encoding._mergeable_ranks, known_split(encoding._pat_str, name), encoding._special_tokens, name)


def known_split(pattern, source):
    if pattern not in KNOWN_PATTERNS:
        raise DataError(f"{source}: it splits text by an expression that is none of {', '.join(SPLITS[1:])}: {pattern}")
    return KNOWN_PATTERNS[pattern]


def from_rank_file(data, path, split, specials):
    usual_split, usual_specials = KNOWN_RANK_FILES.get(hashlib.sha256(data).hexdigest(), (split, None))
    if usual_split is None:
        raise DataError(f"{path}: which --split goes with these ranks, {', '.join(SPLITS[1:])}? The file does not say it")
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(f"{path}: line {number}: expected a token in base64 and its rank, found {line[:60]!r}") from None
    if usual_specials and not specials:
        return from_ranks(ranks, usual_split if split is None else split, usual_specials, path)
    placed = {}
    for text in specials or [ENDOFTEXT]:
        name, _, number = text.rpartition("=")
        if not (name and number.isascii() and number.isdigit()):
            name, number = text, max([len(ranks) - 1, *placed.values()]) + 1
        if name in placed:
            raise DataError(f"--special {name!r} is given twice")
        placed[name] = int(number)
    return from_ranks(ranks, usual_split if split is None else split, placed, path)


def byte_letters():
    """byte -> the letter by which Hugging Face's byte-level vocabularies write it: itself, or one from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


LETTER_OF = byte_letters()
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}


def letters(token):
    return "".join(map(LETTER_OF.get, token))


def from_hugging_face(data, path):
    def refuse(why):
        raise DataError(f"{path}: {why}")

    tokenizers = import_or_explain("tokenizers", "tokenizers tiktoken")
    try:
        content = json.loads(data)
        theirs = tokenizers.Tokenizer.from_str(data.decode())
        model = content["model"]
    except Exception as error:  # the library raises Exception itself
        refuse(f"not a tokenizer.json that can be read ({one_line(error)})")
    if model.get("type") != "BPE":
        refuse(f"a BPE is expected, found {model.get('type')}")
    for setting in "dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix":
        if model.get(setting):
            refuse(f"a BPE without {setting} is expected, found {setting} {model[setting]!r}")
    if content.get("normalizer"):
        refuse(f"it changes text before it is split, by {content['normalizer'].get('type')}: text would not come back as it was")
    split = hugging_face_split(content.get("pre_tokenizer"), model, path)

    specials = {}
    for added in content.get("added_tokens", []):
        if not added["special"]:
            refuse(f"added token {added['content']!r} is not special: it is cut out of any text before the split, which no rank can say")
        specials[added["content"]] = added["id"]
    ids = {}
    for word, number in model["vocab"].items():
        if word not in specials:
            if not all(letter in BYTE_OF for letter in word):
                refuse(f"token {word!r} is not written in byte-level letters")
            ids[bytes(map(BYTE_OF.get, word))] = number
    ranks = {token: rank for rank, token in enumerate(sorted(ids, key=ids.get))}
    if ranks != ids or min(specials.values(), default=len(ranks)) < len(ranks):
        specials = {name: len(ranks) + i for i, name in enumerate(sorted(specials, key=specials.get))}
        print(f"{path}: ids renumbered: {len(ranks)} tokens in their order, then {len(specials)} special ones", file=sys.stderr)
    tok = from_ranks(ranks, split, specials, path)
    prove_ranks(tok, model, theirs, path)
    return tok


def hugging_face_split(pre_tokenizer, model, path):
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]) or [None]
    kinds, last = [part and part.get("type") for part in parts], parts[-1] or {}
    if last.get("add_prefix_space") or kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise DataError(f"{path}: pre_tokenizer: expected ByteLevel, or Split and ByteLevel, without add_prefix_space,"
                        f" found {shards.brief(pre_tokenizer)}")
    by_regex = last.get("use_regex", True)
    if len(parts) == 1 and (by_regex or not model["merges"]):
        return 1 if by_regex else 0
    if by_regex or (parts[0].get("behavior"), parts[0].get("invert")) not in (("Isolated", False), ("Removed", True)):
        raise DataError(f"{path}: pre_tokenizer: expected a Split that keeps each match apart, or a ByteLevel that splits,"
                        f" found {shards.brief(pre_tokenizer)}")
    return known_split(parts[0]["pattern"].get("Regex"), path)


def prove_ranks(tok, model, theirs, path):
    """Whether ranks say what the list of merges does; where not, an error that names a token.

    Two neighbours x, y merge to z by rank only in a state where all merges below z's rank are done. No merge reaches
    over the ends of such an x y, so their bytes alone come to the same state: (x, y) is what z's own bytes are at that
    rank, one pair for each z. So ranks and list agree on every text where the list has that pair for each z, and its
    order is that of the z's ranks. A z whose bytes come to more than two tokens is made by no merge; whether it stands
    for a piece that is the whole of it, the library's own encoding shows, here of each token that is a text.
    """
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    made = [tok.id_of.get(bytes(map(BYTE_OF.get, left + right)), -1) for left, right in merges]
    for before, after, (left, right) in zip(made, made[1:], merges[1:]):
        if after < before:
            raise DataError(f"{path}: its ids are not in the order of its merges: {left + right!r} has a lower id than the token of the"
                            " merge before it")
    listed = set(merges)
    for rank, token in enumerate(tok.ranks):
        pair = merge_below(tok, token, rank)
        if len(pair) == 2 and tuple(map(letters, pair)) not in listed:
            raise DataError(f"{path}: ranks merge {letters(pair[0])!r} and {letters(pair[1])!r}, its merges do not: the two would"
                            " encode text differently")
    texts = []
    for token in tok.ranks:
        try:
            texts.append(token.decode())
        except UnicodeDecodeError:
            pass  # a part of a character
    theirs.no_truncation()
    theirs.no_padding()
    encoding = encoder(tok)
    for text, their in zip(texts, theirs.encode_batch(texts, add_special_tokens=False)):
        ours = [letters(tok.ranks[i]) for i in encoding.encode_ordinary(text)]  # no ids: theirs may have been renumbered
        if ours != their.tokens:
            raise DataError(f"{path}: by rank {text!r} is {ours}, by its merges {their.tokens}: a vocabulary that cannot be imported")


def merge_below(tok, token, rank):
    """The token's bytes after all merges below `rank`, as a list of tokens."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best, i = min((tok.id_of.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
        if best >= rank:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def to_hugging_face(tok):
    """The content of a tokenizer.json that gives the same ids for text without special tokens' names in it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERNS[tok.split]}, "behavior": "Isolated", "invert": False}
    merges = []  # all that ranks can merge, the lowest first
    for token in tok.ranks:
        halves = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in tok.id_of and token[i:] in tok.id_of]
        merges += sorted(halves, key=lambda pair: tuple(map(tok.id_of.get, pair)))
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                          "special": True} for name, number in tok.specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]} if tok.split else byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            # With the special tokens, which keep their ids so even where there are gaps.
            "vocab": {letters(token): number for number, token in enumerate(tok.ranks)} | tok.specials,
            "merges": [f"{letters(left)} {letters(right)}" for left, right in merges],
        },
    }


# ------------------------------------------------------------------------------------------------
# Text to a vocabulary, text to tokens


def bounded(text):
    """A text in parts none of which has a run of more than 4096 characters without, or of nothing but, white space.

    The trainer's time grows with the square of a word's length, and a million equal letters would take it days.
    """
    if " " * 4096 not in text and max(map(len, text.split(" "))) <= 4096:
        return [text]  # the usual case, found fast
    return re.findall(r"(?s:.)*?(?:\S{4096}|\s{4096}|\Z)", text)


def train(pieces, size, split, names):
    """The byte-level BPE of `size` ids that Hugging Face's trainer makes of the pieces' text, special names last."""
    tokenizers = import_or_explain("tokenizers", "tokenizers tiktoken")
    from tokenizers import models, pre_tokenizers, trainers
    merges = size - 256 - len(names)
    if merges < 0:
        raise DataError(f"-V {size}: expected at least {256 + len(names)}, the 256 bytes and {len(names)} special tokens")
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERNS[split]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[],
                                  show_progress=sys.stderr.isatty())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the library would answer it only when it has read all text
    theirs.train_from_iterator((bounded(text.decode()) for text, _, _ in pieces), trainer)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ids = theirs.get_vocab()
    tokens = [bytes(map(BYTE_OF.get, word)) for word in sorted(ids, key=ids.get)]
    tokens = [bytes([byte]) for byte in range(256)] + [token for token in tokens if len(token) > 1]  # merges in their order
    if len(tokens) < 256 + merges:
        raise DataError(f"the text gives {len(tokens) - 256} merges, -V {size} asks for {merges}: give more text, or -V"
                        f" {len(tokens) + len(names)} at most")
    return Tokenizer(tokens, split, list(names), "the trained vocabulary")


def encode_pieces(tok, pieces, workers):
    """Yield (tokens, bytes of text, share) for each of `pieces`, in order, tokenized by `workers` processes."""
    need_library(tok)
    if workers == 1 or tok.split == 0:  # bytes: a worker would cost more than it saves
        encode = piece_encoder(tok)
        for text, opens, share in pieces:
            yield encode(text, opens), len(text), share
        return
    # Spawned, not forked: a fork would inherit the lock on the output folder and hold it after the parent.
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (tok,))

    def results(future, batch):
        return zip(future.result(), (len(text) for text, _, _ in batch), (share for _, _, share in batch))

    try:
        pending = collections.deque()  # bounded, so that memory is too
        for batch in batches(pieces):
            pending.append((pool.submit(encode_batch, [(text, opens) for text, opens, _ in batch]), batch))
            if len(pending) >= 3 * workers:
                yield from results(*pending.popleft())
        while pending:
            yield from results(*pending.popleft())
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a tokenizer process died (out of memory?): the same command goes on; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def batches(pieces):
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def start_worker(tok):
    global worker_encode
    worker_encode = piece_encoder(tok)

    def exit_with_parent():  # a killed parent closes no queue: its workers would wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, in one line


def encode_batch(pieces):
    return [worker_encode(*piece) for piece in pieces]


def write_text_shards(tok, args, settings, pieces):
    """shards.write_shards() for text and the options of add_writer_options() and add_workers_option()."""
    need_library(tok)
    shards.write_shards(
        args.out, args.prefix, args.shard_tokens, args.val_tokens, settings | {"tokenizer": f"CRC-32 {tok.crc:08x}"},
        lambda start: encode_pieces(tok, pieces(start), args.workers), tok.typecode, tok.data)


def write_file_shards(tok, args, files, field="text", jsonl=False):
    inputs = shards.fingerprints(files)
    write_text_shards(tok, args, {"inputs": inputs, "field": field, "jsonl": jsonl}, lambda start: shards.read_pieces(
        files, [size for _, size, _ in inputs], start, field=field, any_bytes=tok.split == 0, jsonl=jsonl))


# ------------------------------------------------------------------------------------------------
# Command line


def write_new(path, data):
    """Write a small file, where another one is never overwritten."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            if file.read() != data:
                raise DataError(f"{path} exists and is another: remove it, or choose another -o")
    else:
        shards.write_whole(path, data)


def print_written(tok, path):
    specials = ", ".join(f"{name} {number}" for name, number in tok.specials.items()) if len(tok.specials) < 10 else len(tok.specials)
    print(f"{path}: V {tok.size}, split {SPLITS[tok.split]}, special tokens: {specials or 'none'}, CRC-32 {tok.crc:08x}")


def run_train(args):
    names = list(dict.fromkeys([ENDOFTEXT, *args.special]))
    inputs, start = shards.fingerprints(args.files), time.monotonic()
    import_or_explain("tiktoken", "tokenizers tiktoken")  # what is missing or in the way shows before hours of work
    if os.path.exists(args.out):
        raise DataError(f"{args.out} exists: remove it, or choose another -o")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)

    def pieces(files):
        return shards.read_pieces(files, [size for _, size, _ in inputs], field=args.field, jsonl=args.jsonl)

    tok = train(pieces(args.files), args.vocabulary, SPLITS.index(args.split), names)
    write_new(args.out, tok.data)
    print_written(tok, args.out)
    text = tokens = 0
    for ids, size, _ in encode_pieces(tok, pieces([path for path in args.files if path != "-"]), 1):
        text, tokens = text + size, tokens + len(ids)
        if text >= 10_000_000:
            break
    if tokens:
        print(f"{text / tokens:.3f} bytes a token on the first {text / 1e6:.1f} MB of its text")
    print(f"{time.monotonic() - start:.1f} s")


def run_import(args):
    tok = load(args.source, args.split and SPLITS.index(args.split), args.special)
    write_new(args.out, tok.data)
    print_written(tok, args.out)


def run_export(args):
    tok = read_tokenizer(args.tokenizer)
    write_new(args.out, (json.dumps(to_hugging_face(tok), ensure_ascii=False, indent=1) + "\n").encode())
    print_written(tok, args.out)


def run_encode(args):
    write_file_shards(load(args.tokenizer), args, args.files, args.field, args.jsonl)


def run_decode(args):
    tok = load(args.tokenizer)
    source = sys.stdin.read() if args.tokens == "-" else args.tokens
    words = source.replace(",", " ").split()
    if args.tokens == "-" or all(word.isascii() and word.isdigit() for word in words):
        bad = [word for word in words if not (word.isascii() and word.isdigit())]
        if bad:
            raise DataError(f"token ids are expected on standard input, found {bad[0]!r}")
        ids = [int(word) for word in words][: args.count]
    else:
        ids = shards.read_shard(args.tokens, args.count)
    unknown = next((i for i in ids if i >= tok.size or not tok.table[i]), None)
    if unknown is not None:
        raise DataError(f"token {unknown} is not one of {args.tokenizer}'s, which has V {tok.size}: give the -t that wrote these tokens")
    terminal, decoder = sys.stdout.isatty(), codecs.getincrementaldecoder("utf-8")("replace")
    for start in range(0, len(ids), 1 << 20):
        text = b"".join(map(tok.table.__getitem__, ids[start : start + (1 << 20)]))
        if terminal:
            sys.stdout.write(visible(decoder.decode(text)))
        else:
            sys.stdout.buffer.write(text)
    if terminal:
        sys.stdout.write(decoder.decode(b"", final=True))


def visible(text):
    """Text that steers no terminal, as the trainers print samples: controls but tab and line ends as symbols."""
    controls = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n\r"} | {127: 0x2421} | {i: 0xFFFD for i in range(128, 160)}
    return re.sub(r"\r(?!\n)", "\u240d", text).translate(controls)


def run_count(args):
    tok = load(args.tokenizer)
    inputs = shards.fingerprints(args.files)
    totals = [0, 0]

    def line(name, tokens, text):
        print(f"{name}: {tokens:,} tokens, {text:,} bytes, {text / max(tokens, 1):.3f} bytes a token", flush=True)

    def counted():
        for path, (_, size, _) in zip(args.files, inputs):
            yield from shards.read_pieces([path], [size], field=args.field, any_bytes=tok.split == 0, jsonl=args.jsonl)
            yield b"", False, path  # the file's end

    tokens = text = 0
    for ids, size, share in encode_pieces(tok, counted(), args.workers):
        tokens, text = tokens + len(ids), text + size
        if isinstance(share, str):
            line(share, tokens, text)
            totals, tokens, text = [totals[0] + tokens, totals[1] + text], 0, 0
    if len(args.files) > 1:
        line("in all", *totals)


def special_name(text):
    try:
        if text.encode():
            return text
    except UnicodeEncodeError:
        pass
    raise argparse.ArgumentTypeError(f"expected a special token's text in UTF-8, found {text!r}")


def add_workers_option(parser):
    parser.add_argument("--workers", metavar="N", type=shards.positive, default=shards.usable_cores(),
                        help="tokenizer processes (default: %(default)s, the cores there are)")


def main():
    parser = shards.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, help="each has its own -h")

    def command(function, name, help, files=False, out=None):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(function=function)
        if name in ("encode", "decode", "count"):
            sub.add_argument("-t", "--tokenizer", metavar="TOK", type=shards.path_argument, required=True, help="a tokenizer file, or what import takes")
        if out:
            sub.add_argument("-o", "--out", metavar=out, type=shards.path_argument, required=True, help="file to write")
        if files:
            sub.add_argument("files", metavar="FILES", type=shards.glob_argument, nargs="+",
                             help="text, .jsonl or .parquet files; - is standard input")
            sub.add_argument("--field", metavar="NAME", default="text", help="the text's field or column (default: %(default)s)")
            sub.add_argument("--jsonl", action="store_true", help="standard input holds a JSON object a line")
        return sub

    sub = command(run_train, "train", "Train a byte-level BPE on text.", files=True, out="TOK.bin")
    sub.add_argument("-V", "--vocabulary", metavar="N", type=shards.positive, required=True, help="ids, special tokens among them")
    sub.add_argument("--split", choices=SPLITS[1:], default="cl100k", help="default: %(default)s")
    sub.add_argument("--special", metavar="TEXT", type=special_name, action="append", default=[],
                     help=f"a special token after {ENDOFTEXT}, as often as need be")

    sub = command(run_import, "import", "Take a vocabulary of others: a rank file of tiktoken's form, a tokenizer.json of Hugging Face's"
                  " (byte-level BPE), a name of tiktoken's (gpt2, r50k_base, cl100k_base), or bytes.", out="TOK.bin")
    sub.add_argument("source", metavar="SOURCE", type=shards.path_argument, help="FILE.tiktoken, tokenizer.json, a name, or bytes")
    sub.add_argument("--split", choices=SPLITS[1:], help="a rank file's, where it is not known")
    sub.add_argument("--special", metavar="TEXT[=ID]", type=special_name, action="append",
                     help=f"a rank file's special token, as often as need be; the next free id where none is given (default: {ENDOFTEXT})")

    sub = command(run_export, "export", "Write a tokenizer.json for Hugging Face's tokenizers and transformers.", out="tokenizer.json")
    sub.add_argument("tokenizer", metavar="TOK.bin", type=shards.path_argument, help="a tokenizer file")

    sub = command(run_encode, "encode", "Write text as token shards, with a copy of the vocabulary beside them as tokenizer.bin. The same"
                  " command goes on where an interrupted run stopped.", files=True)
    shards.add_writer_options(sub, prefix="text")
    add_workers_option(sub)

    sub = command(run_decode, "decode", "Print tokens as the bytes they stand for.")
    sub.add_argument("tokens", metavar="SHARD.bin|IDS|-", type=shards.path_argument, help='a shard, ids such as "1,2,3", or - for ids on standard input')
    sub.add_argument("--count", metavar="N", type=shards.positive, help="only the first N tokens")

    sub = command(run_count, "count", "Print how many tokens files have, separators among them, and bytes a token.", files=True)
    add_workers_option(sub)
    args = parser.parse_args()
    if isinstance(getattr(args, "files", None), list):
        args.files = shards.globbed(args.files)
    args.function(args)


if __name__ == "__main__":
    shards.run(main)
