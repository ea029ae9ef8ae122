#!/usr/bin/env python3
"""Measures a model of the trainers by lm-evaluation-harness (lm_eval 0.4.13, with PyTorch, transformers and accelerate).

    dev/hf/evaluate.sh MODEL TASK... [-- FLAGS]

MODEL   a model_*.bin, or a folder that export.py has written. A .bin is exported to a temporary folder, in $TMPDIR, for
        this run alone; export a large one once and give the folder.
TASK    hops:K      accuracy at the programs on which a run of --train hops:K validates (tasks/own.py)
        text:FILE   bits per byte of a text, every byte of it measured (tasks/own.py)
        keel_paper  benchmarks of the KEEL paper (tasks/keel_paper.yaml); fetches their data
        any other task or group of the harness, by name, or a task's .yaml
FLAGS   the harness's own, such as --limit 100, --batch_size 32, --device cuda:1, --output_path DIR or
        --model_args dtype=float32. --metadata sequences=N seed=S T=N: other programs for hops:K

With nothing but hops:K and text:FILE the network is not tried. Where benchmarks of keel_paper are among the tasks, their
plain mean is printed at the end.
"""

import functools
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
TASKS = HERE / "tasks"


class UsageError(Exception):
    """What was expected, what was found and what to do, in one line."""


# ------------------------------------------------------------------------------------------------
# Model and tasks


def check_model(path):
    if not path.is_file() and not (path / "modeling_keel.py").exists():
        found = "another folder" if path.is_dir() else "nothing; check the path"
        raise UsageError(f"{path}: expected a model_*.bin or a folder of dev/hf/export.py, found {found}")


def own_task(word, number, folder):
    """The .yaml of hops:K or text:FILE, which is written into the folder; None for a task of the harness."""
    kind, colon, argument = word.partition(":")
    if not colon or kind not in ("hops", "text"):
        return None
    if kind == "hops":
        if not re.fullmatch("[1-9]", argument):
            raise UsageError(f"{word}: expected hops:K with K from 1 to 9, found '{argument}'")
        argument = int(argument)
    elif not Path(argument).is_file():
        raise UsageError(f"{word}: expected text:FILE, found no file '{argument}'; check the path")
    else:
        argument = str(Path(argument).resolve())
    path = folder / f"{number}.yaml"
    path.write_text(json.dumps({"include": str(TASKS / f"{kind}.yaml"), "task": word, "dataset_kwargs": {kind: argument}}))
    return str(path)


def check_unsafe(words, flags):
    """Whether code that models write may run: the harness would ask only when the other benchmarks' data are fetched, and not say
    how to go on without."""
    if "keel_paper" in words and ("--confirm_run_unsafe_code" not in flags or os.environ.get("HF_ALLOW_CODE_EVAL") != "1"):
        others = " ".join(name for name in primary_metrics() if name not in ("humaneval", "mbpp"))
        raise UsageError("keel_paper: humaneval and mbpp run the code that the model writes; allow it by HF_ALLOW_CODE_EVAL=1 "
                         f"and -- --confirm_run_unsafe_code, or name the others: {others}")


# ------------------------------------------------------------------------------------------------
# The mean


def primary_metrics():
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(TASKS / "keel_paper.yaml")["metadata"]["primary"]


def paper_mean(results):
    """A line on the mean of the primary metrics of keel_paper's benchmarks; None where none was measured. results: of each
    task and group, {"metric,filter": value}."""
    primary = primary_metrics()
    found = {name: results[name][metric] for name, metric in primary.items() if metric in results.get(name, {})}
    if not found:
        return None
    without = [name for name in primary if name not in found]
    return (f"keel_paper | mean of {len(found)} of {len(primary)} benchmarks: {100 * sum(found.values()) / len(found):.2f} % | "
            + ", ".join(f"{name} {100 * value:.2f}" for name, value in found.items())
            + (f" | without {', '.join(without)}" if without else ""))


# ------------------------------------------------------------------------------------------------
# The run


def evaluate(model, words, flags, folder):
    check_model(model)
    exported = folder / model.stem if model.is_file() else model.resolve()
    own = [own_task(word, number, folder) for number, word in enumerate(words)]
    check_unsafe(words, flags)
    if all(own):
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if model.is_file():  # transformers copies a model's code there before it runs it
        os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "WARNING")

    import lm_eval.models.huggingface  # with all that it needs, before anything is exported
    import lm_eval.tasks
    import torch
    from lm_eval._cli import HarnessCLI
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import setup_logging

    if all(own):  # the harness's own tasks take seconds to list
        lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)

    # In place of the harness's simple_evaluate, which it calls once it has found its flags and tasks right.
    def export_and_evaluate(model_args, **arguments):
        if model.is_file():
            sys.path.insert(0, str(HERE))
            import export

            export.export(model, exported)
        config = json.loads((exported / "config.json").read_text())
        if "bfloat16" in (config.get("torch_dtype"), config.get("dtype")):  # its name before and after transformers 4.56
            model_args.setdefault("softmax_dtype", "float32")  # a log-likelihood of 8 bits tells no two choices apart
        results = simple_evaluate(model_args=model_args, **arguments)
        if results is not None:  # None: another rank has them
            figures.update(results["results"])
        return results

    figures, lm_eval.simple_evaluate = {}, export_and_evaluate
    gpu = torch.cuda.is_available()
    sys.argv = ["lm-eval", "run", "--model", "hf", "--include_path", str(TASKS),
                "--model_args", json.dumps({"pretrained": str(exported), "trust_remote_code": True}),
                "--device", "cuda" if gpu else "cpu", "--batch_size", "auto" if gpu else "8",
                "--tasks", *[mine or word for mine, word in zip(own, words)], *flags]
    setup_logging()
    cli = HarnessCLI()
    cli.execute(cli.parse_args())
    if line := paper_mean(figures):
        print(line)


def explain(error):
    """A line on what the user can put right: wrong words, a damaged file, what the harness refuses or cannot fetch. None: a fault
    in the program, whose traceback is worth more."""
    if isinstance(error, ImportError):
        return f"expected all that lm_eval[hf] needs in {sys.executable}, found: {error}; install that, or set PYTHON to another"
    line = traceback.extract_tb(error.__traceback__)[-1].line
    if isinstance(error, AssertionError) and "len(continuation_enc) <= self.max_length" in line:
        return "expected a model with as many positions as the longest answer of these tasks has tokens, found one with fewer"
    known = isinstance(error, (UsageError, ValueError, OSError)) or type(error).__name__ in ("FileError", "DataError")
    return str(error) if known else None


def main():
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(not words)
    words, flags = (words[:words.index("--")], words[words.index("--") + 1:]) if "--" in words else (words, [])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("evaluate.sh: stopped"))
    try:
        if len(words) < 2 or words[1].startswith("-"):
            raise UsageError("expected MODEL TASK... [-- FLAGS], found " + (" ".join(words) or "neither") + "; -h says more")
        with tempfile.TemporaryDirectory(prefix="keel_") as folder:
            evaluate(Path(words[0]), words[1:], flags, Path(folder))
    except KeyboardInterrupt:
        sys.exit("evaluate.sh: stopped")
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        sys.exit("evaluate.sh: " + " ".join(message.split()))


if __name__ == "__main__":
    main()
