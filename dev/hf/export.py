#!/usr/bin/env python3
"""Writes a model of the trainers as a folder for Hugging Face's transformers, lm-eval and all that loads these.

    python3 dev/hf/export.py MODEL.bin OUT [--tokenizer FILE] [--max-shard-size BYTES]

    AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)

OUT gets config.json, generation_config.json, model.safetensors (several and an index above --max-shard-size), the tokenizer,
modeling_keel.py with what it imports, and README.md, a model card from the run's files beside MODEL.bin: its settings, curve and
what --probe measured. The weights keep the file's type, to the bit: import.py writes the same MODEL.bin from OUT. They pass
through memory in pieces of 16 MiB. OUT appears whole or not at all. Needs NumPy; with matplotlib the card has figures.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import struct
import sys
from pathlib import Path

try:
    import numpy as np
except ImportError as error:
    sys.exit(f"{sys.argv[0]}: {error} in {sys.executable}; pip install numpy, or take a Python that has it")

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "data")]
import card
import keel_file
import shards
import tokenizer as tokenizers
from keel_file import TOKENIZER_WORD, FileError, tensor_bytes

# A tensor's name in the file, without its sub-layer: its name in modeling_keel.py.
NAMES = {
    "wte": "model.wte.weight", "wpe": "model.wpe.weight", "gamma_final": "model.norm_final.weight",
    "gamma_in": "model.sublayers.{}.norm_in.weight", "gamma_out": "model.sublayers.{}.norm_out.weight",
    "qkvw": "model.sublayers.{}.branch.qkv.weight", "attprojw": "model.sublayers.{}.branch.proj.weight",
    "gamma_q": "model.sublayers.{}.branch.norm_q.weight", "gamma_k": "model.sublayers.{}.branch.norm_k.weight",
    "gamma_v": "model.sublayers.{}.branch.norm_v.weight",
    "fcw": "model.sublayers.{}.branch.fc.weight", "fcprojw": "model.sublayers.{}.branch.proj.weight",
}
TYPES = {keel_file.FP32: ("F32", "float32"), keel_file.BF16: ("BF16", "bfloat16"), keel_file.FP64: ("F64", "float64")}


def their_name(name):
    kind, _, index = name.partition("[")
    return NAMES[kind].format(index.rstrip("]"))


def their_tensors(cfg):
    """[(name in the file, name in modeling_keel.py, shape)] in the file's order. wte's padded rows, which are zero, stay behind."""
    return [(name, their_name(name), (cfg.V, *shape[1:]) if name == "wte" else shape)
            for name, shape in keel_file.parameter_table(cfg)]


# ------------------------------------------------------------------------------------------------
# Tokenizer


def find_tokenizer(file, model_path, given):
    """The Tokenizer that the model was trained with; a model of V 256 that names none was trained on bytes."""
    crc, beside = int(file.header[TOKENIZER_WORD]) % 2**32, model_path.parent / "tokenizer.bin"
    if given is None and crc == 0 and file.cfg.V == 256:
        return tokenizers.Tokenizer([bytes([byte]) for byte in range(256)], 0, [], "bytes")
    path = Path(given) if given else beside
    if given is None and (crc == 0 or not path.exists()):
        raise FileError(f"{model_path}: expected its tokenizer in {beside}, "
                        + (f"found none; the model names it by CRC-32 {crc:08x}: give it by --tokenizer" if crc else
                           f"but the model, of V {file.cfg.V}, does not name one; give the one of its data by --tokenizer"))
    tok = tokenizers.read_tokenizer(path)
    if (crc and tok.crc != crc) or tok.size > file.cfg.V:
        raise FileError(f"{path}: expected the model's tokenizer, {f'CRC-32 {crc:08x}' if crc else f'of at most V {file.cfg.V}'}, "
                        f"found {tok.crc:08x} of V {tok.size}; give the right one by --tokenizer")
    return tok


def tokenizer_files(tok, max_T):
    """{name: content} and the id of the token between documents. A vocabulary of bytes has none; byte 0, which no text has,
    stands for it and for padding: as a special token whose text is that byte, so that all bytes keep their ids."""
    content = tokenizers.to_hugging_face(tok)
    separator, name = tok.separator, None if tok.separator is None else tok.table[tok.separator].decode()
    if separator is None:
        separator, name = tok.id_of[b"\0"], "\0"
        content["model"]["vocab"][name] = content["model"]["vocab"].pop(tokenizers.letters(b"\0"))
        content["added_tokens"] = [{"id": separator, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                                    "normalized": False, "special": True}]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_T, "clean_up_tokenization_spaces": False,
              "model_input_names": ["input_ids", "attention_mask"],
              "bos_token": name, "eos_token": name, "pad_token": name}
    return {"tokenizer.json": content, "tokenizer_config.json": config}, separator


# ------------------------------------------------------------------------------------------------
# Weights


def plan_files(cfg, type, most):
    """[(name of the file, [(their name, shape)])]: the tensors in order, a new file where one would exceed `most` bytes."""
    files, size = [[]], 0
    for _, name, shape in their_tensors(cfg):
        n = tensor_bytes(shape, type)
        if files[-1] and size + n > most:
            files.append([])
            size = 0
        files[-1].append((name, shape))
        size += n
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    return list(zip(names if len(files) > 1 else ["model.safetensors"], files))


def safetensors_header(tensors, type):
    """A file's beginning: uint64 length, JSON with each tensor's place; the data follow. Written here, as the safetensors library
    takes no tensor in pieces."""
    content, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        end = at + tensor_bytes(shape, type)
        content[name] = {"dtype": TYPES[type][0], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_weights(folder, path, cfg, type, tensors, most):
    """tensors: the iterator of keel_file.open_file."""
    plan = plan_files(cfg, type, most)
    for shard, contents in plan:
        with open(folder / shard, "wb") as out:
            out.write(safetensors_header(contents, type))
            for _, shape in contents:
                name, _, _, _, chunks = next(tensors)
                left = tensor_bytes(shape, type)
                for raw in chunks:
                    out.write(raw[:left])
                    if raw[left:].strip(b"\0"):
                        raise FileError(f"{path}: {name}: expected zeros in the rows after V {cfg.V}, found others; "
                                        "the file is damaged")
                    left -= min(left, len(raw))
            out.flush()
            os.fsync(out.fileno())
    if next(tensors, None) is not None:  # also checks the CRC
        raise FileError(f"{path}: expected no tensor after {plan[-1][1][-1][0]}")
    if len(plan) > 1:
        total = sum(tensor_bytes(shape, type) for _, contents in plan for _, shape in contents)
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": total}, "weight_map": {name: shard for shard, contents in plan for name, _ in contents}})


# ------------------------------------------------------------------------------------------------
# The folder


def write_json(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def configuration(file, separator):
    cfg = file.cfg
    return {
        "architectures": ["KeelForCausalLM"], "model_type": "keel",
        "auto_map": {"AutoConfig": "configuration_keel.KeelConfig", "AutoModel": "modeling_keel.KeelModel",
                     "AutoModelForCausalLM": "modeling_keel.KeelForCausalLM"},
        "vocab_size": cfg.V, "hidden_size": cfg.C, "num_hidden_layers": cfg.L // 2, "num_attention_heads": cfg.H,
        "max_position_embeddings": cfg.max_T, "norm": cfg.norm, "alpha": cfg.alpha, "tie_word_embeddings": True,
        "torch_dtype": TYPES[file.type][1], "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token_id": separator, "eos_token_id": separator, "pad_token_id": separator,
        "step": file.step, "branch_bf16": file.branch_bf16, "tokenizer_crc32": int(file.header[TOKENIZER_WORD]) % 2**32}


def check_model(file, path):
    if file.kind != keel_file.MODEL:
        raise FileError(f"{path}: expected a model, model_*.bin, found a {keel_file.KINDS[file.kind]}")
    known = keel_file.header_of(file)
    known[17:TOKENIZER_WORD], known[TOKENIZER_WORD + 1:] = 0, 0  # what a model's header leaves free
    if (known != file.header).any():
        raise FileError(f"{path}: expected zeros in all words of the header that this version does not know, "
                        f"found {file.header[known != file.header]}; use the version that wrote it")


@contextlib.contextmanager
def whole_folder(out, needed):
    """The folder OUT.tmp to write into, which becomes OUT at the end and vanishes on any error."""
    unfinished = out.parent / (out.name + ".tmp")  # also where out is "." or "/", which have no name
    for path, what in ((out, "give another name, or remove it"), (unfinished, "another export writes it or was killed: remove it")):
        if path.exists() or path.is_symlink():
            raise FileError(f"{path}: expected nothing there, found a {'folder' if path.is_dir() else 'file'}; {what}")
    if not out.absolute().parent.is_dir():
        raise FileError(f"{out}: expected its folder to exist; create {out.absolute().parent} first")
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise FileError(f"{out}: expected {needed / 1e6:,.1f} MB free on its disk, found {free / 1e6:,.1f}; free some space")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def export(model_path, out, tokenizer_path=None, max_shard_size=5_000_000_000):
    file, tensors = keel_file.open_file(model_path)
    check_model(file, model_path)
    tok = find_tokenizer(file, model_path, tokenizer_path)
    files, separator = tokenizer_files(tok, file.cfg.max_T)
    files["config.json"] = configuration(file, separator)
    files["generation_config.json"] = {key: separator for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with whole_folder(out, os.path.getsize(model_path) + (8 << 20)) as folder:
        write_weights(folder, model_path, file.cfg, file.type, tensors, max_shard_size)
        for name, content in files.items():
            write_json(folder / name, content)
        (folder / "tokenizer.bin").write_bytes(tok.data)  # for import.py
        for source in (HERE / "configuration_keel.py", HERE / "modeling_keel.py", HERE.parent / "placements.py"):
            shutil.copy(source, folder)
        card.write(folder, model_path, file, tok, out.name)


def byte_count(text):
    try:
        if (value := float(text)) >= 1:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"expected a number of bytes such as 5e9, found {text!r}")


def stop(*_):
    raise KeyboardInterrupt


def main():
    parser = shards.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.bin")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--tokenizer", metavar="FILE", help="where it does not lie beside the model")
    parser.add_argument("--max-shard-size", metavar="BYTES", type=byte_count, default=5_000_000_000,
                        help="of a safetensors file (default: 5e9)")
    a = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        export(a.model, a.out, a.tokenizer, a.max_shard_size)
    except FileError as error:
        raise shards.DataError(error) from None
    print(f"{a.out}: {sum(f.stat().st_size for f in a.out.iterdir()) / 1e6:,.1f} MB, "
          f"AutoModelForCausalLM.from_pretrained({str(a.out)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    shards.run(main)
