"""Models of the trainers under lm-evaluation-harness: its figures are the trainer's and PyTorch's. Ends with `N passed,
N failed`."""

import contextlib
import csv
import functools
import io
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("test", "dev", "dev/hf", "dev/reference")]

import suite

# Before any of them is imported: nothing may be fetched, nor written elsewhere.
HOME = tempfile.TemporaryDirectory()
os.environ.update(HF_HOME=HOME.name, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", LMEVAL_LOG_LEVEL="ERROR", PYTHON=sys.executable)
os.environ["OMP_NUM_THREADS"] = "1"  # of models so small that threads only wait for each other
os.chdir(ROOT)

CPU = str(ROOT / "train_keel_cpu")
TINY = ["-L", "4", "-C", "32", "-H", "2", "-b", "16", "-s", "0"]


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)


def succeed(*command, **options):
    done = run(*command, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def need():
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise suite.Skip(f"pip install 'lm_eval[hf]' for {sys.executable}: {' '.join(str(error).split())}")


def train_hops(folder, K, *flags):
    """A model that answers some of its queries: (its file, {lookups: (how many were right, of how many)} in hops.csv)."""
    succeed(CPU, "-i", f"hops:{K}", *TINY, "-u", "25", "-l", "1e-2", *flags, "-o", folder)
    rows = list(csv.DictReader((folder / "hops.csv").read_text().splitlines()))
    rows = [row for row in rows if row["step"] == rows[-1]["step"]]
    return (next(folder.glob("model_*.bin")),
            {int(row["hops"]): (round(float(row["accuracy"]) * int(row["count"])), int(row["count"])) for row in rows})


def exported(model):
    import export

    export.export(model, model.with_suffix(""))
    return model.with_suffix("")


def measure(folder, *tasks, **metadata):
    """The harness's figures for an exported model, and each document's."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    pretrained = {"pretrained": str(folder)}
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        return lm_eval.simple_evaluate(
            "hf", pretrained | {"trust_remote_code": True}, list(tasks), batch_size=8, device="cpu", bootstrap_iters=0,
            task_manager=TaskManager(include_path=["dev/hf/tasks", "test/lm_eval_tasks"], include_defaults=False,
                                     metadata=pretrained | metadata))


def own_task(word, folder):
    import harness

    return harness.own_task(word, 0, folder)


def counts(results, K):
    """As hops.csv has them, of the documents that the harness was asked."""
    found = {h: [0, 0] for h in range(1, K + 1)}
    for sample in results["samples"][f"hops:{K}"]:
        found[sample["doc"]["lookups"]][0] += sample["acc"]
        found[sample["doc"]["lookups"]][1] += 1
    return {h: tuple(pair) for h, pair in found.items()}


def own():
    from lm_eval.tasks._yaml_loader import _load_module_with_cache

    return _load_module_with_cache(ROOT / "dev/hf/tasks/own.py")


def test_hops_programs_are_the_trainers(folder):
    """The port makes the trainer's programs, character by character, and knows their first answers: all K, training and
    validation, several lengths, seeds and sequences beyond 32 bits."""
    need()
    (folder / "programs.cpp").write_text("""
        #include "keel/hops.h"
        int main(int, char** word) {
            auto number = [&](int i) { return strtoull(word[i], nullptr, 10); };
            for (int K = 1; K <= MAX_HOPS; K++) {
                HopPrograms programs{K};
                int n = int(number(3)) * programs.length() + 3;
                std::vector<int> row(static_cast<size_t>(n));
                std::vector<HopPrograms::Answer> answers;
                programs.sequence(number(1), number(2), word[4][0] == '1', n, row.data(), &answers);
                for (int c : row) putchar(c);
                for (auto& answer : answers) printf("%d,%d ", answer.position, answer.hops);
                putchar('\\0');
            }
        }""")
    succeed(os.environ.get("CXX", "g++"), "-std=c++20", "-O0", f"-I{ROOT}", "-o", folder / "programs", folder / "programs.cpp")
    for seed, s, count, validation in ((1337, 0, 1, 1), (7, 123456789, 3, 1), (2**63 + 12345, 2**40 + 17, 2, 1), (1337, 5, 2, 0)):
        theirs = succeed(folder / "programs", seed, s, count, validation).split("\0")
        for K in range(1, 10):
            programs = own().Programs(K)
            text, answers = programs.sequence(seed, s, validation, count * programs.length + 3)
            ours = text + "".join(f"{at},{lookups} " for at, lookups in answers)
            assert ours == theirs[K - 1], f"hops:{K}, seed {seed}, sequence {s}:\n{ours}\n{theirs[K - 1]}"


def test_hops_accuracy_is_the_trainers(folder):
    """As many right answers as the trainer counted at its last validation, for each number of lookups: by its defaults, and
    with another seed, T of two programs and number of sequences."""
    need()
    for K, flags, metadata, expected in (
        (1, ["-x", "150"], {}, (0.55, 0.99)),
        (2, ["-x", "60", "-t", "103", "-m", "6", "--seed", "7"], {"seed": 7, "sequences": 6 * 16}, (0.05, 0.99)),
    ):
        model, theirs = train_hops(folder / str(K), K, *flags)
        results = measure(exported(model), own_task(f"hops:{K}", folder), **metadata)
        ours, figures = counts(results, K), results["results"][f"hops:{K}"]
        right, count = map(sum, zip(*theirs.values()))
        print(f"         hops:{K}: {figures['acc,none']:.4f} of {count}; the trainer's {right / count:.4f}")
        assert ours == theirs, (ours, theirs)
        assert expected[0] < right / count < expected[1], f"hops:{K}: {right} of {count} prove little"
        assert math.isclose(figures["acc,none"], right / count), figures
        for h, (right, count) in theirs.items():
            assert math.isclose(figures[f"acc_{h}_lookups,none"], right / count), figures


SENTENCES = """The cat sleeps on the mat. The gull sleeps on the mast. The fish sleeps in the sea. The waiter works in the café.
The miller works in the garden behind the old mill. The sailor works on the mast. The cat drinks milk.
The waiter drinks coffee at night. The gull drinks rain. The miller drinks tea. The sailor drinks rain.
Crème brûlée à la française.
""".split(". ")


def train_text(folder):
    """A model that has half learnt a text of sentences, and another text of them."""
    sentences = [SENTENCES[i * i * 31 % 1009 % len(SENTENCES)].strip() + ". " for i in range(3000)]
    (folder / "train.txt").write_text("".join(sentences), encoding="utf-8")
    (folder / "val.txt").write_text("".join(sentences[:60:-7])[:3000], encoding="utf-8")
    succeed(CPU, "-i", folder / "train.txt", *TINY, "-t", "64", "-x", "250", "-u", "20", "-l", "1e-2", "-v", "0",
            "-o", folder / "run")
    return next((folder / "run").glob("model_*.bin"))


def log_likelihood(model, context, continuation):
    """(sum of log p, whether each byte is the likeliest) of bytes after bytes, at most the last T + 1 of all, in float64."""
    import torch

    tokens = torch.tensor([list(context + continuation)[-(model.cfg.max_T + 1):]])
    log_p = model.forward(tokens[:, :-1])[0][0].log_softmax(-1)[-len(continuation):]
    targets = tokens[0, -len(continuation):]
    return log_p.gather(1, targets[:, None]).sum().item(), bool((log_p.argmax(-1) == targets).all())


def test_figures_are_pytorchs(folder):
    """Likelihoods, accuracies and perplexities of questions, cloze lines and a text are what the PyTorch reference computes
    in float64 from the model file, by itself."""
    need()
    import keel
    import torch

    file = train_text(folder)
    text = (folder / "val.txt").read_bytes()
    results = measure(exported(file), "keel_questions", "keel_cloze", own_task(f"text:{folder / 'val.txt'}", folder))
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in results["samples"].items()}
    figures = {name: {metric.split(",")[0]: value for metric, value in row.items()} for name, row in results["results"].items()}
    model = keel.from_file(file)
    read = lambda name: [json.loads(line) for line in (ROOT / "test/lm_eval_tasks" / name).read_bytes().splitlines()]
    close = lambda a, b: math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5)  # FP32 against FP64

    with torch.no_grad():
        picks = {"acc": [], "acc_norm": [], "acc_bytes": []}
        for question, sample in zip(read("questions.jsonl"), samples["keel_questions"], strict=True):
            choices = question["choices"]
            likelihoods = [log_likelihood(model, question["question"].encode(), b" " + choice.encode())[0] for choice in choices]
            for mine, (theirs, _) in zip(likelihoods, sample["filtered_resps"], strict=True):
                assert close(mine, theirs), (question, mine, theirs)
            # A norm divides by the choice's length without the space: acc_norm's in characters, acc_bytes's in bytes.
            for name, length in ("acc", lambda choice: 1), ("acc_norm", len), ("acc_bytes", lambda choice: len(choice.encode())):
                normed = [l / length(choice) for l, choice in zip(likelihoods, choices)]
                picks[name].append(normed.index(max(normed)))
        answers = [question["answer"] for question in read("questions.jsonl")]
        for name, picked in picks.items():
            right = sum(map(int.__eq__, picked, answers))
            assert figures["keel_questions"][name] == right / len(answers), (name, right, figures)
            assert 0 < right < len(answers) and (name == "acc" or picked != picks["acc"]), f"{picks} prove little"

        lines = [line["text"].encode().rpartition(b" ") for line in read("cloze.jsonl")]
        cloze = [log_likelihood(model, context, space + word) for context, space, word in lines]
        assert figures["keel_cloze"]["acc"] == sum(greedy for _, greedy in cloze) / len(cloze), (cloze, figures)
        assert 0 < sum(greedy for _, greedy in cloze) < len(cloze), cloze
        assert close(figures["keel_cloze"]["perplexity"], math.exp(-sum(l for l, _ in cloze) / len(cloze))), (cloze, figures)

        # Windows of T bytes, each after the one byte before it, the first after byte 0; the last reaches back to be full.
        T, total = model.cfg.max_T, 0
        for at in range(0, len(text), T):
            start = min(at, len(text) - T)
            total += log_likelihood(model, (b"\0" + text)[start:at + 1], text[at:at + T])[0]
        nats, theirs = -total / len(text), figures[f"text:{folder / 'val.txt'}"]
        assert close(theirs["byte_perplexity"], math.exp(nats)), (nats, theirs)
        assert close(theirs["bits_per_byte"], nats / math.log(2)), (nats, theirs)
        assert 0.1 < theirs["bits_per_byte"] < 4, theirs


def test_bits_per_byte_are_the_trainers(folder):
    """Of a text that fills its windows and a model with a token between documents, the harness finds the trainer's
    val_bits_per_byte."""
    need()
    succeed(sys.executable, "data/tokenizer.py", "import", "bytes", "-o", folder / "tok.bin")
    text = "".join(f"{i * i} sparrows. " for i in range(2000))
    (folder / "train.txt").write_text(text)
    (folder / "val.txt").write_text(text[-40 * 64:])
    succeed(CPU, "--tokenizer", folder / "tok.bin", "-i", folder / "train.txt", "-j", folder / "val.txt", *TINY, "-t", "64",
            "-x", "30", "-u", "5", "-l", "1e-2", "-m", "99", "-o", folder / "run")
    theirs = float(list(csv.DictReader((folder / "run/log.csv").read_text().splitlines()))[-1]["val_bits_per_byte"])
    task = own_task(f"text:{folder / 'val.txt'}", folder)
    ours, = measure(exported(next((folder / "run").glob("model_*.bin"))), task)["results"].values()
    assert math.isclose(ours["bits_per_byte,none"], theirs, rel_tol=1e-6), (ours, theirs)


@contextlib.contextmanager
def no_network():
    """The environment of a process that would have to go through a proxy, which nobody may ask for anything."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy")
        yield {key: address for name in names for key in (name, name.upper())} | {"NO_PROXY": "", "no_proxy": ""}
        proxy.settimeout(0.1)
        try:
            proxy.accept()
        except TimeoutError:
            return
        raise AssertionError("the network was tried")


def test_evaluate_sh(folder):
    """evaluate.sh measures a model file on programs and a text, writes what the harness's flags ask for, leaves nothing else
    behind and does not try the network."""
    need()
    model, theirs = train_hops(folder / "run", 1, "-x", "150")
    (folder / "text.txt").write_text("aba;bcb;cac;1ab\n")
    (folder / "tmp").mkdir()
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    with no_network() as proxies:
        printed = succeed("dev/hf/evaluate.sh", model, "hops:1", f"text:{folder / 'text.txt'}", "--", "--output_path",
                          folder / "out", env=environment | proxies | {"TMPDIR": str(folder / "tmp")})
    results = json.loads(next((folder / "out").rglob("results*.json")).read_text())["results"]
    right, count = theirs[1]
    assert results["hops:1"]["acc,none"] == right / count, (results, theirs)
    assert f"{right / count:.4f}" in printed and "bits_per_byte" in printed and "mean of" not in printed, printed
    left = [path for path in (folder / "tmp").iterdir() if path.name.startswith("keel_")]
    assert not left and sorted(path.name for path in folder.iterdir()) == ["out", "run", "text.txt", "tmp"], left


def test_bad_input_is_refused(folder):
    """What cannot be measured is refused in one line, with exit status 1, before anything is exported; nothing stays."""
    need()
    import harness
    import lm_eval.tasks

    model, _ = train_hops(folder / "run", 1, "-x", "25")
    small = exported(model)
    (folder / "bad.bin").write_bytes(model.read_bytes()[:-9])
    (folder / "bad.txt").write_bytes(b"a\xff")
    (folder / "tmp").mkdir()
    argv, directory, manager = sys.argv, tempfile.tempdir, lm_eval.tasks.TaskManager
    lm_eval.tasks.TaskManager = functools.partial(manager, include_defaults=False)  # its own take seconds to list
    tempfile.tempdir = str(folder / "tmp")
    try:
        for words, expected in (
            ([], None),
            ([model], "expected MODEL TASK"),
            ([folder / "none.bin", "hops:1"], "none.bin: expected a model_*.bin"),
            ([folder, "hops:1"], "found another folder"),
            ([folder / "bad.bin", "hops:1"], "bad.bin: size of this model"),
            ([model, "hops:0"], "hops:0: expected hops:K"),
            ([model, "hops:2"], "expected a model of at least 51 positions"),
            ([model, "hops:1", "--", "--metadata", "T=22"], "expected T from 23"),
            ([model, "text:none"], "text:none: expected text:FILE"),
            ([small, f"text:{folder / 'bad.txt'}"], "expected UTF-8"),
            ([model, "no_such_task"], "Tasks not found: no_such_task"),
            ([model, "keel_paper"], "--confirm_run_unsafe_code"),
            ([model, "hops:1", "--", "--no_such_flag"], None),  # the harness prints its usage
            ([small, "test/lm_eval_tasks/questions.yaml"], "as many positions as the longest answer"),
        ):
            sys.argv, message = ["evaluate.sh", *map(str, words)], None
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
                try:
                    harness.main()
                except SystemExit as exit:
                    message = exit.code
            right = message if expected is None else expected in str(message) and "\n" not in message
            assert right, (words, message, out.getvalue())
            assert not list((folder / "tmp").iterdir()), words
    finally:
        sys.argv, tempfile.tempdir, lm_eval.tasks.TaskManager = argv, directory, manager
    done = run("dev/hf/evaluate.sh", folder / "none.bin", "hops:1")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done


def test_keel_paper_is_there(folder):
    """This version of the harness has every benchmark of the group, with the figure of which the mean is taken."""
    need()
    import harness
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    primary, theirs = harness.primary_metrics(), Path(lm_eval.tasks.__file__).parent
    # Of its thousands of tasks, which take seconds to list, only those in folders called as ours are.
    folders = [max((path for path in theirs.iterdir() if name.startswith(path.name)), key=lambda path: len(path.name))
               for name in primary]
    index = TaskManager(include_path=["dev/hf/tasks", *folders], include_defaults=False).task_index
    members = index["keel_paper"].cfg["task"]
    assert members == list(primary), (members, primary)
    for name, figure in primary.items():
        metric, filter = figure.split(",")
        config = load_yaml(index[name].yaml_path, resolve_func=False)
        metrics = config["metric_list"] if "metric_list" in config else config["aggregate_metric_list"]
        # pass@1 is one of the figures of a function, pass_at_k.
        found = [row for row in metrics if str(row["metric"]).endswith(metric.replace("@1", "_at_k"))]
        filters = [row["name"] for row in config.get("filter_list", [])] or [found[0].get("filter_list", "none")]
        assert found and filter in filters, (name, figure, metrics, filters)
        for child in config.get("task", []) if "group" in config else []:
            assert child in index, (name, child)


def test_mean_of_keel_paper(folder):
    """The mean is that of the primary metrics, of the benchmarks that were measured, and names the others."""
    need()
    import harness

    line = harness.paper_mean({"piqa": {"acc,none": 0.1, "acc_norm,none": 0.5}, "humaneval": {"pass@1,create_test": 0.25},
                               "hops:1": {"acc,none": 1.0}})
    expected = "keel_paper | mean of 2 of 11 benchmarks: 37.50 % | piqa 50.00, humaneval 25.00 | without hellaswag, "
    assert line.startswith(expected), line
    assert harness.paper_mean({"hops:1": {"acc,none": 1.0}}) is None


if __name__ == "__main__":
    sys.exit(suite.main(sys.modules[__name__]))
