#!/usr/bin/env python3
"""Reads and writes the trainers' binary files: model, training state, debug state (NumPy only).

    python3 dev/keel_file.py FILE      prints the header and a table of the tensors; of a tokenizer its tokens

A file is a header of 256 int32 (1024 bytes), the tensors that `tensor_table` lists, in that order, and
the CRC-32 of all bytes before it; everything little-endian. `parameter_table` says which tensors a model has, by its norm
placement's rows in placements.py.
"""

import os
import struct
import sys
import zlib
from dataclasses import dataclass, field

import numpy as np

from placements import FINAL_NORM, NORMS, default_alpha, sub_layer

HEADER_BYTES = 1024
MAGIC = int.from_bytes(b"KEEL", "little")
VERSION = 1
MODEL, STATE, DEBUG, TOKENIZER = 1, 2, 3, 4  # tokenizers are data/tokenizer.py's, and only printed here
KINDS = {MODEL: "model", STATE: "training state", DEBUG: "debug state"}
FP32, BF16, FP64 = 0, 1, 2
TYPES = {FP32: "fp32", BF16: "bf16", FP64: "fp64"}
TYPE_BYTES = {FP32: 4, BF16: 2, FP64: 8}
CHUNK_BYTES = 1 << 24  # of a tensor at a time, where a file is larger than memory
TOKENIZER_WORD = 49  # of a header: the CRC-32 of the model's tokenizer, 0 where there is none


class FileError(Exception):
    """A file that is not what it should be; the message says expected, found and what to do."""


# ---------------------------------------------------------------------------------------------------------
# Models

@dataclass
class Config:
    max_T: int
    V: int  # vocabulary
    L: int  # sub-layers: attention for even l, feed-forward for odd l
    H: int  # heads
    C: int  # channels
    norm: str = "keel"
    alpha: float = None  # None: the placement's default; always a value that FP32 holds

    def __post_init__(self):
        self.alpha = float(np.float32(default_alpha(self.norm, self.L) if self.alpha is None else self.alpha))

    @property
    def Vp(self):  # rows of wte
        return (self.V + 127) // 128 * 128

    @property
    def D(self):  # head size
        return self.C // self.H


# ---------------------------------------------------------------------------------------------------------
# Tensors

def parameter_table(cfg):
    """[(name, shape)] in parameter order. Matrices are (out, in). The index is that of the sub-layer.
    Gains are the tensors of one dimension; AdamW decays the others."""
    C, D, table = cfg.C, cfg.D, [("wte", (cfg.Vp, cfg.C)), ("wpe", (cfg.max_T, cfg.C))]
    for l in range(cfg.L):
        s = sub_layer(cfg, l)
        if s.norm_in:
            table += [(f"gamma_in[{l}]", (C,))]
        if l % 2 == 0:
            table += [(f"qkvw[{l}]", (3 * C, C))]  # rows: q, k, v; head h at h*D in each
            if s.norm_qkv:
                table += [(f"gamma_{i}[{l}]", (D,)) for i in "qkv"]
            table += [(f"attprojw[{l}]", (C, C))]
        else:
            table += [(f"fcw[{l}]", (4 * C, C)), (f"fcprojw[{l}]", (C, 4 * C))]
        if s.norm_out:
            table += [(f"gamma_out[{l}]", (C,))]
    if cfg.norm in FINAL_NORM:
        table += [("gamma_final", (C,))]
    return table


def tensor_table(kind, cfg, B=0, T=0):
    """[(name, shape, is_int)] of everything between header and CRC, in file order.
    Prefixes of a parameter's name: d its gradient, m_ and v_ AdamW's first and second moment."""
    def params(prefix):
        return [(prefix + name, shape, False) for name, shape in parameter_table(cfg)]
    table = params("")
    if kind == STATE:
        table += params("m_") + params("v_")
    if kind == DEBUG:
        stream = (cfg.L + 1, B, T, cfg.C)
        table += [("tokens", (B, T), True), ("targets", (B, T), True), ("loss", (1,), False),
                  ("logits", (B, T, cfg.V), False), ("x", stream, False)]
        table += params("d") + [("dx", stream, False)]
    return table


@dataclass
class KeelFile:
    kind: int
    cfg: Config
    tensors: dict  # name -> array, in file order
    type: int = FP32  # of the reals as stored
    B: int = 0
    T: int = 0
    step: int = 0
    branch_bf16: bool = False
    header: np.ndarray = field(default=None, repr=False)  # all 256 int32 of a file that was read

    def parameter_list(self, prefix=""):
        """Parameters ("") or their gradients ("d") or moments ("m_", "v_"), in parameter order."""
        return [self.tensors[prefix + name] for name, _ in parameter_table(self.cfg)]


def tensor_bytes(shape, type):
    return int(np.prod(shape, dtype=object)) * TYPE_BYTES[type]


def bf16_to_fp32(a):  # BF16 is the upper half of an FP32
    return (a.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(a):
    """Round to nearest, ties to even. NaN keeps its upper half, with a mantissa bit set so that it stays NaN."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(a), (bits >> 16) | 0x40, rounded).astype("<u2")


def to_bytes(a, type):
    a = fp32_to_bf16(a) if type == BF16 else np.ascontiguousarray(a, "<f8" if type == FP64 else "<f4")
    return a.tobytes()


def from_bytes(raw, shape, type):
    a = np.frombuffer(raw, {FP32: "<f4", BF16: "<u2", FP64: "<f8"}[type]).reshape(shape)
    return bf16_to_fp32(a) if type == BF16 else a


# ---------------------------------------------------------------------------------------------------------
# Reading and writing

def parse_header(raw, path):
    """(header as int32, KeelFile without tensors)"""
    def expect(ok, what, expected, found, todo="is it a file of this project?"):
        if not ok:
            raise FileError(f"{path}: {what}: expected {expected}, found {found}; {todo}")

    expect(len(raw) == HEADER_BYTES, "header", f"{HEADER_BYTES} bytes", f"{len(raw)}", "copy or write the file again")
    h = np.frombuffer(raw, "<i4")
    expect(h[0] == MAGIC, "magic", "'KEEL'", repr(raw[:4]))
    expect(h[1] == VERSION, "version", VERSION, h[1], "use the reader of the version that wrote it")
    kind, type, max_T, V, Vp, L, H, C, norm = (int(i) for i in h[2:11])
    expect(kind in KINDS, "kind [2]", f"one of {KINDS}", kind)
    allowed = (FP32, FP64) if kind == DEBUG else (FP32, BF16, FP64)
    expect(type in allowed, "type [3]", " or ".join(f"{t} ({TYPES[t]})" for t in allowed), type)
    damaged = "the header is damaged, copy or write the file again"
    sizes = [max_T, V, L, H, C]
    expect(min(sizes) > 0, "max T, V, L, H, C [4,5,7,8,9]", "positive numbers", sizes, damaged)
    expect(L % 2 == 0, "sub-layers L [7]", "an even number", L, damaged)
    expect(C % H == 0, "channels C [9]", f"a multiple of the {H} heads", C, damaged)
    expect(0 <= norm < len(NORMS), "norm placement [10]", f"0..{len(NORMS) - 1}", norm, damaged)
    alpha = float(h[11:12].view("<f4")[0])
    expect(np.isfinite(alpha), "alpha [11]", "a finite number", alpha, damaged)
    cfg = Config(max_T, V, L, H, C, NORMS[norm], alpha)
    expect(Vp == cfg.Vp, "padded vocabulary Vp [6]", f"{cfg.Vp} for V {V}", Vp, damaged)
    B, T = (int(h[12]), int(h[13])) if kind == DEBUG else (0, 0)
    if kind == DEBUG:
        expect(B > 0 and 0 < T <= max_T, "batch B, T [12,13]", f"B > 0, T in 1..{max_T}", [B, T], damaged)
    return h, KeelFile(kind, cfg, {}, type, B, T, int(h[14:16].view("<i8")[0]), bool(h[16]), h)


def open_file(path):
    """(KeelFile without tensors, an iterator over its tensors): header and size are checked here, the CRC after the last tensor.
    The iterator gives (name, shape, type, is_int, an iterator over its bytes in chunks), and each must be read to its end."""
    try:
        size = os.path.getsize(path)
        f = open(path, "rb")
    except OSError as e:
        raise FileError(f"{path}: expected a readable file, found: {e.strerror}; check the path") from None
    with f:
        raw = f.read(HEADER_BYTES)
    _, out = parse_header(raw, path)
    table = [(name, shape, FP32 if is_int else out.type, is_int)
             for name, shape, is_int in tensor_table(out.kind, out.cfg, out.B, out.T)]
    expected = HEADER_BYTES + sum(tensor_bytes(s, t) for _, s, t, _ in table) + 4
    if size != expected:
        raise FileError(f"{path}: size of this {KINDS[out.kind]}: expected {expected} bytes, found {size}; "
                        "it is cut off or not of this header, copy or write the file again")

    def tensors():
        with open(path, "rb") as f:
            crc = zlib.crc32(f.read(HEADER_BYTES))

            def chunks(left):
                nonlocal crc
                while left:
                    raw = f.read(min(left, CHUNK_BYTES))
                    if not raw:
                        raise FileError(f"{path}: expected {left} more bytes, found none; it was cut off while it was read")
                    crc, left = zlib.crc32(raw, crc), left - len(raw)
                    yield raw

            for name, shape, type, is_int in table:
                yield name, shape, type, is_int, chunks(tensor_bytes(shape, type))
            found = struct.unpack("<I", f.read(4))[0]
        if crc != found:
            raise FileError(f"{path}: CRC-32: expected {crc:08x} for these bytes, found {found:08x}; "
                            "the file is damaged, copy or write it again")
    return out, tensors()


def read(path):
    """KeelFile of any kind, checked; reals as float64 for type fp64, else float32 (BF16 is widened)."""
    out, tensors = open_file(path)
    for name, shape, type, is_int, chunks in tensors:
        raw = b"".join(chunks)
        out.tensors[name] = np.frombuffer(raw, "<i4").reshape(shape) if is_int else from_bytes(raw, shape, type)
    return out


def header_of(file):
    """The 256 int32 of a KeelFile's header."""
    cfg = file.cfg
    h = np.zeros(HEADER_BYTES // 4, "<i4") if file.header is None else np.array(file.header, "<i4")
    h[:11] = [MAGIC, VERSION, file.kind, file.type, cfg.max_T, cfg.V, cfg.Vp, cfg.L, cfg.H, cfg.C,
              NORMS.index(cfg.norm)]
    h[11:12] = np.array([cfg.alpha], "<f4").view("<i4")
    h[12:14] = file.B, file.T
    h[14:16] = np.array([file.step], "<i8").view("<i4")
    h[16] = file.branch_bf16
    return h


def write(path, file):
    """Writes a KeelFile of any kind, whole or not at all; `file.tensors`, a mapping, must hold exactly the tensors of
    `tensor_table`, and each is asked for once, in that order."""
    table = tensor_table(file.kind, file.cfg, file.B, file.T)
    wrong = {name for name, _, _ in table} ^ set(file.tensors)
    if wrong:
        raise FileError(f"{path}: expected the tensors of a {KINDS[file.kind]}, missing or too many: {sorted(wrong)}")
    unfinished = f"{path}.tmp"
    try:
        with open(unfinished, "wb") as f:
            raw = header_of(file).tobytes()
            crc = zlib.crc32(raw)
            f.write(raw)
            for name, shape, is_int in table:
                a = np.asarray(file.tensors[name])
                if a.shape != shape:
                    raise FileError(f"{path}: {name}: expected shape {shape}, found {a.shape}")
                raw = np.ascontiguousarray(a, "<i4").tobytes() if is_int else to_bytes(a, file.type)
                crc = zlib.crc32(raw, crc)
                f.write(raw)
            f.write(struct.pack("<I", crc))
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
    except BaseException:
        if os.path.exists(unfinished):
            os.remove(unfinished)
        raise


# ---------------------------------------------------------------------------------------------------------
# The command

def print_tokenizer(raw, path):
    """The header, then a line a token: id and bytes."""
    if len(raw) < HEADER_BYTES + 4 or zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        raise FileError(f"{path}: CRC-32: expected another for these bytes; the file is damaged, copy or write it again")
    V, split, specials = (int(i) for i in np.frombuffer(raw[:HEADER_BYTES], "<i4")[[5, 7, 8]])
    print(f"tokenizer {raw[-4:][::-1].hex()}, V {V}, {specials} of them special, split {split}\n")
    at = HEADER_BYTES
    for token in range(V):
        length = int.from_bytes(raw[at : at + 2], "little")
        print(f"{token:7} {raw[at + 2 : at + 2 + length]!r}" + (" special" if token >= V - specials else ""))
        at += 2 + length


def print_file(file):
    cfg = file.cfg
    print(f"{KINDS[file.kind]}, {TYPES[file.type]}, step {file.step}" + (", branch BF16" if file.branch_bf16 else ""))
    print(f"L {cfg.L}  C {cfg.C}  H {cfg.H}  D {cfg.D}  V {cfg.V}  Vp {cfg.Vp}  max T {cfg.max_T}  "
          f"norm {cfg.norm}  alpha {cfg.alpha:.9g}" + (f"  B {file.B}  T {file.T}" if file.kind == DEBUG else ""))
    if file.header[TOKENIZER_WORD]:
        print(f"tokenizer {int(file.header[TOKENIZER_WORD]) % 2**32:08x}")
    print(f"{sum(int(np.prod(s)) for _, s in parameter_table(cfg))} parameters\n")
    print(f"{'tensor':<18} {'shape':<18} {'rms':>12} {'min':>12} {'max':>12}")
    for name, a in file.tensors.items():
        parts = [(f"{name}[{l}]", a[l]) for l in range(cfg.L + 1)] if name in ("x", "dx") else [(name, a)]
        for part, values in parts:
            values = values.astype(np.float64)
            print(f"{part:<18} {str(values.shape):<18} {np.sqrt(np.mean(values ** 2)):12.5g} "
                  f"{values.min():12.5g} {values.max():12.5g}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python3 dev/keel_file.py FILE")
    try:
        with open(sys.argv[1], "rb") as f:
            is_tokenizer = f.read(12) == struct.pack("<3i", MAGIC, VERSION, TOKENIZER)
            f.seek(0)
            print_tokenizer(f.read(), sys.argv[1]) if is_tokenizer else print_file(read(sys.argv[1]))
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FileError, OSError) as e:
        sys.exit(str(e))
