#!/usr/bin/env python3
"""Tests of data/: python3 test/test_data.py. No network; stand-ins for tiktoken, pyarrow and the Hugging Face Hub."""

import array
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from unittest import mock

sys.dont_write_bytecode = True
DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")
sys.path.insert(0, DATA)

import shards  # noqa: E402
import tinyshakespeare  # noqa: E402

# In memory where there is such a folder: a kill loses nothing there either, and thousands of fsyncs take no time.
TEMPORARY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# Ids are byte + 300, so that they are neither bytes nor special tokens and order shows.
FAKE_TIKTOKEN = """
    class Encoding:
        eot_token = 50256
        def encode_ordinary(self, text):
            return [300 + byte for byte in text.encode()]
        def encode(self, text, allowed_special):
            assert allowed_special == {"<|endoftext|>"}
            ids = []
            for part in text.split("<|endoftext|>"):
                ids += [50256] + self.encode_ordinary(part)
            return ids[1:]
        def decode_bytes(self, ids):
            return b"".join(b"<|endoftext|>" if i == 50256 else bytes([i - 300]) for i in ids)
    def get_encoding(name):
        assert name == "gpt2"
        return Encoding()
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
        names = [name for name in os.listdir(folder) if name.endswith(".bin")]
        tokens = []
        for name in sorted(names, key=lambda name: name.split("_")[-1]):
            with open(os.path.join(folder, name), "rb") as file:
                content = file.read()
            tokens += struct.unpack(f"<{(len(content) - 1024) // 2}H", content[1024:])
        return tokens


class Format(Case):
    def test_header_and_tokens_are_llmc_bytes(self):
        text = self.write("a.txt", "abcdefgh\n")
        self.run_ok("shards", "-o", self.out, "--prefix", "x", "--tokenizer", "bytes", "--val-tokens", 3, "--shard-tokens", 4, text)
        found = self.shard_files(self.out)
        self.assertEqual(found["x_val_000000.bin"], struct.pack("<256i3H", 20240520, 1, 3, *[0] * 253, *b"abc"))
        self.assertEqual(found["x_train_000001.bin"], struct.pack("<256i4H", 20240520, 1, 4, *[0] * 253, *b"defg"))
        self.assertEqual(found["x_train_000002.bin"], struct.pack("<256i2H", 20240520, 1, 2, *[0] * 253, *b"h\n"))
        self.assertEqual(sorted(found), ["x_progress.json", "x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin"])

    def test_tokens_survive_write_and_read(self):
        tokens = array.array("H", [0, 1, 255, 256, 50256, 65535] * 5)
        with shards.ShardWriter(self.out, "x", 100, 7, {}) as writer:
            writer.add(tokens)
            writer.finish()
            self.assertEqual(shards.read_shard(writer.path(0)) + shards.read_shard(writer.path(1)), tokens)
            self.assertEqual(shards.read_shard(writer.path(1), 3), tokens[7:10])

    def test_no_shard_is_empty_where_the_tokens_end_at_a_border(self):
        text = self.write("a.txt", "abcdefg\n")
        self.run_ok("shards", "-o", self.out, "--prefix", "x", "--tokenizer", "bytes", "--shard-tokens", 4, text)
        self.assertEqual(sorted(self.shard_files(self.out)), ["x_progress.json", "x_train_000001.bin", "x_val_000000.bin"])

    def test_each_token_is_there_once_and_in_order_for_many_shard_sizes(self):
        generator = random.Random(1)
        texts = ["".join(generator.choices("ab é\n", k=generator.randrange(30))) for _ in range(60)]
        files = [self.write_jsonl("a.jsonl", texts[:40] + ["\ud800 alone"]),
                 self.write("b.txt", "plain"), self.write_jsonl("c.jsonl", texts[40:])]
        documents = texts[:40] + ["? alone", "plain"] + texts[40:]
        expected = b"".join(t.encode() + (b"" if t.endswith("\n") else b"\n") for t in documents)
        for shard_tokens, val_tokens in [(5, 1), (17, 3), (64, 200), (10**6, 10)]:
            out = self.at(f"out{shard_tokens}")
            with self.subTest(shard_tokens=shard_tokens), mock.patch.object(os, "fsync"), mock.patch("sys.stderr", io.StringIO()):
                args = mock.Mock(out=out, prefix="x", tokenizer="bytes", shard_tokens=shard_tokens, val_tokens=val_tokens, workers=1)
                shards.write_file_shards(args, files)
                self.assertEqual(bytes(self.all_tokens(out)), expected)
                for name in os.listdir(out)[:20]:
                    if name.endswith(".bin"):
                        self.assertLessEqual(shards.read_header(os.path.join(out, name)), val_tokens if "_val_" in name else shard_tokens)

    def test_info_and_decode_show_a_shard(self):
        text = self.write("a.txt", "höre, world\n" * 5)
        self.run_ok("shards", "-o", self.out, "--prefix", "x", "--tokenizer", "bytes", "--shard-tokens", 50, text)
        shard = os.path.join(self.out, "x_val_000000.bin")
        info = self.run_ok("shards", "--info", shard).decode()
        self.assertIn("magic 20240520, version 1, 50 tokens, 1,124 bytes", info)
        self.assertIn("first tokens: 104, 195, 182, ", info)
        self.assertEqual(self.run_ok("shards", "--decode", shard), ("höre, world\n" * 5).encode()[:50])
        self.assertEqual(self.run_ok("shards", "--decode", shard, "--count", 5).decode(), "höre")

    def test_what_is_no_whole_shard_is_named(self):
        good = struct.pack("<256i2H", 20240520, 1, 2, *[0] * 253, 1, 2)
        for content, says in [(b"", "has 0"), (good[:1000], "has 1000"), (good[:-1], "has 1027"), (good + b"x", "has 1029"),
                              (b"\1" + good[1:], "not a token shard")]:
            with self.subTest(says=says):
                self.run_error("shards", "--info", self.write("x.bin", content), says=says)
                self.run_error("shards", "--decode", self.at("x.bin"), says=says)
        self.run_error("shards", "--info", self.at("none.bin"), says="No such file")


class Tokenizers(Case):
    def test_bytes_decode_what_they_encode(self):
        text = "a, é \U0001f600 <|endoftext|>\n"
        ids = self.run_ok("shards", "--tokenizer", "bytes", "--encode", text).decode()
        self.assertEqual(ids.strip(), ",".join(map(str, text.encode())))
        self.assertEqual(self.run_ok("shards", "--tokenizer", "bytes", "--decode-ids", ids.strip()).decode(), text)
        spaced = ids.replace(",", " ").encode()
        self.assertEqual(self.run_ok("shards", "--tokenizer", "bytes", "--decode-ids", "-", stdin=spaced).decode(), text)
        self.run_error("shards", "--tokenizer", "bytes", "--decode-ids", "1,256", says="token 256")
        self.run_error("shards", "--tokenizer", "bytes", "--decode-ids", "1,a", says="'a'")

    def test_gpt2_puts_endoftext_before_each_document(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        files = [self.write("a.txt", "one\n"), self.write_jsonl("b.jsonl", ["two <|endoftext|>", "", "thrée"])]
        self.run_ok("shards", "-o", self.out, "--prefix", "x", "--shard-tokens", 10, *files)
        expected = []
        for text in ["one\n", "two <|endoftext|>", "", "thrée"]:
            expected += [50256] + [300 + byte for byte in text.encode()]
        self.assertEqual(self.all_tokens(self.out), expected)
        decoded = self.run_ok("shards", "--decode", os.path.join(self.out, "x_val_000000.bin")).decode()
        self.assertEqual(decoded, "<|endoftext|>one\n<|endoftext|>two ")

    def test_gpt2_prompt_may_start_with_endoftext(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        self.assertEqual(self.run_ok("shards", "--encode", "<|endoftext|>ab").decode(), "50256,397,398\n")
        self.assertEqual(self.run_ok("shards", "--decode-ids", "50256,397,398").decode(), "<|endoftext|>ab")
        self.run_error("shards", "--decode-ids", "50257", says="token 50257")

    def test_worker_processes_change_no_byte(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        texts = self.write_jsonl("a.jsonl", [f"document {i} " * (i % 50) for i in range(2500)])  # some four batches
        for workers in 1, 2:
            self.run_ok("shards", "-o", self.at(f"out{workers}"), "--prefix", "x", "--shard-tokens", 300_000, "--workers", workers, texts)
        self.assert_same_files(self.shard_files(self.at("out1")), self.shard_files(self.at("out2")))
        self.assertGreater(len(self.shard_files(self.at("out1"))), 3)

    def test_missing_package_is_named(self):
        self.fake("tiktoken", "raise ImportError('not installed')")
        text = self.write("a.txt", "abc")
        self.run_error("shards", "-o", self.out, "--prefix", "x", text, says="pip install tiktoken")
        self.run_error("shards", "--encode", "abc", says="pip install tiktoken")
        self.assertFalse(os.path.exists(self.out))
        self.fake("huggingface_hub", "raise ImportError('not installed')")
        self.run_error("fineweb_edu", "-o", self.out, says="pip install huggingface_hub pyarrow tiktoken")
        self.fake("pyarrow", "raise ImportError('not installed')")
        parquet = self.write("a.parquet", "x")
        self.run_error("shards", "-o", self.out, "--prefix", "x", "--tokenizer", "bytes", parquet, says="pip install pyarrow")

    def test_tiktoken_itself(self):
        try:
            tokenizer = shards.Gpt2Tokenizer()
        except shards.DataError as error:
            self.skipTest(str(error))
        self.assertEqual(tokenizer.encode("Hello world<|endoftext|>"), [15496, 995, 50256])
        self.assertEqual(list(tokenizer.document(b"Hello world")), [50256, 15496, 995])
        self.assertEqual(tokenizer.decode([15496, 995]), b"Hello world")


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
                with shards.ShardWriter(out, "x", 15, 10, {}) as writer:
                    for tokens in documents[writer.documents:] if not writer.finished else []:
                        counted(writer.add)(tokens)
                    if not writer.finished:
                        writer.finish()
            return calls

        points = write(self.at("whole"), None)
        expected = self.shard_files(self.at("whole"))
        self.assertEqual(sorted(expected)[1:], [f"x_train_{i:06d}.bin" for i in range(1, 5)] + ["x_val_000000.bin"])
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
        options = ["--prefix", "x", "--tokenizer", "bytes", "--shard-tokens", 70_000, "--val-tokens", 30_000, texts]
        self.run_ok("shards", "-o", self.at("whole"), *options)
        expected = self.shard_files(self.at("whole"))
        names = sorted((name for name in expected if name.endswith(".bin")), key=lambda name: name.split("_")[-1])
        generator, killed, resumed = random.Random(2), 0, 0
        for trial in range(600):  # as many as it takes: on a busy machine many a run ends before it is killed
            out = self.at(f"out{trial}")
            path = out if trial == 0 else os.path.join(out, generator.choice(names[:-5]))
            killed += self.kill_after(path, generator.uniform(0, 0.01), self.command("shards", "-o", out, *options))
            self.run_ok("shards", "-o", out, *options)
            resumed += "going on after shard" in self.stderr
            self.assert_same_files(self.shard_files(out), expected, f"trial {trial}")
            if killed >= 20 and resumed >= 10:
                break
        self.assertGreaterEqual(killed, 20, "too few runs were killed before their end")
        self.assertGreaterEqual(resumed, 10, "too few runs were killed between shards")

    def test_kill_with_workers_leaves_none_behind(self):
        self.fake("tiktoken", FAKE_TIKTOKEN + "\n    import time; time.sleep(0.2)\n")
        texts = self.write_jsonl("a.jsonl", [f"document {i} " * (i % 50) for i in range(2500)])
        command = self.command("shards", "-o", self.out, "--prefix", "x", "--shard-tokens", 300_000, "--workers", 2, texts)
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
        self.run_ok(*["shards", *command[2:]])
        self.run_ok("shards", "-o", self.at("whole"), *command[4:], "--workers", 1)
        self.assert_same_files(self.shard_files(self.out), self.shard_files(self.at("whole")))

    def running(self, pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def test_a_complete_run_is_not_written_again(self):
        text = self.write("a.txt", "abcdefgh" * 10)
        options = ["-o", self.out, "--prefix", "x", "--tokenizer", "bytes", "--shard-tokens", 30, text]
        self.run_ok("shards", *options)
        times = {name: os.stat(os.path.join(self.out, name)).st_mtime_ns for name in os.listdir(self.out)}
        self.run_ok("shards", *options)
        self.assertIn("complete already", self.stderr)
        self.assertEqual(times, {name: os.stat(os.path.join(self.out, name)).st_mtime_ns for name in os.listdir(self.out)})

    def test_two_runs_do_not_write_one_folder(self):
        text = self.write("a.txt", "abcdefgh")
        with shards.ShardWriter(self.out, "x", 4, 4, {}):
            self.run_error("shards", "-o", self.out, "--prefix", "x", "--tokenizer", "bytes", "--shard-tokens", 4, text, says="another run")

    def test_a_full_disk_is_one_line(self):
        text = self.write("a.txt", "abcdefgh" * 10)
        with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")), self.assertRaises(SystemExit) as stop:
            args = mock.Mock(out=self.out, prefix="x", tokenizer="bytes", shard_tokens=30, val_tokens=30, workers=1)
            shards.run(lambda: shards.write_file_shards(args, [text]))
        self.assertIn("No space left", stop.exception.code)
        self.assertEqual(os.listdir(self.out), [])


class BadInput(Case):
    def shards_error(self, *arguments, says):
        self.run_error("shards", "-o", self.out, "--prefix", "x", "--shard-tokens", 4, *arguments, says=says)

    def test_bad_inputs_are_one_line_and_write_nothing(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        good = self.write("good.txt", "abc")
        self.shards_error(says="FILES")
        self.shards_error(self.at("none.txt"), says="none.txt")
        self.shards_error(good, self.at("none.txt"), says="none.txt")
        self.shards_error(self.folder, says="directory")
        self.shards_error(self.write("empty.txt", ""), says="empty.txt: the file is empty")
        self.shards_error(self.write("latin1.txt", b"caf\xe9!"), says="latin1.txt: not UTF-8: byte 0xe9 at offset 3")
        self.shards_error("--tokenizer", "words", good, says="'words'")
        self.shards_error("--tokenizer", "bytes", self.write("short.txt", "ab"), says="no training shard")
        self.shards_error("--shard-tokens", "0", good, says="found '0'")
        self.shards_error("--shard-tokens", "3000000000", good, says="found '3000000000'")
        self.shards_error("--prefix", "a/b", good, says="'a/b'")
        self.shards_error("--info", "x.bin", good, says="good.txt")
        self.run_error("shards", "--prefix", "x", good, says="-o DIR")
        self.run_error("shards", "-o", self.out, good, says="--prefix")
        self.assertFalse(os.path.exists(self.out) and os.listdir(self.out))

    @unittest.skipIf(os.geteuid() == 0, "root may read every file")
    def test_unreadable_file_is_named(self):
        path = self.write("secret.txt", "abc")
        os.chmod(path, 0)
        command = self.command("shards", "-o", self.out, "--prefix", "x", "--tokenizer", "bytes", path)
        done = subprocess.run(command, capture_output=True, env=self.environment)
        self.assertEqual((done.returncode, done.stderr.count(b"\n")), (1, 1), done.stderr)
        self.assertIn(b"secret.txt", done.stderr)

    def test_invalid_jsonl_line_is_named_by_number(self):
        good = '{"text": "a"}\n\n'
        for bad in ["{", "[]", "1", '{"txt": "a"}', '{"text": 1}', '{"text": null}', b'{"text": "\xff"}']:
            with self.subTest(bad=bad):
                path = self.write("a.jsonl", good.encode() + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
                self.shards_error("--tokenizer", "bytes", path, says="a.jsonl: line 3: ")

    def test_other_settings_are_refused_by_name(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        text = self.write("a.txt", "abcdefgh")
        other = self.write("b.txt", "abcdefgh")
        self.run_ok("shards", "-o", self.out, "--prefix", "x", "--shard-tokens", 4, text)
        self.shards_error("--val-tokens", 5, text, says="val_tokens 4, this one 5")
        self.shards_error("--shard-tokens", 5, "--val-tokens", 4, text, says="shard_tokens 4, this one 5")
        self.shards_error("--tokenizer", "bytes", text, says='tokenizer "gpt2", this one "bytes"')
        self.shards_error(other, says="inputs [[\"a.txt\"")
        self.write("a.txt", "abcdefgH")
        self.shards_error(text, says="inputs [[\"a.txt\"")

    def test_shards_of_others_are_not_overwritten(self):
        text = self.write("a.txt", "abcdefgh")
        for name in ["x_val_000000.bin", "x_train_000001.bin", "x_train_000007.bin"]:
            path = self.write("out/" + name, "precious")
            self.shards_error("--tokenizer", "bytes", text, says=name)
            os.remove(path)
        self.write("out/x_progress.json", "{}")
        self.shards_error("--tokenizer", "bytes", text, says="not a progress file")

    def test_damaged_shard_stops_a_resume(self):
        text = self.write("a.txt", "abcdefghijkl")
        self.run_ok("shards", "-o", self.out, "--prefix", "x", "--tokenizer", "bytes", "--shard-tokens", 4, text)
        self.write("out/x_train_000001.bin", self.files()[self.at("out", "x_train_000001.bin")][:-2])
        self.shards_error("--tokenizer", "bytes", text, says="x_train_000001.bin: 4 tokens need")
        os.remove(self.at("out", "x_train_000001.bin"))
        self.shards_error("--tokenizer", "bytes", text, says="x_train_000001.bin")


class TinyShakespeare(Case):
    TEXT = "First Citizen:\nBefore we proceed.\n\nAll:\nSpeak, speak.\n\n\nEnd.\n"

    def test_local_text_is_kept_and_tokenized_as_llmc_does(self):
        self.fake("tiktoken", FAKE_TIKTOKEN)
        local = self.write("input.txt", self.TEXT)
        self.run_ok("tinyshakespeare", "--local", local, "-o", self.out, "--tokenizer", "gpt2", "--val-tokens", 20)
        found = self.shard_files(self.out)
        self.assertEqual(found["tiny_shakespeare.txt"].decode(), self.TEXT)
        self.assertEqual(shards.read_header(self.at("out", "tiny_shakespeare_val_000000.bin")), 20)
        expected = []
        for part in ("<|endoftext|>" + self.TEXT.replace("\n\n", "\n\n<|endoftext|>")).split("<|endoftext|>")[1:]:
            expected += [50256] + [300 + byte for byte in part.encode()]
        self.assertEqual(self.all_tokens(self.out), expected)
        self.run_error("tinyshakespeare", "--local", self.write("b.txt", "b"), "-o", self.out, says="differs")
        self.run_error("tinyshakespeare", "-o", self.out, says="expected 1115394 bytes")

    def test_bytes_shards_hold_the_text(self):
        local = self.write("input.txt", self.TEXT)
        self.run_ok("tinyshakespeare", "--local", local, "-o", self.out, "--tokenizer", "bytes", "--val-tokens", 20)
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
