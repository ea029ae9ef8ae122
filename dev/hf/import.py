#!/usr/bin/env python3
"""Writes a folder of export.py's, also one that transformers has saved again, as a model file of the trainers.

    python3 dev/hf/import.py OUT MODEL.bin

Of a folder as export.py wrote it that is the file it was made of, to the bit. Weights of several types, as of a BF16 model whose
norms' gains are FP32, become FP32. The tokenizer goes beside MODEL.bin, where there is none yet. A tensor is in memory at a time.
Needs NumPy, PyTorch and safetensors.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "data")]
import numpy as np

import keel_file
import shards
from export import TOKENIZER_WORD, TYPES, their_tensors
from keel_file import FileError


class Weights(Mapping):
    """Our name -> array, read when it is asked for; wte with its padded rows."""

    def __init__(self, folder, cfg):
        import torch
        from safetensors import SafetensorError, safe_open
        self.torch, self.cfg = torch, cfg
        self.theirs = {ours: (name, shape) for ours, name, shape in their_tensors(cfg)}
        index = folder / "model.safetensors.index.json"
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
        self.file_of = {}
        for name in files:
            path = folder / name
            if not path.exists():
                raise FileError(f"{path}: expected the weights there, found no such file; "
                                "have transformers save it with safe_serialization=True, or copy the folder again")
            try:
                opened = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise FileError(f"{path}: expected a safetensors file, found one that cannot be read ({error}); copy it again") from None
            self.file_of.update(dict.fromkeys(opened.keys(), opened))
        missing = [name for name, _ in self.theirs.values() if name not in self.file_of]
        extra = self.file_of.keys() - {name for name, _ in self.theirs.values()} - {"lm_head.weight"}  # tied, where it was saved
        if missing or extra:
            raise FileError(f"{folder}: expected the tensors of a {cfg.norm} model of {cfg.L} sub-layers, missing {missing[:3]}, "
                            f"too many {sorted(extra)[:3]}; is config.json of the same model?")
        for name, shape in self.theirs.values():
            found = tuple(self.file_of[name].get_slice(name).get_shape())
            if found != shape:
                raise FileError(f"{folder}: {name}: expected shape {shape}, found {found}; is config.json of the same model?")

    def type(self):
        """Of the file: the weights' own, or FP32 where they differ."""
        found = {self.file_of[name].get_slice(name).get_dtype() for name, _ in self.theirs.values()}
        types = {theirs: ours for ours, (theirs, _) in TYPES.items()}
        if found == {"F32", "BF16"}:
            return keel_file.FP32
        if len(found) > 1 or not found <= types.keys():
            raise FileError(f"{sorted(found)}: expected weights of one of {', '.join(types)}, or F32 and BF16; save the model in one of them")
        return types[found.pop()]

    def __getitem__(self, ours):
        name, shape = self.theirs[ours]
        tensor = self.file_of[name].get_tensor(name)
        array = (tensor.float() if tensor.dtype == self.torch.bfloat16 else tensor).numpy()
        return array if ours != "wte" else np.pad(array, ((0, self.cfg.Vp - self.cfg.V), (0, 0)))

    def __iter__(self):
        return iter(self.theirs)

    def __len__(self):
        return len(self.theirs)


def import_model(folder, path):
    try:
        c = json.loads((folder / "config.json").read_text())
        if c.get("model_type") != "keel":
            raise FileError(f"{folder}: expected a model of type keel in config.json, found {c.get('model_type')!r}")
        if c["norm"] not in keel_file.NORMS:
            raise ValueError(f"norm {c['norm']!r}")
        cfg = keel_file.Config(c["max_position_embeddings"], c["vocab_size"], 2 * c["num_hidden_layers"], c["num_attention_heads"],
                               c["hidden_size"], c["norm"], c["alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{folder}/config.json: expected the configuration of a KEEL model, found {error!r}; copy it again") from None
    weights = Weights(folder, cfg)
    header = np.zeros(256, "<i4")
    header[TOKENIZER_WORD:TOKENIZER_WORD + 1] = np.array([c.get("tokenizer_crc32", 0)], "<u4").view("<i4")
    file = keel_file.KeelFile(keel_file.MODEL, cfg, weights, weights.type(), step=c.get("step", 0),
                              branch_bf16=c.get("branch_bf16", False), header=header)
    if path.exists():
        raise FileError(f"{path}: expected nothing there, found a file; give another name, or remove it")
    keel_file.write(path, file)
    beside = path.parent / "tokenizer.bin"
    if c.get("tokenizer_crc32") and (folder / "tokenizer.bin").exists() and not beside.exists():
        shutil.copy(folder / "tokenizer.bin", beside)


def main():
    parser = shards.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("model", type=Path, metavar="MODEL.bin")
    a = parser.parse_args()
    try:
        import_model(a.folder, a.model)
    except ImportError as error:
        raise shards.DataError(f"{error}: pip install torch safetensors") from None
    except FileError as error:
        raise shards.DataError(error) from None
    print(f"{a.model}: {os.path.getsize(a.model) / 1e6:,.1f} MB")


if __name__ == "__main__":
    shards.run(main)
