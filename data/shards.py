#!/usr/bin/env python3
"""Token shards: tokenize documents and write them in llm.c's .bin format; look into such files.

    python3 data/shards.py -o DIR --prefix NAME [--tokenizer gpt2|bytes] FILES...
    python3 data/shards.py --info FILE.bin
    python3 data/shards.py --decode FILE.bin [--count N]
    python3 data/shards.py --encode "text"              ids, separated by commas
    python3 data/shards.py --decode-ids 1,2,3           text; '-' reads the ids from stdin

FILES: a .jsonl file holds a document a line, in the field "text"; a .parquet file (needs pyarrow) a
document a row, in the column "text"; any other file is one document of UTF-8 text, read whole.

A shard is 256 int32 (20240520, 1, number of tokens, zeros), then the tokens as uint16, all
little-endian. The first is NAME_val_000000.bin, for validation; the others are
NAME_train_000001.bin and so on. A document that does not fit is split, so that every shard but the last is full.

Tokenizers:
    gpt2   tiktoken's, 50257 ids; <|endoftext|> (50256) stands before each document.
    bytes  each byte of the UTF-8 text is a token. A newline closes a document that does not end in
           one: documents stay apart without an id that no text holds, and a text file's tokens are its bytes.

An interrupted run goes on when the same command is given again, and its shards are, byte for byte,
those of a run never interrupted. Standard library only, except for tiktoken (gpt2) and pyarrow (.parquet).
"""

import argparse
import array
import collections
import concurrent.futures
import fcntl
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import zlib

MAGIC, VERSION = 20240520, 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKENS = 2**31 - 1  # a shard's: the header holds the count as int32

# Text that goes to a worker process at once: enough that the transfer costs little beside the tokenizing.
BATCH_BYTES = 1 << 18


class DataError(Exception):
    """What was expected, what was found and what to do, in one line for the user."""


def import_or_explain(module, package):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"cannot import {module} ({error}): pip install {package}") from None


# ------------------------------------------------------------------------------------------------
# Files


def little_endian(integers):
    if sys.byteorder == "big":
        integers = integers[:]
        integers.byteswap()
    return integers


def header_bytes(count):
    return little_endian(array.array("i", [MAGIC, VERSION, count] + [0] * (HEADER_INTS - 3))).tobytes()


def read_header(path):
    """Return a shard's token count, after checking that the file is a whole shard."""
    with open(path, "rb") as file:
        header = array.array("i", file.read(HEADER_BYTES)[: HEADER_BYTES // 4 * 4])
        size = os.fstat(file.fileno()).st_size
    if size < HEADER_BYTES:
        raise DataError(f"{path}: expected a header of {HEADER_BYTES} bytes, the file has {size}")
    header = little_endian(header)
    if header[0] != MAGIC or header[1] != VERSION:
        raise DataError(f"{path}: not a token shard: expected {MAGIC}, {VERSION} at its start, found {header[0]}, {header[1]}")
    if size != HEADER_BYTES + 2 * header[2]:
        raise DataError(f"{path}: {header[2]} tokens need {HEADER_BYTES + 2 * header[2]} bytes, the file has {size}: write it again")
    return header[2]


def read_shard(path, count=None):
    """Return the first `count` tokens of a shard (all of them for None) as array('H')."""
    total = read_header(path)
    tokens = array.array("H")
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
# Tokenizers: document() for training data, encode() and decode() for prompts and samples


class BytesTokenizer:
    ids = 256

    def document(self, text):
        """(n,) UTF-8 bytes -> array('H') of n or n+1 tokens"""
        if not text.endswith(b"\n"):
            text += b"\n"
        wide = bytearray(2 * len(text))  # each byte zero-extended to a little-endian uint16
        wide[::2] = text
        return little_endian(array.array("H", bytes(wide)))

    def encode(self, text):
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, ids):
        return bytes(ids)  # of a list: bytes() of an array would be its memory


class Gpt2Tokenizer:
    ids = 50257

    def __init__(self):
        tiktoken = import_or_explain("tiktoken", "tiktoken")
        try:  # the first use fetches the vocabulary, by a library whose errors are not OSErrors
            self.encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:
            raise DataError(
                f"tiktoken cannot load its gpt2 vocabulary ({one_line(error)}): its first use needs the network,"
                " or TIKTOKEN_CACHE_DIR set to a folder that holds it"
            ) from None

    def document(self, text):
        """UTF-8 bytes -> array('H'), <|endoftext|> first; in the text itself that string is ordinary text"""
        tokens = array.array("H", [self.encoding.eot_token])
        tokens.extend(array.array("H", self.encoding.encode_ordinary(text.decode())))
        return tokens

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"})

    def decode(self, ids):
        return self.encoding.decode_bytes(ids)


TOKENIZERS = {"gpt2": Gpt2Tokenizer, "bytes": BytesTokenizer}


def print_decoded(name, ids):
    tokenizer = TOKENIZERS[name]()
    if max(ids, default=0) >= tokenizer.ids:
        raise DataError(f"token {max(ids)} is not one of {name}'s, 0 to {tokenizer.ids - 1}: choose another --tokenizer")
    for start in range(0, len(ids), 1 << 20):  # in pieces, as a list of Python integers takes 20 times a shard's memory
        sys.stdout.buffer.write(tokenizer.decode(list(ids[start : start + (1 << 20)])))


# ------------------------------------------------------------------------------------------------
# Documents


def read_documents(paths, sizes, start=0, fetch=lambda path: path, ignore_encoding=False):
    """Yield (text as UTF-8 bytes, share of the input read) for each document from number `start` on.

    fetch(path) returns where the file lies; it is called when the file's turn comes.
    """
    total, before = sum(sizes), 0
    for path, size in zip(paths, sizes):
        local = fetch(path)
        if local.endswith(".jsonl"):
            reader = read_jsonl
        elif local.endswith(".parquet"):
            reader = read_parquet
        else:
            reader = read_text
        # A reader yields None for a document that `start` skips: counted, but neither decoded nor tokenized.
        for text, share in reader(local, start, ignore_encoding):
            if start > 0:
                start -= 1
            else:
                yield text, (before + share * size) / total
        before += size


def read_text(path, skip, ignore_encoding):
    if skip:
        yield None, 1.0
        return
    with open(path, "rb") as file:
        text = file.read()
    if not ignore_encoding:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start}; convert it (iconv), or --tokenizer bytes"
            ) from None
    yield text, 1.0


def read_jsonl(path, skip, ignore_encoding):
    size, position = os.path.getsize(path), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if not line.strip():
                continue
            if skip > 0:
                skip -= 1
                yield None, position / size
                continue
            try:
                text = json.loads(line)["text"].encode("utf-8", "replace")  # a lone surrogate becomes '?'
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f'{path}: line {number}: expected a JSON object with a string "text", found {line[:60]!r}') from None
            yield text, position / size


def read_parquet(path, skip, ignore_encoding):
    parquet = import_or_explain("pyarrow.parquet", "pyarrow")
    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise DataError(f'{path}: expected a column "text", found {", ".join(file.schema_arrow.names)}')
        row, rows = 0, file.metadata.num_rows
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if skip >= count:
                texts = [None] * count
            else:
                texts = file.read_row_group(group, columns=["text"]).column("text").to_pylist()
            skip = max(0, skip - count)
            for text in texts:
                row += 1
                yield (text or "").encode("utf-8", "replace"), row / rows
    except ValueError as error:  # what pyarrow raises for a file that is broken or none of its own
        raise DataError(f"{path}: not a parquet file that can be read ({error}): fetch it again") from None


def tokenize(documents, name, workers):
    """Yield (tokens, share) for each of `documents`, in order, tokenized by `workers` processes."""
    if name == "bytes" or workers == 1:  # bytes: a worker would cost more than it saves
        tokenizer = TOKENIZERS[name]()
        for text, share in documents:
            yield tokenizer.document(text), share
        return
    # Spawned, not forked: a fork would inherit the lock on the output folder and hold it after the parent.
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (name,))
    try:
        pending = collections.deque()  # bounded, so that memory is too
        for texts, shares in batches(documents):
            pending.append((pool.submit(tokenize_batch, texts), shares))
            if len(pending) >= 3 * workers:
                future, shares = pending.popleft()
                yield from zip(future.result(), shares)
        while pending:
            future, shares = pending.popleft()
            yield from zip(future.result(), shares)
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a tokenizer process died (out of memory?): the same command goes on; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def batches(documents):
    texts, shares, size = [], [], 0
    for text, share in documents:
        texts.append(text)
        shares.append(share)
        size += len(text)
        if size >= BATCH_BYTES:
            yield texts, shares
            texts, shares, size = [], [], 0
    if texts:
        yield texts, shares


def start_worker(name):
    global worker_tokenizer
    worker_tokenizer = TOKENIZERS[name]()

    def exit_with_parent():  # a killed parent closes no queue: its workers would wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, in one line


def tokenize_batch(texts):
    return [worker_tokenizer.document(text) for text in texts]


# ------------------------------------------------------------------------------------------------
# Writer


class ShardWriter:
    """Writes documents' tokens to PREFIX_val_000000.bin, PREFIX_train_000001.bin, ..., resumably.

    PREFIX_progress.json says at which document and token the last whole shard ends. At a border
      1. the shard is complete and synced as NAME.bin.tmp,
      2. the progress file that counts it replaces the one before,
      3. the shard is renamed to NAME.bin;
    a run killed between 2 and 3 is completed by the next one, and a shard that the progress file does not
    count is none of ours, so it stops the run rather than being overwritten.

    A shard is closed only when a token comes that it has no room for, so no shard is ever empty.
    """

    def __init__(self, folder, prefix, shard_tokens, val_tokens, settings):
        if os.path.basename(prefix) != prefix or not prefix:
            raise DataError(f"--prefix {prefix!r}: expected a file name's first part, without a folder")
        self.folder, self.prefix = folder, prefix
        self.shard_tokens, self.val_tokens = shard_tokens, val_tokens
        self.settings = json.loads(json.dumps(settings | {"shard_tokens": shard_tokens, "val_tokens": val_tokens}))
        self.progress_path = os.path.join(folder, prefix + "_progress.json")
        self.file = None  # the shard being written
        self.room = 0  # tokens that still fit in it
        self.shards = 0  # whole ones
        self.tokens = 0  # in all shards
        self.documents = 0  # whose tokens are all in
        self.document_tokens = 0  # of the next document, already in
        self.finished = False
        os.makedirs(folder, exist_ok=True)
        self.lock()
        try:
            self.load_progress()
            self.refuse_other_shards()
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
        return os.path.join(self.folder, f"{self.prefix}_{'train' if shard else 'val'}_{shard:06d}.bin")

    def capacity(self, shard):
        return self.shard_tokens if shard else self.val_tokens

    def load_progress(self):
        try:
            with open(self.progress_path, encoding="utf-8") as file:
                progress = json.load(file)
            stored = dict(progress["settings"])
            self.shards, self.tokens = progress["shards"], progress["tokens"]
            self.documents, self.document_tokens = progress["documents"], progress["document_tokens"]
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
            count = read_header(self.path(shard))
            if count != self.capacity(shard) and not (self.finished and shard == self.shards - 1):
                raise DataError(f"{self.path(shard)}: expected {self.capacity(shard)} tokens, found {count}: remove"
                                f" {os.path.join(self.folder, self.prefix)}_* to start again")

    def save_progress(self):
        progress = {
            "settings": self.settings,
            "shards": self.shards,
            "tokens": self.tokens,
            "documents": self.documents,
            "document_tokens": self.document_tokens,
            "finished": self.finished,
        }
        write_whole(self.progress_path, (json.dumps(progress, indent=1) + "\n").encode())

    def refuse_other_shards(self):
        name = re.compile(re.escape(self.prefix) + r"_(val|train)_\d{6,}\.bin")
        ours = {os.path.basename(self.path(shard)) for shard in range(self.shards)}
        for found in sorted(os.listdir(self.folder)):
            if name.fullmatch(found) and found not in ours:
                raise DataError(f"{os.path.join(self.folder, found)} exists, and no progress file counts it:"
                                " remove it, or choose another --prefix or folder")

    def add(self, tokens):
        """Append the next document's tokens, an array('H'). After a resume, `documents` says which is the next."""
        if self.document_tokens > len(tokens):
            raise self.changed_input()
        rest = memoryview(little_endian(tokens))[self.document_tokens :]
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
            self.document_tokens += len(piece)
        self.documents += 1
        self.document_tokens = 0

    def changed_input(self):
        return DataError(f"{self.progress_path}: document {self.documents} is shorter than it was, or missing: the input"
                         f" has changed; remove {os.path.join(self.folder, self.prefix)}_* to start again")

    def open_shard(self):
        self.file = open(self.path(self.shards) + ".tmp", "wb", buffering=1 << 20)
        self.file.write(bytes(HEADER_BYTES))
        self.room = self.capacity(self.shards)

    def close_shard(self):
        path, count = self.path(self.shards), self.capacity(self.shards) - self.room
        self.file.seek(0)
        self.file.write(header_bytes(count))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        self.shards += 1
        self.save_progress()
        os.replace(path + ".tmp", path)
        sync_folder(self.folder)

    def finish(self):
        """Close the last shard, which need not be full."""
        if self.file is None and self.shards > 0:
            raise self.changed_input()
        if self.shards == 0:
            raise DataError(f"the documents have {self.tokens} tokens, all of them in the validation shard of {self.val_tokens}:"
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
        self.first = None  # (tokens, share) where this run began

    def show(self, writer, share, end=False):
        now = time.monotonic()
        if self.first is None:
            self.first = (writer.tokens, share)
        if not end and now - self.last < (0.5 if self.terminal else 10.0):
            return
        self.last = now
        seconds = max(now - self.start, 1e-9)
        tokens, done = writer.tokens - self.first[0], share - self.first[1]
        line = f"{writer.documents:,} documents, {writer.tokens:,} tokens, shard {writer.shards}, {tokens / seconds:,.0f} tokens/s"
        if end:
            line += f", done in {duration(seconds)}"
        elif done > 0:
            line += f", {100 * share:.1f} %, {duration(seconds / done * (1 - share))} left"
        if self.terminal:
            sys.stderr.write("\r\033[K" + line + ("\n" if end else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def duration(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def write_shards(folder, prefix, tokenizer, shard_tokens, val_tokens, workers, inputs, documents):
    """Tokenize and write all documents, going on where an earlier run with the same settings stopped.

    inputs: settings that name the input; documents(start): iterator of (text as UTF-8 bytes, share of the input read).
    """
    TOKENIZERS[tokenizer]()  # a missing package shows before anything is written
    with ShardWriter(folder, prefix, shard_tokens, val_tokens, {"tokenizer": tokenizer} | inputs) as writer:
        if writer.finished:
            print(f"{os.path.join(folder, prefix)}_*: complete already, {writer.documents:,} documents, {writer.tokens:,} tokens"
                  f" in {writer.shards} shards", file=sys.stderr)
            return
        if writer.shards:
            print(f"going on after shard {writer.shards - 1}, document {writer.documents:,}", file=sys.stderr)
        progress = ProgressLine()
        for tokens, share in tokenize(documents(writer.documents), tokenizer, workers):
            writer.add(tokens)
            progress.show(writer, share)
        writer.finish()
        progress.show(writer, 1.0, end=True)


def write_file_shards(args, files):
    """write_shards() for local files and the options of add_writer_options()."""
    inputs = [fingerprint(path) for path in files]
    sizes = [size for _, size, _ in inputs]
    ignore_encoding = args.tokenizer == "bytes"
    write_shards(
        args.out, args.prefix, args.tokenizer, args.shard_tokens, args.val_tokens or args.shard_tokens, args.workers,
        {"inputs": inputs}, lambda start: read_documents(files, sizes, start, ignore_encoding=ignore_encoding),
    )


# ------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message + "; -h lists the options")


def fail(message):
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {one_line(message)}")


def one_line(message):
    return " ".join(str(message).split())


def positive(text):
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= value <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_TOKENS}, found {text!r}")
    return value


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def add_writer_options(parser, folder=None, prefix=None, val_tokens=None):
    shown = f" (default: {folder})" if folder else ""
    parser.add_argument("-o", "--out", metavar="DIR", default=folder, help="folder of the shards" + shown)
    if prefix is None:
        parser.add_argument("--prefix", metavar="NAME", help="first part of the shards' names")
    else:
        parser.set_defaults(prefix=prefix)
    parser.add_argument("--shard-tokens", metavar="N", type=positive, default=100_000_000, help="tokens a shard (default: %(default)s)")
    parser.add_argument("--val-tokens", metavar="N", type=positive, default=val_tokens,
                        help=f"tokens of the first shard, for validation (default: {val_tokens or 'as a shard'})")


def add_workers_option(parser):
    parser.add_argument("--workers", metavar="N", type=positive, default=usable_cores(),
                        help="tokenizer processes (default: %(default)s, the cores there are)")


def run(main):
    """Call main; what the user can put right becomes one line on stderr and exit status 1."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough; stdout's own flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on at the last whole shard")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILES", nargs="*", help="text, .jsonl or .parquet files to write as shards")
    parser.add_argument("--tokenizer", choices=TOKENIZERS,
                        help="default: gpt2; for --decode bytes where the file has no token above 255")
    add_writer_options(parser)
    add_workers_option(parser)
    parser.add_argument("--count", metavar="N", type=positive, help="tokens for --info (default: 16) and --decode (default: all)")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--info", metavar="FILE.bin", help="print a shard's header and first tokens")
    actions.add_argument("--decode", metavar="FILE.bin", help="print a shard as text")
    actions.add_argument("--encode", metavar="TEXT", help="print a text's token ids; <|endoftext|> in it is that token")
    actions.add_argument("--decode-ids", metavar="IDS", help="print ids, separated by commas or spaces, as text; - reads stdin")
    args = parser.parse_args()

    if args.files and not (args.info is args.decode is args.encode is args.decode_ids is None):
        parser.error(f"FILES are for writing shards, and go with none of --info, --decode, --encode, --decode-ids: {args.files[0]}")
    if args.info is not None:
        count = read_header(args.info)
        first = read_shard(args.info, args.count or 16)
        print(f"{args.info}: magic {MAGIC}, version {VERSION}, {count:,} tokens, {HEADER_BYTES + 2 * count:,} bytes")
        print("first tokens:", ", ".join(map(str, first)))
    elif args.decode is not None:
        tokens = read_shard(args.decode, args.count)
        name = args.tokenizer or ("bytes" if max(read_shard(args.decode), default=0) < 256 else "gpt2")
        print_decoded(name, tokens)
    elif args.encode is not None:
        print(",".join(map(str, TOKENIZERS[args.tokenizer or "gpt2"]().encode(args.encode))))
    elif args.decode_ids is not None:
        text = sys.stdin.read() if args.decode_ids == "-" else args.decode_ids
        words = text.replace(",", " ").split()
        for word in words:
            if not (word.isascii() and word.isdigit()):
                parser.error(f"--decode-ids: expected token ids, found {word!r}")
        print_decoded(args.tokenizer or "gpt2", [int(word) for word in words])
    else:
        args.tokenizer = args.tokenizer or "gpt2"
        for option, value in [("FILES", args.files), ("-o DIR", args.out), ("--prefix NAME", args.prefix)]:
            if not value:
                parser.error(f"no {option} given")
        write_file_shards(args, args.files)


if __name__ == "__main__":
    run(main)
