#!/usr/bin/env python3
"""Tests of data/: python3 test/test_data.py. No network; stand-ins for tiktoken, pyarrow and the Hugging Face Hub.

What only tiktoken and tokenizers themselves can show is skipped where they cannot be imported (pip install tiktoken tokenizers).
"""

import array
import base64
import gzip
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
import zlib
from unittest import mock

sys.dont_write_bytecode = True
DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")
sys.path.insert(0, DATA)

import shards  # noqa: E402
import tinyshakespeare  # noqa: E402
import tokenizer  # noqa: E402

try:
    import tiktoken
    import tokenizers
except ImportError:
    tiktoken = tokenizers = None

# In memory where there is such a folder: a kill loses nothing there either, and thousands of fsyncs take no time.
TEMPORARY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# A token a byte. In its gpt2 a byte's id is byte + 300, so that ids are neither bytes nor special tokens and order shows.
FAKE_TIKTOKEN = f"""
    class Encoding:
        def __init__(self, name, *, pat_str, mergeable_ranks, special_tokens):
            self._pat_str, self._mergeable_ranks, self._special_tokens = pat_str, mergeable_ranks, special_tokens
        def encode_ordinary(self, text):
            return [self._mergeable_ranks[bytes([byte])] for byte in text.encode()]
    def list_encoding_names():
        return ["gpt2", "o200k_base", "p50k_base", "strange"]
    def get_encoding(name):
        tokens = [b"?%d" % i for i in range(300)] + [bytes([i]) for i in range(256)] + [b"?%d" % i for i in range(556, 50256)]
        ranks = dict(zip(tokens, range(50256)))
        return Encoding(name, pat_str="." if name == "strange" else {tokenizer.PATTERNS[1]!r}, mergeable_ranks=ranks,
                        special_tokens={{"<|endoftext|>": 50256}})
"""

# A "parquet" file is JSON: a list of row groups, each a list of texts.
FAKE_PARQUET = """
    import json
    from types import SimpleNamespace as Object
    class ParquetFile:
        def __init__(self, path):
            with open(path) as file:
                self.groups = json.load(file)
            self.num_row_groups = len(self.groups)
            self.schema_arrow = Object(names=["id", "text"])
            self.metadata = Object(num_rows=sum(map(len, self.groups)),
                                   row_group=lambda group: Object(num_rows=len(self.groups[group])))
        def read_row_group(self, group, columns):
            assert columns == ["text"]
            return Object(column=lambda name: Object(to_pylist=lambda: self.groups[group]))
"""

# The hub is the folder FAKE_HUB; its revision is the content of its file "revision".
FAKE_HUB = """
    import os, shutil
    from types import SimpleNamespace as Object
    HUB = os.environ["FAKE_HUB"]
    class HfApi:
        def dataset_info(self, repository, revision):
            return Object(sha=revision or open(os.path.join(HUB, "revision")).read())
        def list_repo_tree(self, repository, path_in_repo, recursive, revision, repo_type):
            assert repo_type == "dataset"
            for name in sorted(os.listdir(os.path.join(HUB, path_in_repo)), reverse=True):
                path = os.path.join(path_in_repo, name)
                yield Object(path=path, size=os.path.getsize(os.path.join(HUB, path)))
    def hf_hub_download(repository, path, repo_type, revision, local_dir):
        target = os.path.join(local_dir, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(os.path.join(HUB, path), target)
        return target
"""


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="keel_data_", dir=TEMPORARY)
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.out = self.at("out")
        self.environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}

    def at(self, *names):
        return os.path.join(self.folder, *names)

    def write(self, name, content):
        os.makedirs(os.path.dirname(self.at(name)), exist_ok=True)
        with open(self.at(name), "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return self.at(name)

    def write_jsonl(self, name, texts):
        return self.write(name, "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))

    def fake(self, module, source):
        """Scripts started from here on import this source as `module`."""
        self.write(f"modules/{module}.py", textwrap.dedent(source))
        self.environment["PYTHONPATH"] = self.at("modules")

    def command(self, *arguments):
        script, *arguments = arguments
        return [sys.executable, os.path.join(DATA, script + ".py"), *map(str, arguments)]

    def run_ok(self, *arguments, stdin=b""):
        done = subprocess.run(self.command(*arguments), input=stdin, capture_output=True, env=self.environment, timeout=600)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.stderr = done.stderr.decode()
        return done.stdout

    def run_error(self, *arguments, says):
        """The command fails with exit status 1 and one line on stderr that holds `says`, and changes no file."""
        before = self.files()
        done = subprocess.run(self.command(*arguments), capture_output=True, env=self.environment, timeout=600)
        message = done.stderr.decode()
        self.assertEqual(done.returncode, 1, message)
        self.assertEqual(message.count("\n"), 1, message)
        self.assertIn(says, message)
        self.assertEqual(done.stdout, b"")
        self.assert_same_files(self.files(), before)

    def files(self):
        """{path: content} of everything there is, without empty folders."""
        found = {}
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    found[os.path.join(folder, name)] = file.read()
        return found

    def shard_files(self, folder):
        found = {}
        for name in sorted(os.listdir(folder)):
            with open(os.path.join(folder, name), "rb") as file:
                found[name] = file.read()
        return found

    def assert_same_files(self, found, expected, message=None):
        """assertEqual's text of how megabytes differ would take minutes: the names of those that do are enough."""
        differing = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
        self.assertEqual(differing, [], message)

    def all_tokens(self, folder):
        """The tokens of val and train shards in order, numpy- and shards.py-free."""
        names = [name for name in os.listdir(folder) if name.endswith(".bin") and name != "tokenizer.bin"]
        tokens = []
        for name in sorted(names, key=lambda name: name.split("_")[-1]):
            with open(os.path.join(folder, name), "rb") as file:
                content = file.read()
            wide = content[:4] == struct.pack("<i", 20240801)
            tokens += struct.unpack(f"<{(len(content) - 1024) // (4 if wide else 2)}{'I' if wide else 'H'}", content[1024:])
        return tokens

    def encode(self, *arguments, **options):
        """tokenizer.py encode, by default of bytes into self.out."""
        self.run_ok("tokenizer", "encode", "-t", "bytes", "-o", self.out, "--prefix", "x", *arguments, **options)


class Format(Case):
    def test_header_and_tokens_are_llmc_bytes(self):
        text = self.write("a.txt", "abcdefg\n")
        self.encode("--val-tokens", 3, "--shard-tokens", 4, text)
        found = self.shard_files(self.out)
        self.assertEqual(found["x_val_000000.bin"], struct.pack("<256i3H", 20240520, 1, 3, *[0] * 253, 256, *b"ab"))
        self.assertEqual(found["x_train_000001.bin"], struct.pack("<256i4H", 20240520, 1, 4, *[0] * 253, *b"cdef"))
        self.assertEqual(found["x_train_000002.bin"], struct.pack("<256i2H", 20240520, 1, 2, *[0] * 253, *b"g\n"))
        self.assertEqual(sorted(found)[:2], ["tokenizer.bin", "x_progress.json"])
        self.assertEqual(sorted(found)[2:], ["x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin"])

    def test_without_val_tokens_there_is_no_validation_shard(self):
        self.encode("--shard-tokens", 5, self.write("a.txt", "abcdef"))
        self.assertEqual(sorted(self.shard_files(self.out))[2:], ["x_train_000001.bin", "x_train_000002.bin"])
        self.assertEqual(self.all_tokens(self.out), [256, *b"abcdef"])

    def test_tokens_survive_write_and_read_in_both_widths(self):
        for typecode, tokens in [("H", [0, 1, 255, 256, 50256, 65535] * 5), ("I", [0, 65535, 65536, 100256, 2**31 - 1] * 6)]:
            tokens = array.array(typecode, tokens)
            with shards.ShardWriter(self.at(typecode), "x", 100, 7, {}, typecode) as writer:
                writer.add(tokens)
                writer.finish()
                self.assertEqual(shards.read_shard(writer.path(0)) + shards.read_shard(writer.path(1)), tokens)
                self.assertEqual(shards.read_shard(writer.path(1), 3), tokens[7:10])
                self.assertEqual(self.all_tokens(self.at(typecode)), list(tokens))

    def test_a_vocabulary_above_65536_ids_writes_llmcs_wide_form(self):
        ranks = tokenizer.load("bytes").ranks + [b"?%d" % i for i in range(65536 - 256)]
        wide = self.write("wide.bin", tokenizer.Tokenizer(ranks, 1, ["<|endoftext|>"], "wide").data)
        self.fake("tiktoken", FAKE_TIKTOKEN)
        self.run_ok("tokenizer", "encode", "-t", wide, "-o", self.out, self.write("a.txt", "ab"))
        found = self.shard_files(self.out)["text_train_000001.bin"]
        self.assertEqual(found, struct.pack("<256i3I", 20240801, 7, 3, *[0] * 253, 65536, *b"ab"))
        self.assertIn(b"magic 20240801, version 7, 3 tokens, 1,036 bytes\nfirst tokens: 65536, 97, 98",
                      self.run_ok("shards", self.at("out", "text_train_000001.bin")))

    def test_no_shard_is_empty_where_the_tokens_end_at_a_border(self):
        self.encode("--shard-tokens", 4, self.write("a.txt", "abcdefg"))
        self.assertEqual(sorted(self.shard_files(self.out))[1:], ["x_progress.json", "x_train_000001.bin", "x_train_000002.bin"])

    def test_each_token_is_there_once_and_in_order_for_many_shard_sizes(self):
        generator = random.Random(1)
        texts = ["".join(generator.choices("ab é\n", k=generator.randrange(30))) for _ in range(60)]
        files = [self.write_jsonl("a.jsonl", texts[:40] + ["\ud800 alone"]),
                 self.write("b.txt", "plain"), self.write_jsonl("c.jsonl", texts[40:])]
        expected = [token for text in [*texts[:40], "? alone", "plain", *texts[40:]] for token in [256, *text.encode()]]
        for shard_tokens, val_tokens in [(5, 1), (17, 3), (64, 200), (10**6, 0)]:
            out = self.at(f"out{shard_tokens}")
            with self.subTest(shard_tokens=shard_tokens), mock.patch.object(os, "fsync"), mock.patch("sys.stderr", io.StringIO()):
                args = mock.Mock(out=out, prefix="x", shard_tokens=shard_tokens, val_tokens=val_tokens, workers=1)
                tokenizer.write_file_shards(tokenizer.load("bytes"), args, files)
                self.assertEqual(self.all_tokens(out), expected)
                for name in os.listdir(out)[:20]:
                    if name.endswith(".bin") and name != "tokenizer.bin":
                        limit = val_tokens if "_val_" in name else shard_tokens
                        self.assertLessEqual(shards.read_header(os.path.join(out, name))[0], limit)

    def test_a_shard_is_shown_and_decoded(self):
        self.encode("--shard-tokens", 51, self.write("a.txt", "höre, world\n" * 5))
        shard = self.at("out", "x_train_000001.bin")
        info = self.run_ok("shards", shard).decode()
        self.assertIn("magic 20240520, version 1, 51 tokens, 1,126 bytes", info)
        self.assertIn("first tokens: 256, 104, 195, 182, ", info)
        decode = ["tokenizer", "decode", "-t", self.at("out", "tokenizer.bin"), shard]
        self.assertEqual(self.run_ok(*decode), b"<|endoftext|>" + ("höre, world\n" * 5).encode()[:50])
        self.assertEqual(self.run_ok(*decode, "--count", 6).decode(), "<|endoftext|>höre")

    def test_decoded_text_steers_no_terminal(self):
        text = b"a\x1b[2Jb\rc\xc2\x9b1m\x7f\xff\xe4"
        ids = ",".join(map(str, text))
        self.assertEqual(self.run_ok("tokenizer", "decode", "-t", "bytes", ids), text)
        master, slave = os.openpty()
        subprocess.run(self.command("tokenizer", "decode", "-t", "bytes", ids), stdout=slave, env=self.environment | {"PYTHONUTF8": "1"}, check=True)
        self.assertEqual(os.read(master, 1000).decode(), "a\u241b[2Jb\u240dc\ufffd1m\u2421\ufffd\ufffd")
        os.close(slave), os.close(master)

    def test_what_is_no_whole_shard_is_named(self):
        good = struct.pack("<256i2H", 20240520, 1, 2, *[0] * 253, 1, 2)
        for content, says in [(b"", "has 0"), (good[:1000], "has 1000"), (good[:-1], "has 1027"), (good + b"x", "has 1029"),
                              (b"\1" + good[1:], "not a token shard"), (struct.pack("<i", 20240801) + good[4:], "not a token shard")]:
            with self.subTest(says=says):
                self.run_error("shards", self.write("x.bin", content), says=says)
                self.run_error("tokenizer", "decode", "-t", "bytes", self.at("x.bin"), says=says)
        self.run_error("shards", self.at("none.bin"), says="No such file")


class Convert(Case):
    def numpy(self, descr, shape, data):
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data

    def convert(self, *files):
        self.run_ok("shards", "convert", "-o", self.out, "--prefix", "x", "--shard-tokens", 1000, *files)
        return self.all_tokens(self.out)

    def test_token_files_of_others_become_shards(self):
        nano = self.write("nano.bin", struct.pack("<3H", 1, 65535, 3))
        npy = [self.write("a.npy", self.numpy("<u2", "(2,)", struct.pack("<2H", 4, 5))),
               self.write("b.npy", self.numpy("<i8", "(2, 2)", struct.pack("<4q", 6, 7, 8, 9)))]
        llmq = b"BIN.TOK\n" + struct.pack("<5i", 2, 4, 2, 50257, 1).ljust(1016, b"\0") + struct.pack("<2i", 10, 11) + b"masks"
        llmq = self.write("q.bin", llmq)
        self.assertEqual(self.convert(nano, *npy, llmq), [1, 65535, 3, 4, 5, 6, 7, 8, 9, 10, 11])
        self.assertIn("masks are left out", self.stderr)
        self.assertEqual(shards.read_header(self.at("out", "x_train_000001.bin")), (11, "H"))

    def test_ids_above_65535_make_wide_shards(self):
        many = list(range(70_000))  # some shards, and a resume's pieces
        path = self.write("a.npy", self.numpy("<i4", "(70000,)", struct.pack("<70000i", *many)))
        self.assertEqual(self.convert(path), many)
        self.assertEqual(shards.read_header(self.at("out", "x_train_000070.bin")), (1000, "I"))

    def test_what_is_none_is_refused(self):
        def refused(content, says):
            self.run_error("shards", "convert", "-o", self.out, "--prefix", "x", self.write("f.bin", content), says=says)
        refused(b"abc", "odd number of bytes, 3")
        refused(struct.pack("<256iH", 20240520, 1, 1, *[0] * 253, 1), "a shard of ours already")
        refused(b"BIN.TOK\n" + struct.pack("<5i", 1, 4, 2, 50257, 0).ljust(1016, b"\0"), "found 1 and 4")
        refused(b"BIN.TOK\n" + struct.pack("<5i", 2, 4, 2, 50257, 0).ljust(1016, b"\0") + b"1234", "only 1028 bytes")
        refused(self.numpy("<i4", "(1,)", struct.pack("<i", -1)), "found -1")
        refused(self.numpy("<u8", "(1,)", struct.pack("<Q", 2**31)), "found 2147483648")
        refused(self.numpy("<f4", "(1,)", bytes(4)), 'found "<f4"')
        refused(self.numpy("<u2", "(3,)", bytes(4)), "3 tokens are expected")
        refused(b"\x93NUMPY\1\0zz", "not a NumPy file")


class TokenizerFile(Case):
    TOY = [bytes([byte]) for byte in reversed(range(256))] + [b"ab", b"abc", "é".encode()]

    def toy(self, entries=("<|a|>", "", "<|ü|>"), split=1):
        return tokenizer.Tokenizer(self.TOY, split, list(entries), "toy")

    def test_layout(self):
        """256 int32, each entry with its length, the CRC-32 of all: as data/tokenizer.py's head says."""
        entries = [*self.TOY, b"<|a|>", b"", "<|ü|>".encode()]
        data = struct.pack("<256i", int.from_bytes(b"KEEL", "little"), 1, 4, 0, 0, 262, 0, 1, 3, *[0] * 247)
        data += b"".join(struct.pack("<H", len(entry)) + entry for entry in entries)
        data += struct.pack("<I", zlib.crc32(data))
        tok = self.toy()
        self.assertEqual((tok.data, tok.crc), (data, zlib.crc32(data[:-4])))
        self.assertEqual((tok.specials, tok.separator), ({"<|a|>": 259, "<|ü|>": 261}, 259))
        again = tokenizer.read_tokenizer(self.write("t.bin", data))
        self.assertEqual((again.data, again.ranks, again.entries, again.split), (data, self.TOY, tok.entries, 1))

    def test_every_damage_is_refused_in_one_line(self):
        data = self.toy().data

        def refused(content, says=""):
            with self.assertRaises(shards.DataError) as error:
                tokenizer.parse_tokenizer(content, "t.bin")
            self.assertRegex(str(error.exception), "^t.bin: [^\n]*$")
            self.assertIn(says, str(error.exception))

        def signed(content):
            return content + struct.pack("<I", zlib.crc32(content))

        for length in range(len(data)):
            refused(data[:length])
        generator = random.Random(1)
        for _ in range(500):
            i = generator.randrange(len(data))
            refused(data[:i] + bytes([data[i] ^ 1 << generator.randrange(8)]) + data[i + 1 :])
        refused(data + b"x", "CRC")
        self.assertEqual(tokenizer.parse_tokenizer(signed(data[:-4]), "t.bin").data, data)
        for word, value in [(1, 2), (2, 1), (3, 1), (5, -1), (5, 261), (5, 2**31 - 1), (7, 4), (7, -1), (7, 0), (8, -1), (8, 263),
                            (8, 200), (255, 1)]:
            refused(signed(data[: 4 * word] + struct.pack("<i", value) + data[4 * word + 4 : -4]))
        refused(signed(data[:-4] + b"x"), "to fill")
        refused(signed(data[:-5]), "to fill")
        body = data[:-4]
        refused(signed(body.replace(b"<|\xc3", b"<|\xff")), "UTF-8")
        refused(signed(body.replace(b"\3\0abc", b"\2\0ab\1\0")))
        for ranks, entries, says in [
            (self.TOY[:255], [], "byte 0x00"), (self.TOY + [b""], [], "not empty"), (self.TOY + [b"ab"], [], "b'ab'"),
            (self.TOY, ["x", "", "x"], "found one twice"), (self.TOY + [b"a" * 65536], [], "one has 65536"),
        ]:
            with self.assertRaisesRegex(shards.DataError, says):
                tokenizer.Tokenizer(ranks, 1, entries, "t.bin")

    def test_foreign_files_are_refused_in_one_line(self):
        self.run_error("tokenizer", "decode", "-t", self.write("t.bin", b"no tokenizer" * 200), "1", says="which --split goes")
        self.run_error("tokenizer", "export", self.write("t.bin", b"no tokenizer" * 200), "-o", self.at("x"), says="not a tokenizer file")
        self.run_error("tokenizer", "export", self.write("t.bin", b"KEEL" + bytes(2000)), "-o", self.at("x"), says="not a tokenizer file")
        self.run_error("tokenizer", "encode", "-t", self.at("none.bin"), "-o", self.out, self.at("t.bin"), says="none.bin")

    def test_decode_gives_back_bytes(self):
        toy = self.write("t.bin", self.toy().data)
        ids = [259, 255 - 104, 255 - 255, 256, 258, 261]
        expected = b"<|a|>h\xffab" + "é<|ü|>".encode()
        self.assertEqual(self.run_ok("tokenizer", "decode", "-t", toy, ",".join(map(str, ids))), expected)
        self.assertEqual(self.run_ok("tokenizer", "decode", "-t", toy, "-", stdin=" ".join(map(str, ids)).encode()), expected)
        self.run_error("tokenizer", "decode", "-t", toy, "1,260", says="token 260 is not one")
        self.run_error("tokenizer", "decode", "-t", toy, "262", says="token 262 is not one")
        self.run_error("tokenizer", "decode", "-t", toy, "1,a", says="'1,a'")

    def test_a_rank_file_is_imported_with_its_special_tokens(self):
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.TOY)]
        path = self.write("toy.tiktoken", b"".join(lines))

        def imported(*options):
            out = self.at("".join(options) + ".bin")
            self.run_ok("tokenizer", "import", path, "-o", out, "--split", "llama3", *options)
            return tokenizer.read_tokenizer(out)

        tok = imported()
        self.assertEqual((tok.ranks, tok.split, tok.entries), (self.TOY, 3, ["<|endoftext|>"]))
        tok = imported("--special", "<a=b>=262", "--special", "<c>", "--special", "<d=>=259")
        self.assertEqual(tok.specials, {"<d=>": 259, "<a=b>": 262, "<c>": 263})
        self.assertEqual(tok.entries, ["<d=>", "", "", "<a=b>", "<c>"])

        def refused(says, *options, content=b"".join(lines)):
            self.run_error("tokenizer", "import", self.write("toy.tiktoken", content), "-o", self.at("new.bin"), *options, says=says)

        refused("which --split")
        split = ["--split", "gpt2"]
        refused("right behind the 259 others", *split, "--special", "<a>=258")
        refused("behind the 259 others", *split, "--special", "<a>=300", "--special", "<b>=300")
        refused("found ''",  *split, "--special", "")
        refused("in UTF-8", *split, "--special", "\udcff")
        refused("given twice", *split, "--special", "<a>=300", "--special", "<a>=301")
        refused("right behind the 259 others", *split, "--special", "<a>=2000000000")
        refused("line 2: expected a token in base64", *split, content=lines[0] + b"?? 1\n")
        refused("0 is missing", *split, content=b"".join(lines[1:]))
        refused("byte 0x61 is not", *split, content=b"".join(base64.b64encode(b"a?%d" % i if t == b"a" else t) + b" %d\n" % i
                                                              for i, t in enumerate(self.TOY)))

    def test_tiktokens_names_are_imported(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        self.run_ok("tokenizer", "import", "gpt2", "-o", self.at("gpt2.bin"))
        tok = tokenizer.read_tokenizer(self.at("gpt2.bin"))
        self.assertEqual((tok.size, tok.split, tok.specials, tok.ranks[397]), (50257, 1, {"<|endoftext|>": 50256}, b"a"))
        for name, says in [("o200k_base", "an expression of its own"), ("p50k_base", "in the midst of its ranks"),
                           ("strange", "none of gpt2, cl100k"), ("words", "words: expected")]:
            self.run_error("tokenizer", "import", name, "-o", self.at("new.bin"), says=says)
        self.run_error("tokenizer", "import", "gpt2", "-o", self.at("new.bin"), "--split", "gpt2", says="brings its own")
        self.run_error("tokenizer", "import", "bytes", "-o", self.at("gpt2.bin"), says="is another")

    def test_an_export_lists_all_merges_and_keeps_ids(self):
        ranks = [b"ab", *self.TOY[:256], b"bc", b"abc", "é".encode()]  # "abc" is ab + c, and a + bc, whose left rank is higher
        content = tokenizer.to_hugging_face(tokenizer.Tokenizer(ranks, 3, ["<|a|>", "", "<|b|>"], "toy"))
        self.assertEqual(content["model"]["merges"], ["a b", "b c", "ab c", "a bc", "Ã ©"])
        ids = [content["model"]["vocab"][word] for word in ["Ġ", "a", "abc", "<|a|>", "<|b|>"]]
        self.assertEqual(ids, [256 - 32, 256 - 97, 258, 260, 262])
        self.assertEqual([(added["id"], added["content"]) for added in content["added_tokens"]], [(260, "<|a|>"), (262, "<|b|>")])

    def test_missing_package_is_named(self):
        self.fake("tiktoken", "raise ImportError('not installed')")
        self.fake("tokenizers", "raise ImportError('not installed')")
        text = self.write("a.txt", "abc")
        toy = self.write("t.bin", self.toy().data)
        self.run_error("tokenizer", "encode", "-t", "gpt2", "-o", self.out, text, says="pip install tiktoken")
        self.run_error("tokenizer", "encode", "-t", toy, "-o", self.out, "--workers", 2, text, says="pip install tiktoken")
        self.run_error("tokenizer", "count", "-t", toy, "--workers", 2, text, says="pip install tiktoken")
        self.run_error("tokenizer", "train", "-V", 300, "-o", self.at("x.bin"), text, says="pip install tokenizers tiktoken")
        self.run_error("tokenizer", "import", self.write("t.json", "{}"), "-o", self.at("x.bin"), says="pip install tokenizers")
        self.assertFalse(os.path.exists(self.out))
        self.fake("huggingface_hub", "raise ImportError('not installed')")
        self.run_error("fineweb_edu", "-o", self.out, "--tokenizer", "bytes", says="pip install huggingface_hub pyarrow tiktoken")
        self.fake("pyarrow", "raise ImportError('not installed')")
        parquet = self.write("a.parquet", "x")
        self.run_error("tokenizer", "encode", "-t", "bytes", "-o", self.out, parquet, says="pip install pyarrow")


class Encode(Case):
    def test_the_separator_stands_before_each_document(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        files = [self.write("a.txt", "one\n"), self.write_jsonl("b.jsonl", ["two <|endoftext|>", "", "thrée"])]
        self.run_ok("tokenizer", "encode", "-t", "gpt2", "-o", self.out, "--shard-tokens", 10, *files)
        expected = []
        for text in ["one\n", "two <|endoftext|>", "", "thrée"]:
            expected += [50256] + [300 + byte for byte in text.encode()]
        self.assertEqual(self.all_tokens(self.out), expected)
        count = self.run_ok("tokenizer", "count", "-t", self.at("out", "tokenizer.bin"), "--workers", 2, *files).decode()
        self.assertIn("a.txt: 5 tokens, 4 bytes, 0.800 bytes a token\n", count)
        self.assertIn("b.jsonl: 26 tokens, 23 bytes, 0.885 bytes a token\nin all: 31 tokens, 27 bytes, 0.871", count)

    def test_without_special_tokens_documents_are_joined(self):
        plain = self.write("t.bin", tokenizer.Tokenizer(tokenizer.load("bytes").ranks, 0, [], "plain").data)
        files = [self.write("a.txt", "one\n"), self.write_jsonl("b.jsonl", ["", "two"])]
        self.run_ok("tokenizer", "encode", "-t", plain, "-o", self.out, *files)
        self.assertEqual(bytes(self.all_tokens(self.out)), b"one\ntwo")

    def test_standard_input_and_other_fields(self):
        self.encode("-", stdin=b"a\nb")
        self.assertEqual(self.all_tokens(self.out), [256, *b"a\nb"])
        self.run_error("tokenizer", "encode", "-t", "bytes", "-o", self.out, "--prefix", "x", "-", says="a run from standard input")
        lines = b'{"t": "a", "text": "no"}\n{"t": "b"}\n'
        out = ["tokenizer", "encode", "-t", "bytes", "-o", self.at("jsonl"), "--field", "t"]
        self.run_ok(*out, "--jsonl", "-", self.write("c.jsonl", '{"t": "c"}'), stdin=lines)
        self.assertEqual(self.all_tokens(self.at("jsonl")), [256, 97, 256, 98, 256, 99])
        self.run_error("tokenizer", "encode", "-t", "bytes", "-o", self.out, "--prefix", "y", "-", says="standard input: no text")

    def test_worker_processes_change_no_byte(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        generator = random.Random(3)
        texts = self.write_jsonl("a.jsonl", [f"document {i} " * (i % 50) for i in range(2500)])  # some four batches
        large = self.write("b.txt", "".join(generator.choices(["word ", "é\n", "\n", "\u3000", "\r\n"], k=300_000)))
        for workers in 1, 2:
            self.run_ok("tokenizer", "encode", "-t", "gpt2", "-o", self.at(f"out{workers}"), "--shard-tokens", 300_000,
                        "--workers", workers, texts, large)
        self.assert_same_files(self.shard_files(self.at("out1")), self.shard_files(self.at("out2")))
        self.assertGreater(len(self.shard_files(self.at("out1"))), 7)

    def test_pieces_of_a_large_text_are_that_text_and_end_only_at_cuts(self):
        """For many texts and piece sizes: joined they are the text, what a resume skips is what came before, and each ends where
        the rule, here written once more on characters, lets it."""
        generator = random.Random(4)
        cut = re.compile(r"(?<=\S)\n\Z")
        spaces = "\t\n\v\f\r \x85\xa0\u1680\u2003\u2028\u3000"  # White_Space, which Python's isspace() holds
        cuts = 0
        for _ in range(300):
            text = "".join(generator.choices(["\n"] * 3 + list(spaces) + list("ab!é漢\U0001f600\x1c"), k=generator.randrange(1, 120)))
            path = self.write("a.txt", text)
            with mock.patch.object(shards, "PIECE_BYTES", generator.randrange(1, 30)):
                pieces = list(shards.read_pieces([path], [len(text.encode())]))
                start = generator.randrange(len(pieces) + 1)
                self.assertEqual(list(shards.read_pieces([path], [len(text.encode())], start)), pieces[start:])
            self.assertEqual(b"".join(piece for piece, _, _ in pieces).decode(), text)
            self.assertEqual([opens for _, opens, _ in pieces], [True] + [False] * (len(pieces) - 1))
            for (left, _, _), (right, _, _) in zip(pieces, pieces[1:]):
                left, right = left.decode(), right.decode()
                if right[0] == " ":
                    self.assertFalse(left[-1] in spaces, (left, right))
                else:
                    self.assertTrue(cut.search(left) and right[0] not in spaces, (left, right))
                cuts += 1
        self.assertGreater(cuts, 300)


@unittest.skipIf(tiktoken is None, "tiktoken and tokenizers cannot be imported")
class Libraries(Case):
    """Against tiktoken and Hugging Face's tokenizers themselves, with a vocabulary trained on made-up words."""

    @classmethod
    def setUpClass(cls):
        generator = random.Random(5)
        syllables = ["ka", "ri", "sto", "né", "on", "th", "漢", "字", "при", "'s", "ing", "Ü", "12", "0"]
        words = ["".join(generator.choices(syllables, k=generator.randrange(1, 5))) for _ in range(1500)]
        joints = [" "] * 8 + ["\n", ", ", ".\n\n", "  ", "\t", " (", "!\r\n", "'ll ", "'S "]
        cls.texts = ["".join(generator.choice(words[: generator.randrange(1, 1500)]) + generator.choice(joints) for _ in range(200))
                     for _ in range(100)]
        cls.tok = tokenizer.train([(text.encode(), True, 0.0) for text in cls.texts], 1400, 2, ["<|endoftext|>", "<|x|>"])

    def strings(self, number):
        """Strings on which splits and merges differ most: white space of all kinds, contractions, digits, all of Unicode."""
        generator = random.Random(number)
        parts = [list(" \n\r\t\x0b\x85\u00a0\u2003\u2028\u3000\x1c\u200b"), [" ", "\n", "\r\n", "   "],
                 ["'s", "'S", "'ſ", "'t", "'LL", "'ve"], list("0123456789½²٣Ⅷ"), list("abcXYZéßıſK漢字가ไहि"),
                 list("!?.,-_()<|>'\""), [text[:20] for text in self.texts]]
        for _ in range(number):
            text = "".join(generator.choice(generator.choice(parts)) for _ in range(generator.randrange(1, 30)))
            yield text + chr(generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)]))

    def test_training_gives_the_same_file_every_time(self):
        jsonl, text = self.write_jsonl("a.jsonl", self.texts[:50]), self.write("b.txt", "".join(self.texts[50:]))
        found = set()
        for run, threads in enumerate([1, 1, 2, 5]):
            self.environment["RAYON_NUM_THREADS"] = str(threads)
            out = self.at(f"{run}.bin")
            said = self.run_ok("tokenizer", "train", "-V", 900, "--special", "<|x|>", "-o", out, jsonl, text).decode()
            self.assertIn("V 900, split cl100k, special tokens: <|endoftext|> 898, <|x|> 899, CRC-32", said)
            self.assertRegex(said, r"\n[\d.]+ bytes a token on .*\n[\d.]+ s\n")
            with open(out, "rb") as file:
                found.add(file.read())
        self.assertEqual(len(found), 1)
        tok = tokenizer.read_tokenizer(out)
        self.assertEqual((tok.ranks[:256], len(tok.ranks)), ([bytes([byte]) for byte in range(256)], 898))
        known = set(tok.ranks[:256])
        for token in tok.ranks[256:]:
            halves = [(token[:i], token[i:]) for i in range(1, len(token))]
            self.assertTrue(any(left in known and right in known for left, right in halves), f"{token!r} joins no two before it")
            known.add(token)
        self.run_error("tokenizer", "train", "-V", 900, "-o", out, text, says="exists")

    def test_text_with_too_few_merges_says_how_many(self):
        text = self.write("a.txt", "abab")
        self.run_error("tokenizer", "train", "-V", 300, "-o", self.at("x.bin"), text, says="the text gives 2 merges, -V 300 asks for 43")
        self.run_ok("tokenizer", "train", "-V", 259, "-o", self.at("x.bin"), text)
        self.assertEqual(tokenizer.read_tokenizer(self.at("x.bin")).ranks[256:], [b"ab", b"abab"])
        self.run_error("tokenizer", "train", "-V", 256, "-o", self.at("y.bin"), text, says="at least 257")
        latin = self.write("l.txt", b"caf\xe9 au lait")
        self.run_error("tokenizer", "train", "-V", 300, "-o", self.at("y.bin"), latin, says="l.txt: not UTF-8: byte 0xe9 at offset 3")

    def test_cuts_change_no_token(self):
        for split in 1, 2, 3:
            encoding = tokenizer.encoder(tokenizer.Tokenizer(self.tok.ranks, split, [], "t"))
            cuts = 0
            for text in self.strings(3000):
                data = text.encode()
                place = shards.last_boundary(data)
                cuts += place > 0
                parts = encoding.encode_ordinary(data[:place].decode()) + encoding.encode_ordinary(data[place:].decode())
                self.assertEqual(parts, encoding.encode_ordinary(text), (split, text, place))
            self.assertGreater(cuts, 1000)

    def test_an_export_gives_the_same_ids_and_comes_back(self):
        for split in 1, 2, 3:
            tok = tokenizer.Tokenizer(self.tok.ranks, split, ["<|endoftext|>", "", "<|x|>"], "t")
            path = self.write(f"{split}.json", json.dumps(tokenizer.to_hugging_face(tok)))
            theirs, encoding = tokenizers.Tokenizer.from_file(path), tokenizer.encoder(tok)
            texts = list(self.strings(3000))
            for text, their in zip(texts, theirs.encode_batch(texts)):
                self.assertEqual(their.ids, encoding.encode_ordinary(text), (split, text))
                self.assertEqual(theirs.decode(their.ids), text)
            self.assertEqual(theirs.encode("<|x|>a").ids, [len(tok.ranks) + 2, tok.id_of[b"a"]])
            self.run_ok("tokenizer", "import", path, "-o", self.at(f"{split}.bin"))
            self.assertEqual(tokenizer.read_tokenizer(self.at(f"{split}.bin")).data, tok.data)
        bytewise = tokenizer.load("bytes")
        path = self.write("bytes.json", json.dumps(tokenizer.to_hugging_face(bytewise)))
        self.assertEqual(tokenizers.Tokenizer.from_file(path).encode("aé").ids, list("aé".encode()))
        self.assertEqual(tokenizer.load(path).data, bytewise.data)

    def test_hugging_faces_own_training_is_imported_and_renumbered(self):
        theirs = tokenizers.ByteLevelBPETokenizer()  # split by GPT-2's expression, inside of ByteLevel
        theirs.train_from_iterator(self.texts, vocab_size=700, special_tokens=["<s>", "<|end|>"], show_progress=False)
        theirs.save(self.at("theirs.json"))
        self.run_ok("tokenizer", "import", self.at("theirs.json"), "-o", self.at("t.bin"))
        self.assertIn("ids renumbered: 698 tokens in their order, then 2 special ones", self.stderr)
        tok = tokenizer.read_tokenizer(self.at("t.bin"))
        self.assertEqual((tok.split, tok.specials), (1, {"<s>": 698, "<|end|>": 699}))
        encoding = tokenizer.encoder(tok)
        for text in [*self.texts, *self.strings(1000)]:
            expected = [number - 2 for number in theirs.encode(text).ids]
            self.assertEqual(encoding.encode_ordinary(text), expected, text)

    def test_what_ranks_cannot_say_is_refused(self):
        good = json.dumps(tokenizer.to_hugging_face(tokenizer.Tokenizer(self.tok.ranks, 2, ["<|endoftext|>"], "t")))

        def refused(says, change):
            content = json.loads(good)
            change(content)
            path = self.write("t.json", json.dumps(content))
            with mock.patch("sys.stderr", io.StringIO()), self.assertRaises(shards.DataError) as error:
                tokenizer.load(path)
            self.assertIn(says, str(error.exception))
            self.assertNotIn("\n", str(error.exception))

        def setter(*path):
            *path, key, value = path

            def change(content):
                for step in path:
                    content = content[step]
                content[key] = value
            return change

        refused("by NFC", setter("normalizer", {"type": "NFC"}))
        refused("dropout 0.1", setter("model", "dropout", 0.1))
        refused("byte_fallback", setter("model", "byte_fallback", True))
        refused("end_of_word_suffix", setter("model", "end_of_word_suffix", "</w>"))
        refused("found WordLevel", setter("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}))
        refused("pre_tokenizer: expected", setter("pre_tokenizer", {"type": "Whitespace"}))
        refused("pre_tokenizer: expected", setter("pre_tokenizer", None))
        refused("pre_tokenizer: expected", setter("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True))
        refused("pre_tokenizer: expected", setter("pre_tokenizer", "pretokenizers", 1, "use_regex", True))
        refused("pre_tokenizer: expected", setter("pre_tokenizer", "pretokenizers", 0, "behavior", "Removed"))
        refused("none of gpt2, cl100k, llama3: \\d", setter("pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": "\\d"}))
        refused("is not special", setter("added_tokens", 0, "special", False))
        refused("byte-level letters", setter("model", "vocab", "a b", 3000))
        refused("byte 0x61 is not", lambda content: (content["model"].update(merges=[]), content["model"]["vocab"].pop("a")))
        refused("not a tokenizer.json", lambda content: content.pop("model"))
        # A merge less: the merge that ranks would do is not in the list. Where only others make the token, it is in both.
        merges = json.loads(good)["model"]["merges"]
        refused("its merges do not", lambda content: content["model"]["merges"].remove(merges[0]))
        refused("not in the order of its merges", lambda content: content["model"]["merges"].reverse())
        # A token that no merge makes is still a whole piece by rank, and with ignore_merges in theirs.
        lone = " karionsto".encode()
        odd = tokenizer.to_hugging_face(tokenizer.Tokenizer([*self.tok.ranks[:300], lone], 2, [], "t"))
        self.assertEqual(tokenizer.load(self.write("odd.json", json.dumps(odd))).ranks[300], lone)
        odd["model"]["ignore_merges"] = False
        with self.assertRaisesRegex(shards.DataError, "by rank ' karionsto' is"):
            tokenizer.load(self.write("odd.json", json.dumps(odd)))

    def test_encode_is_tiktokens_encoding_of_each_file(self):
        toy = self.write("t.bin", self.tok.data)
        files = [self.write(f"{i}.txt", "".join(self.texts[10 * i : 10 * i + 10]) * 4) for i in range(3)]
        self.run_ok("tokenizer", "encode", "-t", toy, "-o", self.out, "--shard-tokens", 20_000, "--workers", 2, *files)
        encoding, expected, text = tokenizer.encoder(self.tok), [], b""
        for i in range(3):
            content = "".join(self.texts[10 * i : 10 * i + 10]) * 4
            expected += [self.tok.separator, *encoding.encode_ordinary(content)]
            text += b"<|endoftext|>" + content.encode()
        self.assertEqual(self.all_tokens(self.out), expected)
        self.assertEqual(self.run_ok("tokenizer", "decode", "-t", toy, "-", stdin=" ".join(map(str, expected)).encode()), text)

    def test_a_million_equal_letters_do_not_hold_up_training(self):
        for text in "a" * 1_000_000, " " * 1_000_000 + "x", "é漢\n" * 5000 + "ab" * 10_000 + " \n" * 5000:
            self.assertEqual("".join(tokenizer.bounded(text)), text)
            tokenizer.train([(text.encode(), True, 0.0)], 260, 2, [])

    def test_a_million_spaces_are_one_line(self):
        with self.assertRaisesRegex(shards.DataError, "so much white space at one place"):
            stderr = os.dup(2)
            try:  # the library writes what it panics about there
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                tokenizer.piece_encoder(self.tok)(b" " * 1_500_000 + b"x", True)
            finally:
                os.dup2(stderr, 2)

    def test_cl100k_keeps_its_ids(self):
        if "TIKTOKEN_CACHE_DIR" not in os.environ:
            self.skipTest("TIKTOKEN_CACHE_DIR is to name a folder that holds tiktoken's cl100k_base")
        tok = tokenizer.load("cl100k_base")
        self.assertEqual((tok.size, tok.split, tok.separator, tok.entries.count("")), (100277, 2, 100257, 16))
        theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_hugging_face(tok)))
        self.assertEqual(theirs.token_to_id("<|endofprompt|>"), 100276)
        encoding = tiktoken.get_encoding("cl100k_base")
        for text in self.strings(1000):
            self.assertEqual(theirs.encode(text).ids, encoding.encode_ordinary(text))


class Interruption(Case):
    def test_kill_at_every_change_on_disk(self):
        """A child process runs the writer and is killed just before and just after its n-th call that changes the disk, for all n."""
        documents = [array.array("H", range(length)) for length in [5, 0, 13, 1, 30, 7, 8]]  # 64 tokens, 5 shards

        def write(out, stop_at):
            calls = 0

            def counted(function, really=True):
                def call(*arguments, **options):
                    nonlocal calls
                    calls += 1
                    if calls == stop_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = function(*arguments, **options) if really else None
                    calls += 1
                    if calls == stop_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result
                return call

            # fsync only counts: a kill, unlike a power failure, loses nothing that was handed to the system
            with mock.patch.object(os, "fsync", counted(os.fsync, really=False)), mock.patch.object(os, "replace", counted(os.replace)):
                with shards.ShardWriter(out, "x", 15, 10, {}, tokenizer=b"a vocabulary") as writer:
                    for tokens in documents[writer.pieces:] if not writer.finished else []:
                        counted(writer.add)(tokens)
                    if not writer.finished:
                        writer.finish()
            return calls

        points = write(self.at("whole"), None)
        expected = self.shard_files(self.at("whole"))
        self.assertEqual(sorted(expected)[2:], [f"x_train_{i:06d}.bin" for i in range(1, 5)] + ["x_val_000000.bin"])
        for point in range(1, points + 1):
            out = self.at(f"out{point}")
            child = os.fork()
            if child == 0:
                try:
                    write(out, point)
                finally:  # whatever happens, the child must not go on with the tests
                    os._exit(1)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), -signal.SIGKILL, point)
            for name, content in self.shard_files(out).items():
                if name.endswith(".bin"):
                    self.assertTrue(content == expected[name], f"killed at {point}: {name} is not whole")
            write(out, None)
            self.assert_same_files(self.shard_files(out), expected, f"killed at {point}")
        self.assertGreater(points, 70)

    def kill_after(self, path, seconds, command):
        """Start the command, SIGKILL it so many seconds after `path` exists; True where it was still running."""
        process = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not os.path.exists(path) and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(seconds)
        process.kill()
        return process.wait() == -signal.SIGKILL

    def test_kill_at_random_moments(self):
        """The moments are counted from a shard's appearance, so that a busy machine does not move them all to one end."""
        texts = self.write_jsonl("a.jsonl", [f"document {i} " * (i % 40) for i in range(7_000)])
        options = ["--prefix", "x", "-t", "bytes", "--shard-tokens", 70_000, "--val-tokens", 30_000, texts]
        self.run_ok("tokenizer", "encode", "-o", self.at("whole"), *options)
        expected = self.shard_files(self.at("whole"))
        names = sorted((name for name in expected if name.startswith("x_") and name.endswith(".bin")), key=lambda name: name.split("_")[-1])
        generator, killed, resumed = random.Random(2), 0, 0
        for trial in range(600):  # as many as it takes: on a busy machine many a run ends before it is killed
            out = self.at(f"out{trial}")
            path = out if trial == 0 else os.path.join(out, generator.choice(names[:-5]))
            killed += self.kill_after(path, generator.uniform(0, 0.01), self.command("tokenizer", "encode", "-o", out, *options))
            self.run_ok("tokenizer", "encode", "-o", out, *options)
            resumed += "going on after shard" in self.stderr
            self.assert_same_files(self.shard_files(out), expected, f"trial {trial}")
            if killed >= 20 and resumed >= 10:
                break
        self.assertGreaterEqual(killed, 20, "too few runs were killed before their end")
        self.assertGreaterEqual(resumed, 10, "too few runs were killed between shards")

    def test_kill_with_workers_leaves_none_behind(self):
        self.fake("tiktoken", FAKE_TIKTOKEN + "\n    import time; time.sleep(0.2)\n")
        texts = self.write_jsonl("a.jsonl", [f"document {i} " * (i % 50) for i in range(1000)])
        large = self.write("b.txt", "words and é漢\nlines " * 50_000)
        command = self.command("tokenizer", "encode", "-o", self.out, "-t", "gpt2", "--prefix", "x", "--shard-tokens", 300_000,
                               "--val-tokens", 300_000, "--workers", 2, texts, large)
        process = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        children_file = f"/proc/{process.pid}/task/{process.pid}/children"
        children = []
        deadline = time.monotonic() + 300
        while not os.path.exists(os.path.join(self.out, "x_val_000000.bin")) and process.poll() is None and time.monotonic() < deadline:
            if os.path.exists(children_file):
                with open(children_file) as file:
                    children = file.read().split() or children
            time.sleep(0.005)
        process.kill()
        process.wait()
        while any(map(self.running, children)) and time.monotonic() < deadline + 5:
            time.sleep(0.02)
        self.assertFalse([child for child in children if self.running(child)], "workers outlived their parent")
        self.run_ok("tokenizer", *command[2:])
        self.run_ok("tokenizer", "encode", "-o", self.at("whole"), *command[5:], "--workers", 1)
        self.assert_same_files(self.shard_files(self.out), self.shard_files(self.at("whole")))

    def running(self, pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def test_a_complete_run_is_not_written_again(self):
        text = self.write("a.txt", "abcdefgh" * 10)
        self.encode("--shard-tokens", 30, text)
        times = {name: os.stat(os.path.join(self.out, name)).st_mtime_ns for name in os.listdir(self.out)}
        self.encode("--shard-tokens", 30, text)
        self.assertIn("complete already", self.stderr)
        self.assertEqual(times, {name: os.stat(os.path.join(self.out, name)).st_mtime_ns for name in os.listdir(self.out)})

    def test_two_runs_do_not_write_one_folder(self):
        text = self.write("a.txt", "abcdefgh")
        with shards.ShardWriter(self.out, "x", 4, 4, {}):
            self.run_error("tokenizer", "encode", "-t", "bytes", "-o", self.out, "--prefix", "x", text, says="another run")

    def test_another_vocabulary_in_the_folder_is_not_overwritten(self):
        text = self.write("a.txt", "abcdefgh")
        other = self.write("out/tokenizer.bin", tokenizer.Tokenizer(tokenizer.load("bytes").ranks, 0, [], "other").data)
        self.run_error("tokenizer", "encode", "-t", "bytes", "-o", self.out, text, says="is another vocabulary")
        self.run_ok("tokenizer", "encode", "-t", other, "-o", self.out, text)

    def test_a_full_disk_is_one_line(self):
        text = self.write("a.txt", "abcdefgh" * 10)
        with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")), self.assertRaises(SystemExit) as stop:
            args = mock.Mock(out=self.out, prefix="x", shard_tokens=30, val_tokens=30, workers=1)
            shards.run(lambda: tokenizer.write_file_shards(tokenizer.load("bytes"), args, [text]))
        self.assertIn("No space left", stop.exception.code)
        self.assertEqual(os.listdir(self.out), [])


class BadInput(Case):
    def encode_error(self, *arguments, says):
        self.run_error("tokenizer", "encode", "-t", "bytes", "-o", self.out, "--prefix", "x", "--shard-tokens", 4, *arguments, says=says)

    def test_a_quoted_glob_is_its_files_in_the_order_of_their_names(self):
        for name in "b.txt", "B.txt", "a [1].txt":
            self.write(name, name)
        self.run_ok("tokenizer", "encode", "-t", "bytes", "-o", self.out, self.at("*.txt"))
        shard = self.at("out", "text_train_000001.bin")
        texts = self.run_ok("tokenizer", "decode", "-t", "bytes", shard).split(b"<|endoftext|>")
        self.assertEqual(texts, [b"", b"B.txt", b"a [1].txt", b"b.txt"])
        self.assertIn(b"9 bytes", self.run_ok("tokenizer", "count", "-t", "bytes", self.at("a [1].txt")))

    def test_bad_inputs_are_one_line_and_write_nothing(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        good = self.write("good.txt", "abc")
        self.encode_error(says="FILES")
        self.encode_error(self.at("none.txt"), says="none.txt")
        self.encode_error(good, self.at("none.txt"), says="none.txt")
        self.encode_error(self.folder, says="found a folder; name its files: ")
        self.encode_error(self.write("utf16.txt", "text".encode("utf-16le")), says="utf16.txt: expected text, found a zero byte at")
        self.encode_error(self.write("binary.txt", b"\xe9" * 1000 + b"\0"), says="zero byte at offset 1000: leave it out")
        self.encode_error(self.write("empty.jsonl", "\n\n"), says="no documents")
        self.encode_error(self.write("empty.txt", ""), says="empty.txt: the file is empty")
        self.encode_error("-t", "gpt2", self.write("latin1.txt", b"caf\xe9!"), says="latin1.txt: not UTF-8: byte 0xe9 at offset 3")
        late = self.write("late.txt", "words and spaces " * 10_000 + "\n")
        with open(late, "ab") as file:
            file.write(b"\xff")
        self.encode_error("-t", "gpt2", "--shard-tokens", 1_000_000, late,
                          says="not UTF-8: byte 0xff at offset 170001: leave it out if it is no text, else convert it (iconv")
        self.encode_error("-t", "words", good, says="words: expected bytes")
        self.encode_error("--val-tokens", 3, self.write("short.txt", "ab"), says="no training shard")
        self.encode_error("--shard-tokens", "0", good, says="found '0'")
        self.encode_error("--shard-tokens", "3000000000", good, says="found '3000000000'")
        self.encode_error("--prefix", "a/b", good, says="'a/b'")
        self.run_error("tokenizer", "encode", "-t", "bytes", good, says="-o/--out")
        self.run_error("tokenizer", "encode", "-o", self.out, good, says="-t/--tokenizer")
        self.run_error("shards", "convert", "-o", self.out, good, says="odd number of bytes")
        self.assertFalse(os.path.exists(self.out) and os.listdir(self.out))

    def test_what_is_there_by_its_very_name_is_no_glob_nor_are_the_folders_before_one(self):
        for name in "data [v2].txt", "data v.txt", "texts [v2]/1.txt", "texts [v2]/2.txt":
            self.write(name, name)
        for names, total in (["data [v2].txt"], "13 bytes"), (["texts [v2]/*.txt"], "32 bytes"):
            self.assertIn(total.encode(), self.run_ok("tokenizer", "count", "-t", "bytes", *map(self.at, names)).splitlines()[-1])
        for script in (["shards", "convert", "-o", self.at("c")], ["fineweb_edu", "--tokenizer", "bytes", "-o", self.at("f"), "--val-tokens", 0,
                                                                   "--local"]):
            self.run_ok(*script, self.at("texts [v2]/*.txt"))
        self.assertEqual(len(self.all_tokens(self.at("f"))), 34)

    def test_a_glob_passes_over_what_holds_no_data_and_says_so(self):
        self.write("d/a.txt", "abc")
        self.write("d/empty.txt", "")
        os.mkdir(self.at("d/folder.txt"))
        os.symlink("a.txt", self.at("d/z.txt"))
        self.write("d/log.csv", "step,loss,val_loss,lr\n")
        self.write("d/tokenizer.bin", b"KEEL\1")
        os.mkfifo(self.at("d/pipe"))
        self.assertIn(b"3 bytes", self.run_ok("tokenizer", "count", "-t", "bytes", self.at("d/*")))
        self.assertEqual(self.stderr, f"note: {self.at('d/*')!r} passes over {self.at('d/empty.txt')} (empty), {self.at('d/folder.txt')} (a folder),"
                         f" {self.at('d/log.csv')} (a run's own) and 3 more\n")
        self.run_ok("tokenizer", "count", "-t", "bytes", self.at("d/[az].txt"))
        self.assertIn(f"z.txt (a link to {self.at('d/a.txt')}, counted once)", self.stderr)
        os.remove(self.at("d/pipe"))  # which the next would read
        self.encode_error(self.at("d/[ef]*.txt"), says="expected data in")
        self.encode_error(self.at("d/*.none"), says="matches no file")
        os.symlink("gone", self.at("d/b.txt"))
        done = subprocess.run(self.command("tokenizer", "count", "-t", "bytes", self.at("d/*.txt")), capture_output=True)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"b.txt", done.stderr.splitlines()[-1])

    def test_what_the_shell_has_not_expanded_is_said_with_what_works(self):
        for name in "my d/a.txt", "my d/b.txt", "my d/deep/c.txt":
            self.write(name, "abc")
        self.environment |= {"HOME": self.folder}
        for word, size in ("~/my d/a.txt", 3), ("~/my d/*.txt", 6), ("$HOME/my d/*.txt", 6), ("my d/{a,b}.txt", 6), ("my d/**/*.txt", 9):
            with self.subTest(word=word):
                self.encode_error(word, says="use: ")
                done = subprocess.run(self.command("tokenizer", "count", "-t", "bytes", word), capture_output=True, env=self.environment)
                use = re.search(r"use: (.*); -h lists", done.stderr.decode())[1].rpartition(", and ")
                count = " ".join(self.command("tokenizer", "count", "-t", "bytes"))
                done = subprocess.run(["bash", "-c", f"{use[0] or 'true'} && {count} {use[2]}"], capture_output=True, env=self.environment,
                                      cwd=self.folder)
                self.assertIn(f"{size} bytes".encode(), done.stdout, done.stderr)
        text = self.write("a.txt", "abc")
        for path in "~/x", "$HOME/x", "{a,b}":
            self.run_error("tokenizer", "encode", "-t", "bytes", "-o", path, text, says="argument -o/--out: expected a path")
            self.run_error("tokenizer", "count", "-t", path, text, says="argument -t/--tokenizer: expected a path")
            self.run_error("tinyshakespeare", "--local", path, "-o", self.out, says="argument --local: expected a path")

    def test_text_of_other_encodings_and_packed_text_is_named_with_the_command_that_helps(self):
        text = "一 line\nand\n"
        for name, content, says in [
                ("le.txt", b"\xff\xfe" + text.encode("utf-16le"), "found UTF-16; use: iconv -f UTF-16 -t UTF-8"),
                ("be.txt", b"\xfe\xff" + text.encode("utf-16be"), "found UTF-16; use: iconv -f UTF-16 -t UTF-8"),
                ("le.jsonl", ('{"text": "a"}\n').encode("utf-16"), "found UTF-16; use: iconv -f UTF-16 -t UTF-8"),
                ("bare le.txt", text.encode("utf-16le"), f"use: iconv -f UTF-16LE -t UTF-8 '{self.at('bare le.txt')}' > text.txt"),
                ("bare_be.txt", text.encode("utf-16be"), "use: iconv -f UTF-16BE -t UTF-8"),
                ("x.txt.gz", gzip.compress(b"abc"), f"gzip -dc {self.at('x.txt.gz')} > text.txt"),
                ("x.jsonl.gz", gzip.compress(b"{}"), "x.jsonl.gz > text.jsonl"),
                ("cut.txt", text.encode()[:1] + text.encode()[:2], "not UTF-8: byte 0xe4 at offset 0"),
                ("cut_end.txt", b"line\n" + text.encode()[:2], f"ends within a character: fetch it again, or cut that off: head -c 5 {self.at('cut_end.txt')}")]:
            with self.subTest(name=name):
                path = self.write(name, content)
                self.fake("tiktoken", FAKE_TIKTOKEN)
                self.encode_error("-t", self.write("tok.bin", tokenizer.Tokenizer(TokenizerFile.TOY, 1, [], "toy").data), path, says=says)
        with open(os.path.join(os.path.dirname(DATA), "keel", "formats.h")) as file:
            trainers = file.read()
        for _, _, name, command in shards.FOREIGN:
            self.assertIn(f'"{name}"', trainers)
            self.assertIn(f'"{command}"', trainers)

    @unittest.skipIf(os.geteuid() == 0, "root may read every file")
    def test_unreadable_file_is_named(self):
        path = self.write("secret.txt", "abc")
        os.chmod(path, 0)
        command = self.command("tokenizer", "encode", "-t", "bytes", "-o", self.out, path)
        done = subprocess.run(command, capture_output=True, env=self.environment)
        self.assertEqual((done.returncode, done.stderr.count(b"\n")), (1, 1), done.stderr)
        self.assertIn(b"secret.txt", done.stderr)

    def test_invalid_jsonl_line_is_named_by_number(self):
        good = '{"text": "a"}\n\n'
        for bad in ["{", "[]", "1", '{"txt": "a"}', '{"text": 1}', '{"text": null}', b'{"text": "\xff"}']:
            with self.subTest(bad=bad):
                path = self.write("a.jsonl", good.encode() + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
                self.encode_error(path, says="a.jsonl: line 3: ")

    def test_other_settings_are_refused_by_name(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        text = self.write("a.txt", "abcdefgh")
        other = self.write("b.txt", "abcdefgh")
        self.encode("--shard-tokens", 4, text)
        self.encode_error("--val-tokens", 5, text, says="val_tokens 0, this one 5")
        self.encode_error("--shard-tokens", 5, text, says="shard_tokens 4, this one 5")
        self.encode_error("--field", "t", text, says='field "text", this one "t"')
        self.encode_error("-t", "gpt2", text, says='tokenizer "CRC-32 ')
        self.encode_error(other, says="inputs [[\"a.txt\"")
        self.write("a.txt", "abcdefgH")
        self.encode_error(text, says="inputs [[\"a.txt\"")

    def test_shards_of_others_are_not_overwritten(self):
        text = self.write("a.txt", "abcdefgh")
        for name in ["x_val_000000.bin", "x_train_000001.bin", "x_train_000007.bin"]:
            path = self.write("out/" + name, "precious")
            self.encode_error(text, says=name)
            os.remove(path)
        self.write("out/x_progress.json", "{}")
        self.encode_error(text, says="not a progress file")

    def test_damaged_shard_stops_a_resume(self):
        text = self.write("a.txt", "abcdefghijkl")
        self.encode("--shard-tokens", 4, text)
        self.write("out/x_train_000001.bin", self.files()[self.at("out", "x_train_000001.bin")][:-2])
        self.encode_error(text, says="x_train_000001.bin: 4 tokens need")
        os.remove(self.at("out", "x_train_000001.bin"))
        self.encode_error(text, says="x_train_000001.bin")


class TinyShakespeare(Case):
    TEXT = "First Citizen:\nBefore we proceed.\n\nAll:\nSpeak, speak.\n\n\nEnd.\n"

    def test_local_text_is_kept_and_tokenized_as_llmc_does(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        local = self.write("input.txt", self.TEXT)
        self.run_ok("tinyshakespeare", "--local", local, "-o", self.out, "--tokenizer", "gpt2", "--val-tokens", 20)
        found = self.shard_files(self.out)
        self.assertEqual(found["tiny_shakespeare.txt"].decode(), self.TEXT)
        self.assertEqual(shards.read_header(self.at("out", "tiny_shakespeare_val_000000.bin")), (20, "H"))
        expected = []
        for part in ("<|endoftext|>" + self.TEXT.replace("\n\n", "\n\n<|endoftext|>")).split("<|endoftext|>")[1:]:
            expected += [50256] + [300 + byte for byte in part.encode()]
        self.assertEqual(self.all_tokens(self.out), expected)
        self.run_error("tinyshakespeare", "--local", self.write("b.txt", "b"), "-o", self.out, says="differs")
        self.run_error("tinyshakespeare", "-o", self.out, says="expected 1115394 bytes")

    def test_any_tokenizer_file_goes(self):
        local = self.write("input.txt", self.TEXT)
        mine = self.write("mine.bin", tokenizer.Tokenizer(tokenizer.load("bytes").ranks, 0, [], "mine").data)
        self.run_ok("tinyshakespeare", "--local", local, "-o", self.out, "--tokenizer", mine, "--val-tokens", 20)
        self.assertEqual(bytes(self.all_tokens(self.out)).decode(), self.TEXT)

    def test_fetch_checks_the_size_and_happens_once(self):
        path = os.path.join(self.out, "tiny_shakespeare.txt")
        with mock.patch("urllib.request.urlopen", side_effect=lambda *_, **__: io.BytesIO(b"a" * (tinyshakespeare.SIZE - 1))):
            with self.assertRaisesRegex(shards.DataError, "expected 1115394 bytes, received 1115393"):
                tinyshakespeare.provide_text(path, None)
        self.assertEqual(os.listdir(self.out), [])
        with mock.patch("urllib.request.urlopen", side_effect=lambda *_, **__: io.BytesIO(b"a" * tinyshakespeare.SIZE)) as urlopen:
            tinyshakespeare.provide_text(path, None)
            tinyshakespeare.provide_text(path, None)
        self.assertEqual(urlopen.call_count, 1)
        self.assertEqual(os.listdir(self.out), ["tiny_shakespeare.txt"])
        with mock.patch("urllib.request.urlopen", side_effect=OSError("no route")), self.assertRaisesRegex(shards.DataError, "--local"):
            tinyshakespeare.provide_text(self.at("out2", "t.txt"), None)


class FineWebEdu(Case):
    def setUp(self):
        super().setUp()
        self.fake("tiktoken", FAKE_TIKTOKEN)
        self.fake("huggingface_hub", FAKE_HUB)
        self.fake("pyarrow/__init__", "")
        self.fake("pyarrow/parquet", FAKE_PARQUET)
        self.environment["FAKE_HUB"] = self.at("hub")
        self.write("hub/revision", "c0ffee")
        self.texts = [f"document {i} " * (i % 7) for i in range(90)]
        for file in range(3):
            groups = [self.texts[30 * file + start : 30 * file + start + 10] for start in (0, 10, 20)]
            self.write(f"hub/sample/10BT/{file:03d}_00000.parquet", json.dumps(groups))
        self.expected = [i for text in self.texts for i in [50256] + [300 + byte for byte in text.encode()]]

    def test_sample_is_tokenized_in_order_and_goes_on_at_its_revision(self):
        options = ["-o", self.out, "--shard-tokens", 400, "--workers", 1]
        second = self.at("hub", "sample", "10BT", "001_00000.parquet")
        os.rename(second, second + ".away")
        self.write("hub/sample/10BT/001_00000.parquet", "broken")
        done = subprocess.run(self.command("fineweb_edu", *options), capture_output=True, env=self.environment)
        self.assertEqual((done.returncode, done.stderr.count(b"\n")), (1, 1), done.stderr)
        self.assertIn(b"001_00000.parquet: not a parquet file", done.stderr)
        os.rename(second + ".away", second)
        self.write("hub/revision", "newer")
        self.run_ok("fineweb_edu", *options)
        self.assertIn("going on after shard", self.stderr)
        self.assertEqual(self.all_tokens(self.out), self.expected)
        with open(self.at("out", "fineweb_edu_progress.json")) as file:
            self.assertEqual(json.load(file)["settings"]["revision"], "c0ffee")
        self.run_error("fineweb_edu", *options, "--revision", "newer", says='revision "c0ffee", this one "newer"')
        self.run_error("fineweb_edu", *options, "--max-files", 1, says="files 3, this one 1")

    def test_unreachable_hub_is_one_line(self):
        self.fake("huggingface_hub", FAKE_HUB.replace("return Object(sha=", "raise RuntimeError('no\\nroute'); ("))
        self.run_error("fineweb_edu", "-o", self.out, says="--local")

    def test_local_files_replace_the_hub(self):
        self.environment["FAKE_HUB"] = "/nowhere"
        files = [self.write_jsonl("a.jsonl", self.texts[:45]), self.write_jsonl("b.jsonl", self.texts[45:])]
        self.run_ok("fineweb_edu", "-o", self.out, "--shard-tokens", 1000, "--workers", 2, "--local", *files)
        self.assertEqual(self.all_tokens(self.out), self.expected)


def main():
    result = unittest.TextTestRunner(stream=sys.stdout).run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__]))
    for test, reason in result.skipped:
        print(f"skipped: {test.id()}: {reason}")
    # A test whose subtests fail counts once.
    failed = len({getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors})
    skipped = len(result.skipped)
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
