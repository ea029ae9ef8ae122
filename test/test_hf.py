"""Models of the trainers in Hugging Face's transformers, and back: dev/hf/export.py, import.py and what they write."""

import contextlib
import functools
import importlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("dev/hf", "dev", "dev/reference", "data")]
SHARED = tempfile.TemporaryDirectory()  # models that several cases look at
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": SHARED.name + "/modules", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
               "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import data
import export
import keel_file
import shards
import suite
import tokenizer as tokenizers

CPU, FP64, BF16 = (str(ROOT / name) for name in ("train_keel_cpu", "train_keel_cpu_fp64", "build/train_keel_on_cpu"))
import_ = importlib.import_module("import")
T = 256
TEXT = ROOT / "dev/doc/keel.md"
FP32_ERROR = 1e-5  # sums in another order; 2e-7 was seen
CACHED = 1e-6      # the largest difference of a logit by another way through the same FP32 weights, relative to the largest
torch.set_num_threads(1)  # a second would spin where other suites want the core


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, **options)


def succeed(*command):
    done = run(*command)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr}"
    return done.stdout


def call(module, *arguments):
    """A script's main() in this process: what it ends with, None or its line."""
    with (mock.patch.object(sys, "argv", [module.__file__, *map(str, arguments)]),
          contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO()))):
        try:
            return shards.run(module.main)
        except SystemExit as end:
            return end.code


def refused(module, *arguments):
    """The one line with which a script ends that does nothing."""
    line = call(module, *arguments)
    assert isinstance(line, str) and len(line.splitlines()) == 1, line
    return line


RUNS = {"fp32": (CPU, 48, 3, T), "fp64": (FP64, 48, 3, T), "wide": (CPU, 64, 2, 32)}  # binary, C, H, T


def once(make):
    """make(norm, run) is called once for each pair."""
    made = functools.cache(make)
    return lambda norm="keel", run="fp32": made(norm, run)


@once
def trained(norm, run):
    """The model file of a short run, whose gains are no longer 1."""
    (binary, C, H, T), folder = RUNS[run], Path(SHARED.name) / f"{norm}-{run}"
    succeed(binary, "-L", 8, "-C", C, "-H", H, "-t", T, "-b", 2, "--norm", norm, "-i", TEXT, "-x", 200, "-s", 0, "--probe", 50,
            "-v", 50, "-l", "1e-3" if norm == "post" else "6e-3", "-o", folder)  # Post-LN learns nothing at 6e-3
    return folder / "model_00000200.bin"


@once
def exported(norm, run):
    model = trained(norm, run)
    assert call(export, model, model.parent / "hf") is None
    return model.parent / "hf"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def ids(array):
    return torch.as_tensor(np.array(array)).long()


def error(ours, theirs):
    ours, theirs = (np.asarray(a, np.float64).ravel() for a in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@once
def dump(norm, run):
    """A debug state of the trained model, its text one token shorter, so that each row has a target after its last token."""
    model = trained(norm, run)
    succeed(RUNS[run][0], "-e", model, "-i", TEXT, "-t", T - 1, "-b", 2, "--dump", model.parent / "dump.bin")
    return keel_file.read(model.parent / "dump.bin")


# ---------------------------------------------------------------------------------------------------------
# The same function

def test_logits_highway_loss_and_gradients_are_the_trainers(folder):
    """For each placement logits, every x_l, the loss and every weight's gradient are those of --dump, in FP32."""
    for norm in keel_file.NORMS:
        d, model = dump(norm), load(exported(norm))
        text = torch.cat([ids(d.tensors["tokens"]), ids(d.tensors["targets"])[:, -1:]], 1)
        out = model(text, labels=text, output_hidden_states=True)
        logits, loss = error(out.logits[:, :-1].detach(), d.tensors["logits"]), abs(out.loss.item() / d.tensors["loss"][0] - 1)
        highway = [error(x[:, :-1].detach(), d.tensors["x"][l]) for l, x in enumerate(out.hidden_states)]
        assert len(highway) == d.cfg.L + 1 and max(logits, loss, *highway) <= FP32_ERROR, (norm, logits, loss, highway)
        out.loss.backward()
        weights = dict(model.named_parameters())
        headless = AutoModel.from_pretrained(exported(norm), trust_remote_code=True)
        assert torch.equal(headless(text).last_hidden_state, model.model(text).last_hidden_state)
        gradients = {name: error(weights[theirs].grad[:shape[0]], d.tensors["d" + name][:shape[0]])
                     for name, theirs, shape in export.their_tensors(d.cfg)}
        assert max(gradients.values()) <= 1e-4, (norm, gradients)  # a debug state's tolerance in FP32
        print(f"         {norm}: logits {logits:.1e}, loss {loss:.1e}, x_l at most {max(highway):.1e}, "
              f"gradients at most {max(gradients.values()):.1e}")


def test_fp64(folder):
    """A model of the FP64 build, loaded in FP64, has its logits and highway to 1e-12."""
    d, model = dump("hybridnorm", "fp64"), load(exported("hybridnorm", "fp64"), torch_dtype=torch.float64)
    out = model(ids(d.tensors["tokens"]), output_hidden_states=True)
    for ours, theirs in (out.logits, d.tensors["logits"]), (out.hidden_states[8], d.tensors["x"][8]):
        assert error(ours.detach(), theirs) < 1e-12, error(ours.detach(), theirs)


def test_greedy_text_is_the_trainers(folder):
    """Each placement writes the 200 likeliest tokens after a prompt that the trainer writes, by the KV cache."""
    for norm in keel_file.NORMS:
        model, prompt = load(exported(norm)), b"The gradient "
        printed = succeed(CPU, "-e", trained(norm), "--prompt", prompt.decode(), "-g", "200", "--temperature", "0")
        theirs = printed.split(b"--- sample", 1)[1].split(b"\n", 1)[1].rsplit(b"\n---", 1)[0]
        ours = model.generate(ids([list(prompt)]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=200, do_sample=False)
        print(f"         {norm}: {theirs[:100].decode()!r} ...")
        assert bytes(ours[0].tolist()) == theirs and len(theirs) == len(prompt) + 200, (norm, bytes(ours[0].tolist()), theirs)
        assert len(set(theirs[len(prompt):])) > 4, (norm, theirs)  # no text of spaces, which would prove little


def test_perplexity_is_the_trainers(folder):
    """The loss over the validation data, in the trainer's windows, is the trainer's."""
    for norm in keel_file.NORMS:
        printed = succeed(CPU, "-e", trained(norm), "-i", TEXT, "-b", "2", "-m", "16", "--ablate", "0").decode()
        theirs = float(next(line for line in printed.splitlines() if line.startswith("-1,whole")).split(",")[2])
        loader, model = data.Loader(data.read_text(str(TEXT))[1], T, 0, False), load(exported(norm))
        tokens, targets = loader.batch(0, loader.sequences)
        with torch.no_grad():
            ours = torch.nn.functional.cross_entropy(model(ids(tokens)).logits.flatten(0, 1), ids(targets).flatten()).item()
        print(f"         {norm}: {ours:.9g}, the trainer's {theirs:.9g}")
        assert abs(ours / theirs - 1) < FP32_ERROR, (norm, ours, theirs)


def test_tokenizer_and_text(folder):
    """AutoTokenizer gives the trainer's tokens of text and back: a vocabulary of merges with gaps among its special tokens, and
    bytes, all 256 of them; and the text after a prompt is the trainer's."""
    text = "The gradient of thé norm, the 1234 \0 Ā\t\n"
    tok = AutoTokenizer.from_pretrained(exported(), trust_remote_code=True)
    assert tok(text)["input_ids"] == list(text.encode()) and tok.decode(tok(text)["input_ids"]) == text
    assert [tok.decode([i], skip_special_tokens=False) for i in range(128)] == [chr(i) for i in range(128)] and len(tok) == 256

    ranks = [bytes([i]) for i in range(256)] + b"th|he| t| th| the|er|gr|gra|en|ie|ien|ient".split(b"|")
    mine = tokenizers.Tokenizer(ranks, 2, ["<|endoftext|>", "", "<|more|>"], "the test's")
    (folder / "tokenizer.bin").write_bytes(mine.data)
    succeed(CPU, "-L", 4, "-C", 48, "-t", T, "-b", 2, "--tokenizer", folder / "tokenizer.bin", "-i", TEXT, "-x", "200", "-s", "0",
            "-o", folder / "run")
    assert call(export, folder / "run/model_00000200.bin", folder / "hf") is None
    tok, model = AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=True), load(folder / "hf")
    found = tok(text.replace("\0", ""))["input_ids"]
    assert [ranks[i] for i in found][:6] == [b"T", b"he", b" ", b"gra", b"d", b"ient"]
    assert tok.decode(found) == text.replace("\0", "")
    assert tok.eos_token_id == tok.bos_token_id == model.generation_config.eos_token_id == 268 and model.config.vocab_size == 271
    printed = succeed(CPU, "-e", folder / "run/model_00000200.bin", "--prompt", "The grad", "-g", 60, "--temperature", 0).decode()
    theirs = printed.split("--- sample", 1)[1].split("\n", 1)[1].rsplit("\n---", 1)[0]
    ours = model.generate(**tok("The grad", return_tensors="pt"), max_new_tokens=60, do_sample=False)
    assert tok.decode(ours[0]) == theirs, (tok.decode(ours[0]), theirs)


# ---------------------------------------------------------------------------------------------------------
# What transformers offers

def close(a, b):
    return (a - b).abs().max() <= CACHED * b.abs().max()


def test_padding_on_either_side(folder):
    """Rows of several lengths, padded left or right, have the logits of each alone, and the same text follows them."""
    for norm in "keel", "hybridnorm":
        model, texts = load(exported(norm)), [list(b"The gradient"), list(b"of"), list(b"RMSNorm(")]
        longest = max(map(len, texts))
        for side in "left", "right":
            def pad(row, filler):
                padding = [filler] * (longest - len(row))
                return padding + row if side == "left" else row + padding

            batch = {"input_ids": ids([pad(t, 7) for t in texts]), "attention_mask": ids([pad([1] * len(t), 0) for t in texts])}
            logits = model(**batch).logits
            for row, t in enumerate(texts):
                mine = logits[row, -len(t):] if side == "left" else logits[row, :len(t)]
                assert close(mine, model(ids([t])).logits[0]), (norm, side, row)
            if side == "left":
                written = model.generate(**batch, max_new_tokens=30, do_sample=False)
                for row, t in enumerate(texts):
                    alone = model.generate(ids([t]), attention_mask=torch.ones(1, len(t)), max_new_tokens=30, do_sample=False)
                    assert written[row, longest:].tolist() == alone[0, len(t):].tolist(), (norm, row)


def test_caches(folder):
    """Text by a growing cache, by a static one, in pieces, by beams and without a cache is the same, and by either attention and
    kind of mask."""
    model, prompt = load(exported()), ids([list(b"The gradient ")])
    written_out = load(exported(), attn_implementation="eager")

    def text(model, **way):
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, **way).tolist()

    greedy = text(model)
    assert text(model, use_cache=False) == greedy
    assert text(model, num_beams=3) == text(model, num_beams=3, use_cache=False) != greedy
    whole, first = model(prompt).logits, model(prompt[:, :5], use_cache=True)
    rest = model(prompt[:, 5:], **{name: first[name] for name in ("cache", "past_key_values") if name in first})
    assert close(rest.logits, whole[:, 5:]) and close(model(prompt, logits_to_keep=2).logits, whole[:, -2:])
    assert close(model(inputs_embeds=model.get_input_embeddings()(prompt)).logits, whole)
    if torch.__version__ >= "2":  # where there is another attention than the written-out one
        assert model.config._attn_implementation == "sdpa" != written_out.config._attn_implementation
        assert close(written_out(prompt).logits, whole)
        assert all(text(m, cache_implementation="static") == greedy for m in (model, written_out))
    sees = torch.ones(13, 13).tril().bool()
    for mask in sees, torch.zeros(13, 13).masked_fill(~sees, torch.finfo(torch.float32).min):
        assert all(close(m(prompt, attention_mask=mask[None, None]).logits, whole) for m in (model, written_out))
    for wrong in torch.ones(1, 13, 13), torch.ones(1, 12), torch.ones(1, 14):
        with contextlib.suppress(ValueError):
            model(prompt, attention_mask=wrong)
            raise AssertionError(wrong.shape)


def test_gradient_checkpointing(folder):
    """Gradients are the same bits when sub-layers are computed again in the backward pass."""
    gradients = []
    for checkpointing in False, True:
        model, text = load(exported("mixln")).train(), ids([list(b"The gradient of Post-LN")])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False} if torch.__version__ >= "2" else None)
        calls = []
        model.model.sublayers[3].branch.register_forward_pre_hook(lambda *_: calls.append(1))
        model(text, labels=text).loss.backward()
        assert len(calls) == 1 + checkpointing
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


def test_labels_and_counts(folder):
    """-100 is no target, and num_items_in_batch divides the sum."""
    model, text = load(exported()), ids([list(b"The gradient")])
    labels = text.clone()
    labels[0, :6] = -100
    losses = torch.nn.functional.cross_entropy(model(text).logits[0, :-1], text[0, 1:], reduction="none")
    assert abs(model(text, labels=labels).loss - losses[5:].mean()) < 1e-6
    assert abs(model(text, labels=text, num_items_in_batch=100).loss - losses.sum() / 100) < 1e-6


def test_device_map(folder):
    """A model whose sub-layers lie in several places, some on the disk, has the same logits."""
    places = {"model.wte": "cpu", "lm_head": "cpu", "model.wpe": "cpu"}
    places |= {f"model.sublayers.{l}": "disk" if l % 3 else "cpu" for l in range(8)}
    model, text = load(exported()), ids([list(b"The gradient")])
    spread = load(exported(), device_map=places, offload_folder=str(folder))
    assert torch.equal(spread(text).logits, model(text).logits)


def test_new_models(folder):
    """A model from a configuration alone is initialised as the trainers do, DeepNorm's smaller matrices included."""
    config = AutoConfig.from_pretrained(exported("deepnorm"), trust_remote_code=True, num_hidden_layers=32, hidden_size=64,
                                        num_attention_heads=2)
    config.alpha = 64 ** 0.25
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).model
    std = lambda w: w.std().item() * w.shape[1] ** 0.5
    attention, feed_forward = model.sublayers[4].branch, model.sublayers[5].branch
    small = 64 ** -0.25
    for weight, expected in ((attention.qkv.weight[:128], 1), (attention.qkv.weight[128:], small), (attention.proj.weight, small),
                             (feed_forward.fc.weight, small), (feed_forward.proj.weight, small), (model.wte.weight, 1)):
        assert abs(std(weight) / expected - 1) < 0.03, (std(weight), expected)
    assert len(model.sublayers) == 64 and (model.sublayers[9].norm_out.weight == 1).all()


# ---------------------------------------------------------------------------------------------------------
# BF16

def cast(folder, how):
    if how == "dtype":
        return load(folder, torch_dtype=torch.bfloat16)
    if how == "device_map":
        return load(folder, torch_dtype=torch.bfloat16, device_map={"": "cpu"})
    return load(folder).to(torch.bfloat16) if how == "to" else load(folder).bfloat16()


def test_a_cast_keeps_the_highway(folder):
    """However a model is cast to BF16, its gains keep their FP32 values, x is FP32, and only the branches are BF16."""
    for norm in keel_file.NORMS:
        file, folder = keel_file.read(trained(norm)), exported(norm)
        for how in ("dtype", "device_map", "to", "bfloat16") if norm == "hybridnorm" else ("dtype", "to"):
            model = cast(folder, how)
            weights = dict(model.named_parameters())
            for name, theirs, _ in export.their_tensors(file.cfg):
                if name.startswith("gamma"):
                    assert np.array_equal(weights[theirs].detach().numpy(), file.tensors[name]), (norm, how, name)
                else:
                    assert weights[theirs].dtype == torch.bfloat16, (norm, how, name)
            types = set()
            for sublayer in model.model.sublayers:
                sublayer.branch.register_forward_hook(lambda _, u, f: types.add((u[0].dtype, f.dtype)))
            out = model(ids([list(b"The gradient")]), output_hidden_states=True)
            assert types == {(torch.bfloat16, torch.bfloat16)}, (norm, how)
            assert {x.dtype for x in out.hidden_states} == {torch.float32}, (norm, how)
        if norm == "hybridnorm":  # FP32 gains beside BF16 branches in the file
            model.save_pretrained(SHARED.name + "/cast")
            for dtype in "auto", "bfloat16", torch.bfloat16:
                again = load(SHARED.name + "/cast", torch_dtype=dtype, device_map={"": "cpu"})
                assert all(torch.equal(w, weights[name]) and w.dtype == weights[name].dtype
                           for name, w in again.named_parameters()), dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = load(folder)(ids([[1, 2]]), output_hidden_states=True)
            assert {x.dtype for x in out.hidden_states} == {torch.float32}


def test_what_a_bf16_highway_would_lose(folder):
    """At L = 64 the highway of a model in BF16 is within 5e-3 of the FP32 one's, and 1e-2 off where x is rounded to BF16 as well:
    so the bound of 5e-3 would find that."""
    model = keel_file.KeelFile(keel_file.MODEL, keel_file.Config(64, 256, 64, 2, 64), {}, header=np.zeros(256, "<i4"))
    import keel
    model.tensors = keel.init_params(model.cfg, 1337)
    keel_file.write(folder / "m.bin", model)
    assert call(export, folder / "m.bin", folder / "hf") is None
    text = ids([list(TEXT.read_bytes()[:64])])
    exact, bf16 = load(folder / "hf"), load(folder / "hf", torch_dtype=torch.bfloat16)
    rounded = load(folder / "hf", torch_dtype=torch.bfloat16)
    for sublayer in rounded.model.sublayers:
        sublayer.register_forward_hook(lambda _, inputs, x: x.bfloat16().float())
    with torch.no_grad():
        x, kept, lost = (m(text, output_hidden_states=True).hidden_states[-1].numpy() for m in (exact, bf16, rounded))
    assert error(kept, x) < 5e-3 and error(lost, x) > 1e-2, (error(kept, x), error(lost, x))


def test_bf16_logits_are_the_gpu_trainers(folder):
    """The GPU trainer's BF16 build, on the CPU, and a model cast to BF16 agree, each as far from FP32 as the other."""
    if not Path(BF16).exists():
        raise suite.Skip("no build/train_keel_on_cpu")
    model = trained("keel", "wide")
    succeed(BF16, "-e", model, "-i", TEXT, "-b", "2", "--dump", folder / "d.bin")
    d, hf = keel_file.read(folder / "d.bin"), exported("keel", "wide")
    with torch.no_grad():
        out = load(hf, torch_dtype=torch.bfloat16)(ids(d.tensors["tokens"]), output_hidden_states=True)
    assert error(out.logits.float(), d.tensors["logits"]) < 1.5e-2, error(out.logits.float(), d.tensors["logits"])
    assert error(out.hidden_states[-1], d.tensors["x"][-1]) < 1e-2, error(out.hidden_states[-1], d.tensors["x"][-1])


# ---------------------------------------------------------------------------------------------------------
# Files

def test_back_to_the_same_bytes(folder):
    """Export then import is the same file: FP32, FP64, BF16, each placement, a padded vocabulary, shards; and after
    save_pretrained."""
    def both_ways(model, *flags):
        shutil.rmtree(folder / "hf", ignore_errors=True)
        assert call(export, model, folder / "hf", *flags) is None
        assert call(import_, folder / "hf", folder / "back.bin") is None
        assert (folder / "back.bin").read_bytes() == model.read_bytes(), model
        (folder / "back.bin").unlink()

    for norm in keel_file.NORMS:
        both_ways(trained(norm))
    both_ways(trained("keel", "fp64"))
    file = keel_file.read(trained("hybridnorm"))
    file.type, file.branch_bf16, file.header = keel_file.BF16, True, np.array(file.header)
    file.header[3] = keel_file.BF16
    file.cfg.alpha, file.cfg.V, file.step = 1.0, 250, 2**40 + 3
    file.tensors["wte"] = np.where(np.arange(256)[:, None] < 250, file.tensors["wte"], 0)
    keel_file.write(folder / "bf16.bin", file)
    assert "V 256" in refused(export, folder / "bf16.bin", folder / "hf", "--tokenizer", exported() / "tokenizer.bin")
    file.cfg.V = 256
    keel_file.write(folder / "bf16.bin", file)
    both_ways(folder / "bf16.bin")

    model = trained()
    both_ways(model, "--max-shard-size", "1e5")
    assert len(list((folder / "hf").glob("*.safetensors"))) > 3
    load(folder / "hf").save_pretrained(folder / "again")
    assert call(import_, folder / "again", folder / "back.bin") is None
    assert (folder / "back.bin").read_bytes() == model.read_bytes()
    assert (folder / "again/modeling_keel.py").exists()
    assert torch.equal(load(folder / "again").lm_head.weight, load(folder / "hf").lm_head.weight)
    load(folder / "hf", torch_dtype=torch.bfloat16).save_pretrained(folder / "half")
    assert call(import_, folder / "half", folder / "half.bin") is None  # gains in FP32, the rest in BF16
    half, whole = keel_file.read(folder / "half.bin"), keel_file.read(model)
    assert np.array_equal(half.tensors["gamma_in[3]"], whole.tensors["gamma_in[3]"])
    assert np.array_equal(half.tensors["fcw[3]"], keel_file.bf16_to_fp32(keel_file.fp32_to_bf16(whole.tensors["fcw[3]"])))


def test_the_trainers_go_on_with_an_imported_model(folder):
    """A model that was cast, saved by transformers and imported is one that the trainer samples from."""
    load(exported(), torch_dtype=torch.bfloat16).save_pretrained(folder / "half")
    assert call(import_, folder / "half", folder / "half.bin") is None
    assert b"--- sample" in succeed(CPU, "-e", folder / "half.bin", "--prompt", "The", "-g", "5")


def test_the_card_tells_of_the_run(folder):
    """README.md has the run's settings, its curve's last validation and the probe's rows, to the logs' first 5 digits; the program
    that it shows runs, also where the model has few positions; and no damaged log stops it."""
    card, log = (exported() / "README.md").read_text(), (trained().parent / "log.csv").read_text().splitlines()
    last = dict(zip(log[0].split(","), log[-1].split(",")))
    for text in (f"| 200 | {float(last['loss']):.5g} | {float(last['val_loss']):.5g} |", "| peak learning rate | 0.006 |",
                 "| tokens a step | 512 |", "| seed | 1337 |", "At step 200: rms", "| alpha | 8 |"):
        assert text in card, (text, card)
    short = exported("keel", "wide")
    shown = (short / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("'hf'", repr(str(short)))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(shown, {})
    assert printed.getvalue().startswith("Once"), printed.getvalue()
    lone = folder / "m.bin"
    shutil.copy(trained(), lone)  # no run beside it
    assert call(export, lone, folder / "hf") is None
    assert "The model" in (folder / "hf/README.md").read_text() and "The run" not in (folder / "hf/README.md").read_text()
    for name in "log.csv", "probe.csv":  # after a crash
        (folder / name).write_bytes(b'step,sublayer,dx_norm,loss\n20,0,1,"2\n\n20,99,inf,inf\n40,1,nan,x\n40,\0\n'
                                    b"\xc2\xb2,1\n\xff\n60,x")
    assert call(export, lone, folder / "crashed") is None and "At step 20: rms" in (folder / "crashed/README.md").read_text()


def test_bad_input_is_one_line_and_leaves_nothing(folder):
    """A model without its tokenizer, another's tokenizer, a truncated or damaged file, other kinds, a folder in the way, a full
    disk."""
    (folder / "in").mkdir()
    model, out = folder / "in/model.bin", folder / "hf"
    before = lambda: sorted(p.name for p in folder.iterdir())
    shutil.copy(trained(), model)
    raw, names = model.read_bytes(), before()

    def fails(expected, *flags, path=model):
        line = refused(export, path, out, *flags)
        assert expected in line and before() == names, (expected, line, before())

    fails("expected a number of bytes", "--max-shard-size", "0")
    fails("expected a readable file", path=folder / "none.bin")
    for cut in 0, 1000, 5000, len(raw) - 1:
        model.write_bytes(raw[:cut])
        fails("cut off" if cut > 1024 else "header")
    model.write_bytes(raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:])
    fails("CRC-32")
    model.write_bytes(raw[:160] + b"\1" + raw[161:])
    fails("words of the header")
    model.write_bytes(b"\0" * 5000)
    fails("KEEL")
    fails("training state", path=next(trained().parent.glob("state_*")))
    dump()
    fails("debug state", path=trained().parent / "dump.bin")
    fails("kind", path=exported() / "tokenizer.bin")
    file = keel_file.read(trained())
    header = np.array(file.header)
    header[keel_file.TOKENIZER_WORD] = 77
    keel_file.write(model, keel_file.KeelFile(**{**vars(file), "header": header}))
    fails("give it by --tokenizer")
    fails("expected the model's tokenizer", "--tokenizer", exported() / "tokenizer.bin")
    shutil.copy(exported() / "tokenizer.bin", folder / "in/tokenizer.bin")
    fails("expected the model's tokenizer")
    model.write_bytes(raw)
    full_disk = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    done = run(sys.executable, export.__file__, model, out, preexec_fn=full_disk)
    assert done.returncode == 1 and b"File too large" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and before() == names, done.stderr
    done = run(sys.executable, import_.__file__, out, folder / "back.bin")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and before() == names, done.stderr
    for script in export, import_:  # -S: a Python without packages
        done = run(sys.executable, "-S", script.__file__, model, out)
        assert done.returncode == 1 and b"pip install numpy" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    with mock.patch.object(export.card, "write", side_effect=KeyboardInterrupt):
        fails("interrupted")
    for name in ".", "/":
        assert "expected nothing there" in refused(export, model, name)
    assert "expected its folder to exist" in refused(export, model, folder / "none/hf") and before() == names
    for name in "hf", "hf.tmp":
        (folder / name).mkdir()
        assert "expected nothing there" in refused(export, model, out)
        (folder / name).rmdir()

    assert call(export, model, out) is None
    weights = out / "model.safetensors"
    good = weights.read_bytes()
    length = int.from_bytes(good[:8], "little")
    tensors = json.loads(good[8:8 + length])
    moved = lambda offsets: tensors | {"model.wpe.weight": tensors["model.wpe.weight"] | {"data_offsets": offsets}}
    places = lambda *offsets: json.dumps(moved(offsets)).encode()
    wpe = T * 48 * 4
    for damage, expected in ((good[:-100], "safetensors"), (b"", "safetensors"),
                             (places(0, wpe), "overlap"), (places(-600, wpe - 600), "-600"),
                             (places(0.0, wpe), "0.0"), (b"[" * 100_000, "safetensors")):
        if damage[:1] in (b"{", b"["):
            damage = len(damage).to_bytes(8, "little") + damage + good[8 + length:]
        weights.write_bytes(damage)
        assert expected in refused(import_, out, folder / "back.bin")
    weights.write_bytes(good)
    config = json.loads((out / "config.json").read_text())
    for change, expected in (({"model_type": "gpt2"}, "type keel"), ({"hidden_size": 96}, "shape"), ({"norm": "pre"}, "too many"),
                             ({"norm": "none"}, "config.json"), ({"num_attention_heads": 5}, "5 heads"),
                             ({"num_hidden_layers": 10**8}, "200000000 sub-layers"), ({"alpha": 1e300}, "alpha"),
                             ({"step": -1}, "whole number"), ({"vocab_size": 256.0}, "whole number"),
                             ({"tokenizer_crc32": 2**40}, "whole number")):
        (out / "config.json").write_text(json.dumps(config | change))
        assert expected in refused(import_, out, folder / "back.bin"), expected
    (out / "config.json").write_text(json.dumps(config))
    index = out / "model.safetensors.index.json"
    for content in "", "[]", '{"weight_map": {"a": 1}}', json.dumps({"weight_map": {"a": "../hf/model.safetensors"}}):
        index.write_text(content)
        assert "names of the weights' files" in refused(import_, out, folder / "back.bin"), content
    index.unlink()
    (folder / "back.bin").write_text("mine")
    assert "found a file" in refused(import_, out, folder / "back.bin") and (folder / "back.bin").read_text() == "mine"
    (folder / "back.bin").unlink()
    assert sorted(p.name for p in folder.iterdir()) == ["hf", "in"]


@suite.long
def test_a_large_model_passes_in_pieces(folder):
    """A model of 0.3 GB is exported in less than 100 MB of memory, and imported with a tensor at a time."""
    cfg = keel_file.Config(1024, 256, 48, 8, 512)
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in keel_file.parameter_table(cfg)}
    keel_file.write(folder / "m.bin", keel_file.KeelFile(keel_file.MODEL, cfg, zeros))

    def peak(*command):
        """MB of memory that a command took at most."""
        code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr); " \
               "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)"
        return float(succeed(sys.executable, "-c", code, sys.executable, *command))

    size = (folder / "m.bin").stat().st_size / 1e6
    taken = peak(export.__file__, folder / "m.bin", folder / "hf", "--max-shard-size", "2e8")
    back = peak(import_.__file__, folder / "hf", folder / "back.bin")
    print(f"         a model of {size:.0f} MB: export took {taken:.0f} MB, import {back:.0f} MB")
    assert size > 300 and taken < 100 and (folder / "back.bin").read_bytes() == (folder / "m.bin").read_bytes()


def main():
    print(f"transformers {transformers.__version__}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    return suite.main(sys.modules[__name__])


if __name__ == "__main__":
    sys.exit(main())
