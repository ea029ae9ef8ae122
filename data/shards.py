#!/usr/bin/env python3
"""Token shards, llm.c's .bin format: look into one, and make them of others' token files. Text becomes shards by tokenizer.py.

    python3 data/shards.py FILE.bin                             print a shard's header and first tokens
    python3 data/shards.py convert -o DIR [--prefix NAME] FILES...

A shard is 256 int32, then the tokens, all little-endian:
    (20240520, 1, number of tokens, zeros) and uint16, or, of a vocabulary of more than 65536 ids,
    (20240801, 7, number of tokens, zeros) and uint32.

With a validation shard that is NAME_val_000000.bin; the others are NAME_train_000001.bin and so on. A document that
does not fit is split, so that every shard but the last is full.

convert takes, and tells apart by their first bytes,
    .npy   a NumPy array of integers
    LLM.Q's token files ("BIN.TOK", version 2); masks in them are left out
    others: uint16 without a header, as nanoGPT's prepare.py writes them

An interrupted run goes on when the same command is given again, and its shards are, byte for byte,
those of a run never interrupted. Standard library only, but for pyarrow (.parquet).
"""

import argparse
import array
import ast
import fcntl
import glob
import importlib
import json
import os
import re
import shlex
import stat
import struct
import sys
import time
import zlib

FORMATS = {"H": (20240520, 1), "I": (20240801, 7)}  # tokens' type in arrays -> the header's first two words
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKENS = 2**31 - 1  # a shard's: the header holds the count as int32

# Text of a large file is read and tokenized in pieces of about so many bytes.
PIECE_BYTES = 1 << 16


class DataError(Exception):
    """What was expected, what was found and what to do, in one line for the user."""


def import_or_explain(module, package):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"cannot import {module} ({error}): pip install {package}") from None


# ------------------------------------------------------------------------------------------------
# Paths and globs, as the trainers take them


def path_argument(text):
    """An argument that is a path: an error where it is not there and has what a shell expands outside quotes. ./PATH is taken as it is."""
    if text.startswith("./") or os.path.exists(text):
        return text
    left = "which the shell has not expanded, in quotes or behind =; use:"
    if re.match(r"~$|~[^/]*/", text):
        name, slash, rest = text.partition("/")
        raise argparse.ArgumentTypeError(f"expected a path, found {text!r} with a ~, {left} {name}{slash}{rest and shlex.quote(rest)}")
    if re.search(r"\$[A-Za-z_{(]", text):
        raise argparse.ArgumentTypeError(f'expected a path, found {text!r} with a $, {left} "{text}"')
    if re.search(r"\{[^}]*(,|\.\.)[^}]*\}", text):
        raise argparse.ArgumentTypeError(f"expected a path, found {text!r} with {{}}, {left} {expandable(text)}")
    return text


def expandable(text):
    """A path as a shell expands it: my\\ texts/{a,b}*.txt"""
    return re.sub(r"([ \t'\"\\`()<>|&;!#])", r"\\\1", text)


def glob_argument(text):
    """An argument that is a path or a glob: the list of its files. What a glob meets that holds no data is passed over, and said."""
    if text == "-" or os.path.exists(text) or not glob.has_magic(text):
        return [path_argument(text)]
    names = glob_matches(text)
    if not names:
        path_argument(text)
    if "/**" in "/" + text:
        command = f"ln -sr {expandable(text)} DIR"
        raise argparse.ArgumentTypeError(f"{text!r} goes one folder deep, as ** is no more than * here; use: mkdir DIR && bash -O globstar"
                                         f" -c {shlex.quote(command)}, and 'DIR/*'")
    if not names:
        raise argparse.ArgumentTypeError(f"the glob {text!r} matches no file; correct it")
    files, seen, passed_over = [], {}, []
    for name in names:
        why = passed_over_as(name, seen)
        if why:
            passed_over.append(f"{name} ({why})")
        else:
            files.append(name)
    told = ", ".join(passed_over[:3]) + (f" and {len(passed_over) - 3} more" if len(passed_over) > 3 else "")
    if not files:
        raise argparse.ArgumentTypeError(f"expected data in {text!r}, found {told}; give another glob")
    if passed_over:
        print(f"note: {text!r} passes over {told}", file=sys.stderr)
    return files


def glob_matches(text):
    """A glob's files and folders in the order of their names' bytes. Leading folders that are there by these very names match
    only themselves."""
    literal = 0
    while (slash := text.find("/", literal)) >= 0 and os.path.exists(text[: slash + 1]):
        literal = slash + 1
    return sorted(glob.glob(glob.escape(text[:literal]) + text[literal:]), key=os.fsencode)


def passed_over_as(name, seen):
    """Why a glob does not take a file, "" for one that it takes. What cannot be read has data, and is refused later."""
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            return "a folder"
        if not stat.S_ISREG(status.st_mode):
            return "no file"
        if status.st_size == 0:
            return "empty"
        first = seen.setdefault((status.st_dev, status.st_ino), name)
        if first != name:
            return f"a link to {first}, counted once"
        with open(name, "rb") as file:
            head = file.read(64)
    except OSError:
        return ""
    own = head.startswith((b"KEEL\1", b"step,loss,val_loss,", b"step,hops,", b"step,sublayer,", b"sublayer,kind,"))
    base = os.path.basename(name)
    own = own or (base == "lock" and head.startswith(b"process "))
    own = own or (base.endswith("_progress.json") and head.startswith(b'{\n "settings"'))
    return "a run's own" if own else ""


def globbed(names):
    """The files of the command line's paths and globs, in the order given."""
    return [name for files in names for name in files]


# ------------------------------------------------------------------------------------------------
# Files


def little_endian(integers):
    if sys.byteorder == "big":
        integers = integers[:]
        integers.byteswap()
    return integers


def header_bytes(count, typecode):
    return little_endian(array.array("i", [*FORMATS[typecode], count] + [0] * (HEADER_INTS - 3))).tobytes()


def read_header(path):
    """Return a shard's (token count, tokens' type in arrays), after checking that the file is a whole shard."""
    with open(path, "rb") as file:
        header = array.array("i", file.read(HEADER_BYTES)[: HEADER_BYTES // 4 * 4])
        size = os.fstat(file.fileno()).st_size
    if size < HEADER_BYTES:
        raise DataError(f"{path}: expected a header of {HEADER_BYTES} bytes, the file has {size}")
    magic, version, count = little_endian(header)[:3]
    typecode = next((code for code, start in FORMATS.items() if start == (magic, version)), None)
    if typecode is None:
        expected = " or ".join(f"{magic}, {version}" for magic, version in FORMATS.values())
        raise DataError(f"{path}: not a token shard: expected {expected} at its start, found {magic}, {version}")
    needed = HEADER_BYTES + array.array(typecode).itemsize * count
    if size != needed:
        raise DataError(f"{path}: {count} tokens need {needed} bytes, the file has {size}: write it again")
    return count, typecode


def read_shard(path, count=None):
    """Return the first `count` tokens of a shard (all of them for None) as array('H') or array('I')."""
    total, typecode = read_header(path)
    tokens = array.array(typecode)
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        tokens.fromfile(file, total if count is None else min(count, total))
    return little_endian(tokens)


def sync_folder(folder):
    """A rename survives a power failure once its folder is on the disk."""
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path, data):
    """Write a small file so that at any moment either the old or the new one is there, whole."""
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except BaseException:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise
    sync_folder(os.path.dirname(path))


def fingerprint(path):
    """What tells an input that was exchanged: name, size and CRC-32 of the first and last MiB.

    Not the time of change, so that a copied or fetched-again file is the same one.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        crc = zlib.crc32(file.read(1 << 20), crc)
    if size == 0:
        raise DataError(f"{path}: the file is empty; leave it out")
    return [os.path.basename(path), size, crc]


# ------------------------------------------------------------------------------------------------
# Documents


def fingerprints(paths):
    """[fingerprint] of files; standard input has none, and only its name stands for it."""
    return [["-", 0, 0] if path == "-" else fingerprint(path) for path in paths]


# What people have beside UTF-8: its first bytes, where they stand, name, and the command that helps; the trainers' are in keel/formats.h.
FOREIGN = [
    (b"\xff\xfe\0\0", 0, "UTF-32", "iconv -f UTF-32 -t UTF-8 FILE > text.txt"),
    (b"\xff\xfe", 0, "UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > text.txt"),
    (b"\xfe\xff", 0, "UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > text.txt"),
    (b"\x1f\x8b", 0, "gzip", "gzip -dc FILE > text.txt"),
    (b"BZh91AY&SY", 0, "bzip2", "bzip2 -dc FILE > text.txt"),
    (b"\xfd7zXZ", 0, "xz", "xz -dc FILE > text.txt"),
    (b"\x28\xb5\x2f\xfd", 0, "Zstandard", "zstd -dc FILE > text.txt"),
    (b"PK\3\4", 0, "zip", "unzip FILE"),
    (b"ustar", 257, "tar", "tar -xf FILE"),
    (b"%PDF-", 0, "PDF", "pdftotext FILE"),
]


def refuse_foreign(path, head):
    """An error where the first bytes of a text are none."""
    for start, at, name, command in FOREIGN:
        if head[at:].startswith(start):
            inner = next((ending for ending in (".jsonl", ".parquet", ".tar") if os.path.splitext(path)[0].endswith(ending)), ".txt")
            command = command.replace(".txt", inner if "-dc" in command else ".txt").replace("FILE", file_word(path))
            raise DataError(f"{path}: expected UTF-8 text, found {name}; use: {command}")
    zero = head.find(b"\0")
    if zero >= 0 and (utf16 := unmarked_utf16(head)):
        raise DataError(f"{path}: expected text, found a zero byte at offset {zero}, as in UTF-16; use: iconv -f {utf16} -t UTF-8"
                        f" {file_word(path)} > text.txt")


def file_word(path):
    return "FILE" if path == "standard input" else shlex.quote(path)


def unmarked_utf16(head):
    """iconv's name of UTF-16 without a mark at its start, "" for what is none: by the zero byte of its blanks and line ends, as Chinese
    has zero bytes on the other side too, or where it has no blanks by that of its ASCII."""
    units = len(head) // 2
    first, second = head[0 : 2 * units : 2], head[1 : 2 * units : 2]
    for counted, least in (b" \n\r", len(head) // 1000), (bytes(range(1, 128)), len(head) // 10):
        big = sum(not a and b in counted for a, b in zip(first, second))
        little = sum(not b and a in counted for a, b in zip(first, second))
        if max(big, little) >= max(1, least):
            return "UTF-16LE" if little > big else "UTF-16BE"
    return ""


def read_pieces(paths, sizes, start=0, fetch=lambda path: path, field="text", any_bytes=False, jsonl=False):
    """Yield (UTF-8 bytes, whether a document begins, share of the input read) for each piece from number `start` on.

    A piece is a document or, of a large text file, a part that last_boundary() says can be tokenized alone.
    fetch(path) returns where the file lies; it is called when the file's turn comes. any_bytes: text need not be
    UTF-8. jsonl: - (standard input) holds a document a line.
    """
    total, before = max(sum(sizes), 1), 0
    for path, size in zip(paths, sizes):
        local = fetch(path)
        if local.lower().endswith(".parquet"):
            pieces = read_parquet(local, start, field)
        elif local == "-":
            file = sys.stdin.buffer
            name = "standard input"
            pieces = read_jsonl(file, name, 0, start, field) if jsonl else read_text(file, name, 0, start, any_bytes)
        else:
            pieces = read_file(local, size, start, field, any_bytes)
        # A reader yields None for a piece that `start` skips: counted, but neither decoded nor tokenized.
        for text, opens, share in pieces:
            if start > 0:
                start -= 1
            else:
                yield text, opens, (before + share * size) / total
        before += size


def read_file(path, size, skip, field, any_bytes):
    with open(path, "rb") as file:
        yield from read_jsonl(file, path, size, skip, field) if path.lower().endswith((".jsonl", ".ndjson")) else read_text(file, path, size, skip, any_bytes)


def last_boundary(text):
    """The last place in UTF-8 bytes where no split has a piece reach over, 0 where there is none.

    That is behind a line end between two characters that are not white space: it ends a piece in every split, whether
    text follows or not. For text with other line ends, or none, also before a space behind such a character. Python's white space
    is a little more than that of the splits, so every place is one of theirs.
    """
    for mark, length in (b"\n", 1), (b" ", 0):
        place = text.rfind(mark, 1)
        while place > 0:
            # At most four bytes are a character; a part of one at the far end is ignored.
            before = text[max(0, place - 4) : place].decode(errors="ignore")[-1:]
            after = text[place + 1 : place + 5].decode(errors="ignore")[:1] if length else "x"
            if before and after and not before.isspace() and not after.isspace():
                return place + length
            place = text.rfind(mark, 1, place)
    return 0


def read_text(file, path, size, skip, any_bytes):
    rest, position, opens = b"", 0, True
    while True:
        block = file.read(max(PIECE_BYTES, len(rest)))  # twice as much where there was no cut: never quadratic
        text = rest + block
        if position == 0 and not rest:
            refuse_foreign(path, block)
        cut = last_boundary(text) if block else len(text)
        piece, rest = text[:cut], text[cut:]
        if skip > 0 and piece:
            skip -= 1
            yield None, opens, 0.0
        elif piece:
            if (zero := piece.find(b"\0")) >= 0:
                raise DataError(f"{path}: expected text, found a zero byte at offset {position + zero}: leave it out, or make text of it")
            try:
                any_bytes or piece.decode()
            except UnicodeDecodeError as error:
                if not block and error.reason == "unexpected end of data":
                    raise DataError(f"{path}: not UTF-8: it ends within a character: fetch it again, or cut that off: head -c"
                                    f" {position + error.start} {file_word(path)} > text.txt") from None
                raise DataError(f"{path}: not UTF-8: byte 0x{piece[error.start]:02x} at offset {position + error.start}:"
                                " leave it out if it is no text, else convert it (iconv -f latin1 -t utf-8, or from whatever it is)") from None
            yield piece, opens, (position + cut) / size if size else 0.0
        position += cut
        opens = opens and not piece
        if not block:
            break
    if position == 0:
        raise DataError(f"{path}: no text")


def read_jsonl(file, path, size, skip, field):
    position = 0
    for number, line in enumerate(file, 1):
        if number == 1:
            refuse_foreign(path, line)
        position += len(line)
        if not line.strip():
            continue
        share = position / size if size else 0.0
        if skip > 0:
            skip -= 1
            yield None, True, share
            continue
        try:
            text = json.loads(line)[field].encode("utf-8", "replace")  # a lone surrogate becomes '?'
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f'{path}: line {number}: expected a JSON object with a string "{field}", found {line[:60]!r}') from None
        yield text, True, share


def read_parquet(path, skip, field):
    parquet = import_or_explain("pyarrow.parquet", "pyarrow")
    try:
        file = parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise DataError(f'{path}: expected a column "{field}", found {", ".join(file.schema_arrow.names)}')
        row, rows = 0, file.metadata.num_rows
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if skip >= count:
                texts = [None] * count
            else:
                texts = file.read_row_group(group, columns=[field]).column(field).to_pylist()
            skip = max(0, skip - count)
            for text in texts:
                row += 1
                yield (text or "").encode("utf-8", "replace"), True, row / rows
    except ValueError as error:  # what pyarrow raises for a file that is broken or none of its own
        raise DataError(f"{path}: not a parquet file that can be read ({error}): fetch it again") from None


# ------------------------------------------------------------------------------------------------
# Writer


class ShardWriter:
    """Writes pieces' tokens to PREFIX_val_000000.bin, PREFIX_train_000001.bin, ..., resumably.

    PREFIX_progress.json says at which piece and token the last whole shard ends. At a border
      1. the shard is complete and synced as NAME.bin.tmp,
      2. the progress file that counts it replaces the one before,
      3. the shard is renamed to NAME.bin;
    a run killed between 2 and 3 is completed by the next one, and a shard that the progress file does not
    count is none of ours, so it stops the run rather than being overwritten.

    A shard is closed only when a token comes that it has no room for, so no shard is ever empty.
    val_tokens 0: no validation shard. typecode: the tokens' in arrays. tokenizer: content of a file tokenizer.bin, which
    lies in the folder from the first shard on; another one there stops the run.
    """

    def __init__(self, folder, prefix, shard_tokens, val_tokens, settings, typecode="H", tokenizer=None):
        if os.path.basename(prefix) != prefix or not prefix:
            raise DataError(f"--prefix {prefix!r}: expected a file name's first part, without a folder")
        self.folder, self.prefix = folder, prefix
        self.shard_tokens, self.val_tokens = shard_tokens, val_tokens
        self.typecode, self.tokenizer = typecode, tokenizer
        self.settings = json.loads(json.dumps(settings | {"shard_tokens": shard_tokens, "val_tokens": val_tokens}))
        self.progress_path = os.path.join(folder, prefix + "_progress.json")
        self.file = None  # the shard being written
        self.room = 0  # tokens that still fit in it
        self.shards = 0  # whole ones
        self.tokens = 0  # in all shards
        self.pieces = 0  # whose tokens are all in
        self.piece_tokens = 0  # of the next piece, already in
        self.finished = False
        os.makedirs(folder, exist_ok=True)
        self.lock()
        try:
            self.load_progress()
            self.refuse_others()
        except BaseException:
            self.close()
            raise

    def lock(self):
        self.lock_descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock_descriptor)
            raise DataError(f"{self.folder}: another run is writing there: wait for it, or choose another folder") from None
        except OSError:
            pass  # some network file systems have no locks

    def path(self, shard):
        """Of the shard-th one, from 0 on."""
        number = shard if self.val_tokens else shard + 1
        kind = "train" if number else "val"
        return os.path.join(self.folder, f"{self.prefix}_{kind}_{number:06d}.bin")

    def capacity(self, shard):
        return self.val_tokens if shard == 0 and self.val_tokens else self.shard_tokens

    def load_progress(self):
        try:
            with open(self.progress_path, encoding="utf-8") as file:
                progress = json.load(file)
            stored = dict(progress["settings"])
            self.shards, self.tokens = progress["shards"], progress["tokens"]
            self.pieces, self.piece_tokens = progress["pieces"], progress["piece_tokens"]
            self.finished = progress["finished"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.progress_path}: not a progress file of ours: remove it and its shards to start again") from None
        for name in sorted(stored.keys() | self.settings.keys()):
            if stored.get(name) != self.settings.get(name):
                raise DataError(
                    f"{self.progress_path}: the run there has {name} {brief(stored.get(name))}, this one"
                    f" {brief(self.settings.get(name))}: use the same, another --prefix, or remove"
                    f" {os.path.join(self.folder, self.prefix)}_*"
                )
        last = self.path(self.shards - 1)
        if not os.path.exists(last) and os.path.exists(last + ".tmp"):
            read_header(last + ".tmp")
            os.replace(last + ".tmp", last)
            sync_folder(self.folder)
        for shard in range(self.shards):
            count, _ = read_header(self.path(shard))
            if count != self.capacity(shard) and not (self.finished and shard == self.shards - 1):
                raise DataError(f"{self.path(shard)}: expected {self.capacity(shard)} tokens, found {count}: remove"
                                f" {os.path.join(self.folder, self.prefix)}_* to start again")

    def save_progress(self):
        progress = {
            "settings": self.settings,
            "shards": self.shards,
            "tokens": self.tokens,
            "pieces": self.pieces,
            "piece_tokens": self.piece_tokens,
            "finished": self.finished,
        }
        write_whole(self.progress_path, (json.dumps(progress, indent=1) + "\n").encode())

    def refuse_others(self):
        path = os.path.join(self.folder, "tokenizer.bin")
        if self.tokenizer is not None and os.path.exists(path):
            with open(path, "rb") as file:
                if file.read() != self.tokenizer:
                    raise DataError(f"{path} is another vocabulary than this run's: choose another folder, or encode with -t {path}")
        name = re.compile(re.escape(self.prefix) + r"_(val|train)_\d{6,}\.bin")
        ours = {os.path.basename(self.path(shard)) for shard in range(self.shards)}
        for found in sorted(os.listdir(self.folder)):
            if name.fullmatch(found) and found not in ours:
                raise DataError(f"{os.path.join(self.folder, found)} exists, and no progress file counts it:"
                                " remove it, or choose another --prefix or folder")

    def add(self, tokens):
        """Append the next piece's tokens, an array of the writer's typecode. After a resume, `pieces` says which is the next."""
        if self.piece_tokens > len(tokens):
            raise self.changed_input()
        rest = memoryview(little_endian(tokens))[self.piece_tokens :]
        while len(rest):
            if self.room == 0:
                if self.file:
                    self.close_shard()
                self.open_shard()
            piece = rest[: self.room]
            self.file.write(piece)
            rest = rest[len(piece) :]
            self.room -= len(piece)
            self.tokens += len(piece)
            self.piece_tokens += len(piece)
        self.pieces += 1
        self.piece_tokens = 0

    def changed_input(self):
        return DataError(f"{self.progress_path}: piece {self.pieces} of the text is shorter than it was, or missing: the input"
                         f" has changed; remove {os.path.join(self.folder, self.prefix)}_* to start again")

    def open_shard(self):
        self.file = open(self.path(self.shards) + ".tmp", "wb", buffering=1 << 20)
        self.file.write(bytes(HEADER_BYTES))
        self.room = self.capacity(self.shards)

    def close_shard(self):
        path, count = self.path(self.shards), self.capacity(self.shards) - self.room
        self.file.seek(0)
        self.file.write(header_bytes(count, self.typecode))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        if self.shards == 0 and self.tokenizer is not None:
            write_whole(os.path.join(self.folder, "tokenizer.bin"), self.tokenizer)
        self.shards += 1
        self.save_progress()
        os.replace(path + ".tmp", path)
        sync_folder(self.folder)

    def finish(self):
        """Close the last shard, which need not be full."""
        if self.file is None and self.shards > 0:
            raise self.changed_input()
        if self.tokens == 0:
            raise DataError("the files have no documents; give text")
        if self.file is None or (self.shards == 0 and self.val_tokens):
            raise DataError(f"the text has {self.tokens} tokens, all of them in the validation shard of {self.val_tokens}:"
                            " no training shard; give more text or a smaller --val-tokens")
        self.finished = True
        self.close_shard()

    def close(self):
        """Give up the unfinished shard, if any; whole ones and the progress file stay."""
        if self.file:
            try:
                self.file.close()
            except OSError:
                pass  # the disk is full: what could not be written is given up here anyway
            os.remove(self.path(self.shards) + ".tmp")
            self.file = None
        if self.lock_descriptor is not None:
            os.close(self.lock_descriptor)
            self.lock_descriptor = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def brief(value):
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


class ProgressLine:
    """On a terminal a line that is redrawn; elsewhere, as in a job's log, a line every ten seconds."""

    def __init__(self):
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.text = 0  # bytes, of this run
        self.first = None  # share where this run began

    def show(self, writer, text, share, end=False):
        """text: bytes more than at the last call; share of the input: 0 to 1, 0 for unknown."""
        now = time.monotonic()
        self.text += text
        if self.first is None:
            self.first = share
        if not end and now - self.last < (0.5 if self.terminal else 10.0):
            return
        self.last = now
        seconds = max(now - self.start, 1e-9)
        line = (f"{self.text / 1e6:,.1f} MB of text, {self.text / 1e6 / seconds:,.2f} MB/s, {writer.tokens:,} tokens,"
                f" {writer.shards} shards")
        if end:
            line += f", done in {duration(seconds)}"
        elif share > self.first:
            line += f", {100 * share:.1f} %, {duration(seconds / (share - self.first) * (1 - share))} left"
        if self.terminal:
            sys.stderr.write("\r\033[K" + line + ("\n" if end else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def duration(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def write_shards(folder, prefix, shard_tokens, val_tokens, settings, pieces, typecode, tokenizer=None):
    """Write pieces' tokens, going on where an earlier run with the same settings stopped.

    settings: what names the input; pieces(start): iterator of (tokens, bytes of text, share of the input read).
    """
    global goes_on
    goes_on = ["-", 0, 0] not in settings.get("inputs", [])
    with ShardWriter(folder, prefix, shard_tokens, val_tokens, settings, typecode, tokenizer) as writer:
        if (writer.shards or writer.finished) and not goes_on:
            raise DataError(f"{writer.progress_path}: a run from standard input cannot be gone on with, nor told from this one:"
                            f" choose another --prefix, or remove {os.path.join(folder, prefix)}_*")
        if writer.finished:
            print(f"{os.path.join(folder, prefix)}_*: complete already, {writer.tokens:,} tokens in {writer.shards} shards",
                  file=sys.stderr)
            return
        if writer.shards:
            print(f"going on after shard {writer.shards}, {writer.tokens:,} tokens", file=sys.stderr)
        progress = ProgressLine()
        for tokens, text, share in pieces(writer.pieces):
            writer.add(tokens)
            progress.show(writer, text, share)
        writer.finish()
        progress.show(writer, 0, 1.0, end=True)


# ------------------------------------------------------------------------------------------------
# Others' token files


def token_file(path):
    """Return (offset of the first token in bytes, tokens' type in arrays, number of tokens) of another program's token file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(1024)
        if start[:4] in [struct.pack("<i", magic) for magic, _ in FORMATS.values()]:
            raise DataError(f"{path}: a shard of ours already: it needs no convert")
        if start[:8] == b"BIN.TOK\n" and len(start) == 1024:
            version, width, count, _, masks = struct.unpack_from("<5i", start, 8)
            if (version, width) != (2, 4):
                raise DataError(f"{path}: LLM.Q's token files of version 2 and 4 bytes a token are expected, found {version} and {width}")
            if masks:
                print(f"{path}: its masks are left out", file=sys.stderr)
            offset, typecode = 1024, "i"
        elif start[:6] == b"\x93NUMPY":
            offset, typecode, count = numpy_header(file, path)
        else:
            offset, typecode, count = 0, "H", size // 2
            if size % 2:
                raise DataError(f"{path}: uint16 tokens without a header are expected, found an odd number of bytes, {size}")
    if size < offset + count * array.array(typecode).itemsize:
        raise DataError(f"{path}: {count} tokens are expected behind byte {offset}, the file has only {size} bytes")
    return offset, typecode, count


def numpy_header(file, path):
    try:
        file.seek(6)
        version = file.read(2)[0]
        length, = struct.unpack("<H" if version == 1 else "<I", file.read(2 if version == 1 else 4))
        header = ast.literal_eval(file.read(length).decode())
        count = 1
        for extent in header["shape"]:
            count *= extent
        typecode = {"u1": "B", "u2": "H", "i2": "h", "u4": "I", "i4": "i", "u8": "Q", "i8": "q"}.get(header["descr"].lstrip("<|"))
    except (ValueError, SyntaxError, KeyError, TypeError, AttributeError, IndexError, struct.error):
        raise DataError(f"{path}: not a NumPy file that can be read") from None
    if typecode is None or header["fortran_order"]:
        raise DataError(f"{path}: a NumPy array of little-endian integers in C's order is expected, found {brief(header['descr'])}")
    return file.tell(), typecode, count


def read_token_file(path):
    """Yield its tokens, in arrays of at most 2^18."""
    offset, typecode, count = token_file(path)
    with open(path, "rb") as file:
        file.seek(offset)
        while count:
            tokens = array.array(typecode)
            tokens.fromfile(file, min(count, 1 << 18))
            count -= len(tokens)
            yield little_endian(tokens)


def convert(args):
    inputs, largest = fingerprints(args.files), 0
    for path in args.files:
        for tokens in read_token_file(path):
            low, high = min(tokens), max(tokens)
            if low < 0 or high > MAX_TOKENS:
                raise DataError(f"{path}: tokens from 0 to {MAX_TOKENS} are expected, found {low if low < 0 else high}")
            largest = max(largest, high)
    typecode = "H" if largest < 1 << 16 else "I"

    def pieces(start):
        total, done = sum(token_file(path)[2] for path in args.files), 0
        for path in args.files:
            for tokens in read_token_file(path):
                done += len(tokens)
                if start > 0:
                    start -= 1
                else:
                    yield array.array(typecode, tokens), 0, done / total

    write_shards(args.out, args.prefix, args.shard_tokens, args.val_tokens, {"converted": inputs}, pieces, typecode)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message + "; -h lists the options")


def fail(message):
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {one_line(message)}")


def one_line(message):
    return " ".join(str(message).split())


def natural(text, least=0):
    value = int(text) if text.isascii() and text.isdigit() else -1
    if not least <= value <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"expected a number from {least} to {MAX_TOKENS}, found {text!r}")
    return value


def positive(text):
    return natural(text, 1)


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def add_writer_options(parser, folder=None, prefix="", val_tokens=0):
    """The defaults; a folder that has none must be given. val_tokens None: as many as a shard."""
    shown = f" (default: {folder})" if folder else ""
    parser.add_argument("-o", "--out", metavar="DIR", type=path_argument, default=folder, required=folder is None, help="folder of the shards" + shown)
    parser.add_argument("--prefix", metavar="NAME", default=prefix,
                        help="first part of the shards' names (default: %(default)s)")
    parser.add_argument("--shard-tokens", metavar="N", type=positive, default=100_000_000, help="tokens a shard (default: %(default)s)")
    parser.add_argument("--val-tokens", metavar="N", type=natural, default=val_tokens,
                        help="tokens of the first shard, for validation; 0: no such shard"
                        f" (default: {'as a shard' if val_tokens is None else val_tokens})")


goes_on = False  # whether the same command, after an interruption, does


def run(main):
    """Call main; what the user can put right becomes one line on stderr and exit status 1."""
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # special tokens have any characters, a terminal perhaps not
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough; stdout's own flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except IsADirectoryError as error:
        fail(f"{error.filename}: expected a file, found a folder; name its files: {shlex.quote(os.path.join(error.filename, '*'))}")
    except (DataError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted" + (": the same command goes on at the last whole shard" if goes_on else ""))


def show(path, count):
    total, typecode = read_header(path)
    magic, version = FORMATS[typecode]
    print(f"{path}: magic {magic}, version {version}, {total:,} tokens, {os.path.getsize(path):,} bytes")
    print("first tokens:", ", ".join(map(str, read_shard(path, count))))


def main():
    converting = sys.argv[1:2] == ["convert"]
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if converting:
        parser.prog += " convert"
        parser.add_argument("files", metavar="FILES", type=glob_argument, nargs="+", help="others' token files, in the order of their tokens")
        add_writer_options(parser, prefix="tokens")
        args = parser.parse_args(sys.argv[2:])
        args.files = globbed(args.files)
        convert(args)
    else:
        parser.add_argument("file", metavar="FILE.bin", type=path_argument, help="a shard")
        parser.add_argument("--count", metavar="N", type=positive, default=16, help="print the first N tokens (default: %(default)s)")
        args = parser.parse_args()
        show(args.file, args.count)


if __name__ == "__main__":
    run(main)
