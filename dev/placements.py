"""The norm placements: for each sub-layer its alpha and its norms. This is Python's only such table, as `placements` in
keel_common.h is the trainers'. dev/hf/export.py puts a copy of it beside each model, so it needs the standard library alone."""

from typing import NamedTuple

NORMS = ("keel", "pre", "post", "deepnorm", "mixln", "hybridnorm", "scaledpost")  # word 10 of a file's header is the index
FINAL_NORM = ("pre", "mixln", "hybridnorm")  # placements with a norm before the logits


class SubLayer(NamedTuple):
    """z = alpha * x + F(norm_in ? RMSNorm(x) : x);  x_next = norm_out ? RMSNorm(z) : z"""
    alpha: float
    norm_in: bool
    norm_out: bool
    norm_qkv: bool = False  # RMSNorm of q, k and v per head inside the attention


def default_alpha(norm, L):
    return {"keel": L, "scaledpost": L, "deepnorm": L ** 0.25}.get(norm, 1)


def sub_layer(cfg, l):
    """The row that sub-layer l runs. cfg has the norm placement's name, the number of sub-layers L and alpha."""
    pre, post = SubLayer(1.0, True, False), SubLayer(1.0, False, True)
    post_blocks = max(1, cfg.L // 8)  # Mix-LN: Post-LN in the first quarter of the L/2 blocks
    return {
        # The paper's section 3.1: the first attention has no output norm, the first two no alpha.
        "keel": pre if l == 0 else SubLayer(1.0 if l == 1 else cfg.alpha, True, True),
        "pre": pre,
        "post": post,
        "deepnorm": SubLayer(cfg.alpha, False, True),
        "mixln": post if l // 2 < post_blocks else pre,
        # y = MHA_qkvnorm(x) + x;  x' = FFN(Norm(y)) + Norm(y): the FFN reads the attention's output norm.
        "hybridnorm": SubLayer(1.0, False, True, True) if l % 2 == 0 else SubLayer(1.0, False, False),
        "scaledpost": SubLayer(cfg.alpha, False, True),
    }[cfg.norm]
