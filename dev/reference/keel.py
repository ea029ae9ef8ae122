"""The KEEL GPT in PyTorch: what the trainers' passes are compared with. Autograd does the backward.

Every norm placement runs the one general sub-layer of `KeelGPT.forward`; the table that drives it is
`sub_layer` in dev/placements.py. Parameters are a dict name -> tensor in parameter order.
Shapes: B batch, T sequence length, C channels, H heads, D = C/H, V vocabulary, L sub-layers.
"""

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import keel_file
from keel_file import parameter_table, sub_layer

RMS_EPS = 1e-6


# ---------------------------------------------------------------------------------------------------------
# Initialisation: the same bits as in the C++ and CUDA trainers

def philox4x32_10(counter, key):
    """Salmon et al. 2011, Philox4x32 with 10 rounds. counter: four uint32 arrays, key: two uint32 numbers.
    Returns the four output words as uint32 arrays."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)  # 64 bits wide, to hold a product
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = ((p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), p1 & mask,
                          (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), p0 & mask)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c.astype(np.uint32) for c in (c0, c1, c2, c3)]


def uniform(seed, stream, n):
    """n float32 in [0, 1), multiples of 2^-24: element e is word e mod 4 of counter (e/4, stream)."""
    block = np.arange((n + 3) // 4, dtype=np.uint64)
    words = philox4x32_10((block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), stream, 0),
                          (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    word = np.stack(words, axis=-1).reshape(-1)[:n]
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0 ** -24)


def init_bound(cfg, name, shape):
    """(rows, 1) float32: matrices are uniform in [-bound, bound), variance bound^2/3 = 1/fan_in."""
    bound = np.full(shape[0], math.sqrt(3.0 / shape[1]))
    if cfg.norm == "deepnorm":  # V, output projection and both FFN matrices; L's default alpha, not -a's
        first_row = {"qkvw": 2 * cfg.C, "attprojw": 0, "fcw": 0, "fcprojw": 0}.get(name.split("[")[0], shape[0])
        bound[first_row:] *= cfg.L ** -0.25
    return bound.astype(np.float32)[:, None]


def init_params(cfg, seed):
    """dict name -> float32 array. Gains are 1; wte's padded rows are 0."""
    params = {}
    for index, (name, shape) in enumerate(parameter_table(cfg)):
        if len(shape) == 1:
            params[name] = np.ones(shape, np.float32)
        else:
            u = uniform(seed, index, shape[0] * shape[1]).reshape(shape)
            params[name] = init_bound(cfg, name, shape) * (2 * u - 1)  # 2u-1 is exact: one rounding in all
    params["wte"][cfg.V:] = 0
    return params


# ---------------------------------------------------------------------------------------------------------
# The model

def rmsnorm(x, gamma):
    """g * x / sqrt(mean(x^2) + eps) over the last dimension"""
    return gamma * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)


def attention(q, k, v):  # each (B,H,T,D)
    T, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B,H,T,T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


class KeelGPT:
    """params: dict name -> array or tensor in parameter order.
    sdpa: PyTorch's fused attention (2.0 and later) in place of the written-out one.
    branch_dtype: type of the branch F_l and the head (torch.bfloat16: what the GPU trainer does);
    the highway x stays in `dtype`."""

    def __init__(self, cfg, params, dtype=torch.float64, device="cpu", sdpa=False, branch_dtype=None):
        self.cfg, self.dtype, self.branch_dtype = cfg, dtype, branch_dtype or dtype
        self.attention = partial(F.scaled_dot_product_attention, is_causal=True) if sdpa else attention
        self.params = {name: torch.as_tensor(np.array(p) if isinstance(p, np.ndarray) else p)
                       .to(device, dtype).clone().requires_grad_() for name, p in params.items()}

    def linear(self, x, name):  # x @ w^T
        return F.linear(x, self.params[name].to(x.dtype))

    def attention_branch(self, u, l, norm_qkv):
        B, T, C = u.shape
        q, k, v = (i.view(B, T, self.cfg.H, self.cfg.D).transpose(1, 2)  # (B,H,T,D)
                   for i in self.linear(u, f"qkvw[{l}]").split(C, dim=-1))
        if norm_qkv:
            q, k, v = (rmsnorm(x.to(self.dtype), self.params[f"gamma_{i}[{l}]"]).to(u.dtype)
                       for i, x in zip("qkv", (q, k, v)))
        y = self.attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        return self.linear(y, f"attprojw[{l}]")

    def feed_forward_branch(self, u, l):
        # gelu_tanh(h) = h/2 (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3)))
        return self.linear(F.gelu(self.linear(u, f"fcw[{l}]"), approximate="tanh"), f"fcprojw[{l}]")

    def branch_input(self, x, l, s):
        return rmsnorm(x, self.params[f"gamma_in[{l}]"]) if s.norm_in else x

    def embedding(self, tokens):
        return math.sqrt(self.cfg.C) * (self.params["wte"][tokens] + self.params["wpe"][:tokens.shape[1]])

    def head(self, x):
        wte = self.params["wte"][:self.cfg.V].to(self.branch_dtype)  # tied; the padded rows are no words
        return F.linear(x.to(self.branch_dtype), wte).to(self.dtype)

    def forward(self, tokens, branches=None):
        """tokens (B,T) -> logits (B,T,V), [x_0 .. x_L] each (B,T,C). branches, a list, gets (F(u_l), z_l) of each sub-layer."""
        cfg, p = self.cfg, self.params
        x = self.embedding(tokens)
        xs = [x]
        for l in range(cfg.L):
            s = sub_layer(cfg, l)
            u = self.branch_input(x, l, s).to(self.branch_dtype)
            f = self.attention_branch(u, l, s.norm_qkv) if l % 2 == 0 else self.feed_forward_branch(u, l)
            f = f.to(self.dtype)
            z = s.alpha * x + f
            if branches is not None:
                branches.append((f, z))
            x = rmsnorm(z, p[f"gamma_out[{l}]"]) if s.norm_out else z
            xs.append(x)
        if cfg.norm in keel_file.FINAL_NORM:
            x = rmsnorm(x, p["gamma_final"])
        return self.head(x), xs

    def loss(self, tokens, targets):
        return cross_entropy(self.forward(tokens)[0], targets)


def cross_entropy(logits, targets):
    """mean over the B*T targets of -log softmax(logits)[target]"""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def from_file(path, **options):
    """KeelGPT with the parameters of a model file, training state or debug state; options as for KeelGPT."""
    file = keel_file.read(path)
    return KeelGPT(file.cfg, {name: file.tensors[name] for name, _ in parameter_table(file.cfg)}, **options)


def debug_tensors(model, tokens, targets):
    """One forward and backward on one batch of int arrays (B,T): the tensors of a debug state, by name.
    dx[l] is the total derivative of the loss with respect to x_l; dx[L] is that before norm_final."""
    tokens, targets = (torch.as_tensor(np.array(t)).long() for t in (tokens, targets))
    logits, xs = model.forward(tokens)
    loss = cross_entropy(logits, targets)
    grads = torch.autograd.grad(loss, list(model.params.values()) + xs)
    n = len(model.params)
    out = {name: p for name, p in model.params.items()}
    out.update(tokens=tokens, targets=targets, loss=loss.reshape(1), logits=logits, x=torch.stack(xs))
    out.update({"d" + name: g for name, g in zip(model.params, grads[:n])})
    out["dx"] = torch.stack(grads[n:])
    return {name: t.detach().cpu().numpy() for name, t in out.items()}


def same(x):
    """The share of x (B,T,C) that all rows have in common: 1 where all positions of all sequences hold the same vector."""
    x = x.flatten(0, 1)
    return (x.mean(0).square().sum() / x.square().sum(1).mean()).item()


def probe(model, tokens, targets):
    """What the trainers' --probe writes of one forward and backward pass on (B,T), as its columns are defined in keel/probe.h:
    ([a dict a sub-layer], the parameters' gradients in parameter order). The Jacobians of the shortcuts are multiplied up
    whole, as (B,T,C) diagonals."""
    cfg, branches = model.cfg, []
    logits, xs = model.forward(tokens, branches)
    fs, zs = zip(*branches)
    params = list(model.params.values())
    grads = torch.autograd.grad(cross_entropy(logits, targets), params + xs[:-1] + list(fs))
    dxs, dfs = grads[len(params):-cfg.L], grads[-cfg.L:]
    rms = lambda x: x.square().mean().sqrt().item()
    rows, to_top = [None] * cfg.L, torch.ones_like(xs[0])
    for l in reversed(range(cfg.L)):
        s, shortcut = sub_layer(cfg, l), torch.ones_like(xs[0])
        if s.norm_out:
            shortcut = model.params[f"gamma_out[{l}]"] * torch.rsqrt(zs[l].square().mean(-1, keepdim=True) + RMS_EPS)
        shortcut = s.alpha * shortcut
        to_top = to_top * shortcut
        gain, gain_to_top = ((j.norm(dim=-1) / math.sqrt(cfg.C)).mean().item() for j in (shortcut, to_top))
        rows[l] = {"rms_x": rms(xs[l]), "rms_f": rms(fs[l]), "rms_z": rms(zs[l]), "shortcut_gain": gain,
                   "shortcut_gain_to_top": gain_to_top, "dx_norm": dxs[l].norm().item(), "df_norm": dfs[l].norm().item(),
                   "same_x": same(xs[l])}
    return rows, grads[:len(params)]


def relative_error(file, ours):
    """||file - ours|| / ||file||; 0 where both are zero"""
    difference, size = np.linalg.norm(np.ravel(file - ours)), np.linalg.norm(np.ravel(file))
    return 0.0 if difference == 0 else difference / size if size != 0 else math.inf


# ---------------------------------------------------------------------------------------------------------
# The optimizer

def learning_rate(step, steps, warmup, peak):
    """Step 1..steps: linear warm-up to the peak, then a cosine to 1e-7."""
    if step <= warmup:
        return peak * step / warmup
    return 1e-7 + (peak - 1e-7) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


class AdamW:
    def __init__(self, params, weight_decay=0.01, clip=1.0, betas=(0.9, 0.95), eps=1e-12):
        self.params, self.weight_decay, self.clip, self.betas, self.eps = list(params), weight_decay, clip, betas, eps
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.t = 0

    @torch.no_grad()
    def step(self, grads, lr):
        """Returns the gradients' norm before the clip."""
        self.t += 1
        b1, b2 = self.betas
        norm = torch.sqrt(sum(g.square().sum() for g in grads)).item()
        scale = min(1.0, self.clip / norm) if norm > 0 else 1.0
        for p, g, m, v in zip(self.params, grads, self.m, self.v):
            g = g * scale
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).add_(g * g, alpha=1 - b2)
            mhat, vhat = m / (1 - b1 ** self.t), v / (1 - b2 ** self.t)
            if p.dim() == 2:  # matrices and embeddings; gains are not decayed
                p.sub_(p, alpha=lr * self.weight_decay)
            p.sub_(mhat / (vhat.sqrt() + self.eps), alpha=lr)
        return norm
