"""Measures what a BF16 highway loses: relative error and cosine of x_L - x_2 against FP32's, for new KEEL models of each depth and seed.

    python3 dev/experiments/highway_measure.py -i 'text/*.py' -L 64 256 1024 -o out.csv
"""

import argparse
import os
import sys
from pathlib import Path

import shared  # finds the reference
import torch

import keel
from data import Loader, read_text
from keel_file import Config, sub_layer


class RoundedHighway(keel.KeelGPT):
    """x and z in BF16 wherever they are made: a stream stored in BF16, computed in FP32."""

    def forward(self, tokens):
        def bf16(t):
            return t.to(torch.bfloat16).float()
        p, x = self.params, bf16(self.cfg.C ** 0.5 * (self.params["wte"][tokens] + self.params["wpe"][:tokens.shape[1]]))
        xs = [x]
        for l in range(self.cfg.L):
            s = sub_layer(self.cfg, l)
            u = self.branch_input(x, l, s)
            f = self.attention_branch(u, l, s.norm_qkv) if l % 2 == 0 else self.feed_forward_branch(u, l)
            z = bf16(s.alpha * x + f)
            x = bf16(keel.rmsnorm(z, p[f"gamma_out[{l}]"])) if s.norm_out else z
            xs.append(x)
        return None, xs


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("-i", "--train", required=True, metavar="PATH|GLOB")
    a.add_argument("-o", "--out", required=True, type=Path, metavar="FILE")
    a.add_argument("-L", "--layers", type=int, nargs="+", required=True)
    for short, name, default in (("-C", "channels", 64), ("-H", "heads", 2), ("-t", "seq-len", 64), ("-b", "batch", 1), ("-S", "seeds", 2)):
        a.add_argument(short, "--" + name, type=int, default=default)
    o = a.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    try:
        text, _ = read_text(o.train)
    except FileNotFoundError as e:
        sys.exit(f"highway_measure.py: {e}")
    rows = []
    for L in o.layers:
        for seed in range(shared.SEED, shared.SEED + o.seeds):
            cfg = Config(o.seq_len, 256, L, o.heads, o.channels)
            params = keel.init_params(cfg, seed)
            tokens = torch.from_numpy(Loader(text, o.seq_len, seed, True).batch(0, o.batch)[0].copy())
            ways = {"exact": keel.KeelGPT(cfg, params, dtype=torch.float32), "branch": keel.KeelGPT(cfg, params, dtype=torch.float32, branch_dtype=torch.bfloat16),
                    "highway": RoundedHighway(cfg, params, dtype=torch.float32)}
            added = {}
            with torch.no_grad():
                for way, model in ways.items():
                    _, xs = model.forward(tokens)
                    added[way] = (xs[L] - xs[2]).double().flatten()
            for way in ("highway", "branch"):
                error = (added[way] - added["exact"]).norm() / added["exact"].norm()
                cosine = torch.dot(added[way], added["exact"]) / added[way].norm() / added["exact"].norm()
                rows.append({"L": L, "C": o.channels, "seed": seed, "rounded": way, "error": f"{error:.4g}", "cosine": f"{cosine:.5f}"})
                print(" ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    shared.write_csv(o.out, rows)


if __name__ == "__main__":
    main()
