"""PyTorch's side of dev/bench/bench_cpu.py: a few training steps of the reference model on the CPU, in one of the forms that
PyTorch may run fastest; bench_cpu.py looks for the best of them.

    python3 dev/bench/bench_cpu_torch.py       prints its version and, as JSON, what this PyTorch has to choose from
    python3 dev/bench/bench_cpu_torch.py '{"L": 16, "C": 256, "H": 4, "T": 256, "B": 4, "V": 256, "steps": 8, "threads": 2,
                                           "form": "eager", "norm": "F.rms_norm", "adamw": "fused", "weights": "(out,in)"}'

form     eager; blocks: torch.compile of each block, of the embedding and of the head; whole: torch.compile of the loss, one graph
norm     F.rms_norm, or the formula in PyTorch's operations (what torch.compile fuses itself)
adamw    default, foreach or fused
weights  how a branch's matrix lies in memory: (out,in), as nn.Linear's, or (in,out)

The model is that of the GPU's benchmark (dev/bench/bench_gpu_torch.py) with all in FP32. Prints the milliseconds of each step.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench_gpu_torch
import keel
from keel_file import Config


ADAMW = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def has_adamw(how):
    p = torch.zeros(1, requires_grad=True)
    p.grad = torch.zeros(1)
    try:
        torch.optim.AdamW([p], **ADAMW[how]).step()
    except (TypeError, RuntimeError):
        return False
    return True


def choices():
    return {"form": ["eager"] + ["blocks", "whole"] * hasattr(torch, "compile"),
            "norm": ["F.rms_norm"] * hasattr(F, "rms_norm") + ["formula"],
            "adamw": [how for how in ADAMW if has_adamw(how)],
            "weights": ["(out,in)", "(in,out)"]}


def main():
    if len(sys.argv) == 1:
        print(torch.__version__)
        print(json.dumps(choices()))
        return
    o = json.loads(sys.argv[1])
    B, T, V = o["B"], o["T"], o["V"]
    torch.set_num_threads(o["threads"])
    torch.manual_seed(1)
    if o["norm"] == "formula":
        F.rms_norm = lambda x, shape, gamma, eps: keel.rmsnorm(x, gamma)

    cfg = Config(max_T=T, V=V, L=o["L"], H=o["H"], C=o["C"])
    params = {name: torch.from_numpy(p) for name, p in keel.init_params(cfg, 1337).items()}
    if o["weights"] == "(in,out)":
        params = {name: p.t().contiguous().t() if p.dim() == 2 and "[" in name else p for name, p in params.items()}
    _, attention = bench_gpu_torch.usual_attention()
    if not hasattr(F, "scaled_dot_product_attention"):
        future = torch.full((T, T), -math.inf).triu(1)  # made once
        attention = lambda q, k, v: (q @ k.transpose(-2, -1) * cfg.D ** -0.5 + future).softmax(-1) @ v
    model = bench_gpu_torch.Model(cfg, params, attention, torch.float32, compiled=o["form"] == "blocks", with_checkpoint=False)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False) if o["form"] == "whole" else model.loss

    params = list(params.values())
    groups = [{"params": [p for p in params if p.dim() == 2], "weight_decay": 0.01},
              {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-12, **ADAMW[o["adamw"]])
    for _ in range(o["steps"]):
        start = time.perf_counter()
        text = torch.randint(V, (B, T + 1))
        optimizer.zero_grad(set_to_none=True)
        loss(text[:, :-1], text[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        print((time.perf_counter() - start) * 1e3, flush=True)


if __name__ == "__main__":
    main()
