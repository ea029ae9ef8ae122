#!/usr/bin/env python3
"""Writes a folder of export.py's, also one that transformers has saved again, as a model file of the trainers.

    python3 dev/hf/import.py OUT MODEL.bin

From a folder as export.py wrote it this makes the same MODEL.bin again, to the bit. Weights of two types, as of a model in BF16
whose norms' gains are FP32, become FP32. The tokenizer is copied beside MODEL.bin, unless there is one. One tensor at a time is
in memory. Needs NumPy.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "data")]
from export import TYPES, their_tensors  # first: it says where NumPy is missing
import keel_file
import numpy as np
import shards
from keel_file import TOKENIZER_WORD, FileError, tensor_bytes

OUR_TYPES = {theirs: ours for ours, (theirs, _) in TYPES.items()}


class Stored(NamedTuple):
    """A tensor in a safetensors file: its type's name there, its shape, and where its bytes begin."""
    path: Path
    dtype: str
    shape: tuple
    begin: int


def stored_tensors(path):
    """{name: Stored} of a safetensors file: uint64 length, JSON with each tensor's place, then the data, where no two overlap."""
    try:
        with open(path, "rb") as f:
            length, size, found = int.from_bytes(f.read(8), "little"), os.path.getsize(path), {}
            places = []
            for name, entry in json.loads(f.read(min(length, size))).items():
                if name == "__metadata__":
                    continue
                dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
                if not isinstance(dtype, str) or any(type(i) is not int or i < 0 for i in (*shape, begin, end)):
                    raise ValueError(f"{name} of {shape}, type {dtype}, at {begin} to {end}")
                if 8 + length + end > size or (dtype in OUR_TYPES and end - begin != tensor_bytes(shape, OUR_TYPES[dtype])):
                    raise ValueError(f"{name} of {shape} ends at {8 + length + end} of {size} bytes")
                found[name] = Stored(path, dtype, tuple(shape), 8 + length + begin)
                places.append((begin, end))
            places.sort()
            if any(begin < end for (_, end), (begin, _) in zip(places, places[1:])):
                raise ValueError("two tensors overlap")
            return found
    except FileNotFoundError:
        raise FileError(f"{path}: expected the weights there, found no such file; "
                        "have transformers save it by save_pretrained, or copy the folder again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: expected a safetensors file, found one that cannot be read ({error}); copy it again") from None


def weight_files(folder):
    """The names of the folder's safetensors files, all in it."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if outside := [name for name in names if not name or Path(name).name != name]:
            raise ValueError(f"the file {outside[0]!r}, which is not in the folder")
        return names
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{index}: expected the names of the weights' files, found {error!r}; copy it again") from None


class Weights(Mapping):
    """{name in the model file: array}, read when it is asked for; wte with its padded rows."""

    def __init__(self, folder, cfg):
        self.cfg, stored = cfg, {}
        for name in weight_files(folder):
            stored.update(stored_tensors(folder / name))
        same = "is config.json of the same model?"
        if cfg.L > len(stored):  # before a table of so many is made
            raise FileError(f"{folder}: expected the tensors of {cfg.L} sub-layers, found {len(stored)} tensors; {same}")
        wanted = {theirs: shape for _, theirs, shape in their_tensors(cfg)}
        stored.pop("lm_head.weight", None)  # wte again
        missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
        if missing or extra:
            raise FileError(f"{folder}: expected the tensors of a {cfg.norm} model of {cfg.L} sub-layers, missing {missing[:3]}, "
                            f"too many {extra[:3]}; {same}")
        for name, shape in wanted.items():
            if stored[name].shape != shape:
                raise FileError(f"{folder}: {name}: expected shape {shape}, found {stored[name].shape}; {same}")
        self.stored = {ours: stored[theirs] for ours, theirs, _ in their_tensors(cfg)}

    def type(self):
        """The model file's: the weights' own, or FP32 where they are FP32 and BF16."""
        found = {tensor.dtype for tensor in self.stored.values()}
        if found == {"F32", "BF16"}:
            return keel_file.FP32
        if len(found) > 1 or not found <= OUR_TYPES.keys():
            raise FileError(f"expected weights of one type of {', '.join(OUR_TYPES)}, or of F32 and BF16, found {sorted(found)}; "
                            "save the model in one of them")
        return OUR_TYPES[found.pop()]

    def __getitem__(self, ours):
        tensor = self.stored[ours]
        type = OUR_TYPES[tensor.dtype]
        with open(tensor.path, "rb") as f:
            f.seek(tensor.begin)
            array = keel_file.from_bytes(f.read(tensor_bytes(tensor.shape, type)), tensor.shape, type)
        return array if ours != "wte" else np.pad(array, ((0, self.cfg.Vp - self.cfg.V), (0, 0)))

    def __iter__(self):
        return iter(self.stored)

    def __len__(self):
        return len(self.stored)


def checked_config(c):
    """Config of config.json's content. What a header cannot hold is a ValueError."""
    sizes = [c[key] for key in ("max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size")]
    numbers = [(size, 1, 2**30) for size in sizes] + [(c.get("step", 0), 0, 2**63), (c.get("tokenizer_crc32", 0), 0, 2**32)]
    for value, least, end in numbers:
        if type(value) is not int or not least <= value < end:
            raise ValueError(f"{value!r} for a whole number from {least} to below {end}")
    max_T, V, blocks, H, C = sizes
    if C % H or c["norm"] not in keel_file.NORMS or type(c.get("branch_bf16", False)) is not bool:
        raise ValueError(f"{H} heads of {C} channels, norm {c['norm']!r}, branch_bf16 {c.get('branch_bf16')!r}")
    if c["alpha"] is not None and not abs(c["alpha"]) <= float(np.finfo("f4").max):
        raise ValueError(f"alpha {c['alpha']!r}")
    return keel_file.Config(max_T, V, 2 * blocks, H, C, c["norm"], c["alpha"])


def import_model(folder, path):
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if c.get("model_type") != "keel":
            raise FileError(f"{folder}: expected a model of type keel in config.json, found {c.get('model_type')!r}")
        cfg = checked_config(c)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{folder}/config.json: expected the configuration of a KEEL model, found {error!r}; "
                        "copy it again") from None
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
    except FileError as error:
        raise shards.DataError(error) from None
    print(f"{a.model}: {os.path.getsize(a.model) / 1e6:,.1f} MB")


if __name__ == "__main__":
    shards.run(main)
