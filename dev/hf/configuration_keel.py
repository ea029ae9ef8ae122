"""The configuration of a KEEL model for Hugging Face's transformers."""

from transformers import PretrainedConfig

from .placements import NORMS, default_alpha


class KeelConfig(PretrainedConfig):
    """norm: one of placements.NORMS. num_hidden_layers counts blocks, each an attention and a feed-forward sub-layer: L/2 of the
    paper's L "layers". alpha: weight of the shortcut; None: the placement's own, L for keel.
    step, branch_bf16, tokenizer_crc32: from the header of the trainer's model file, for the way back."""

    model_type = "keel"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(self, vocab_size=256, hidden_size=64, num_hidden_layers=32, num_attention_heads=2, max_position_embeddings=256,
                 norm="keel", alpha=None, use_cache=True, step=0, branch_bf16=False, tokenizer_crc32=0, tie_word_embeddings=True,
                 **kwargs):
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, found {norm!r}")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size: expected a multiple of the {num_attention_heads} heads, found {hidden_size}")
        if not tie_word_embeddings:
            raise ValueError("tie_word_embeddings: expected true, as KEEL's head is the embedding")
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        self.norm, self.alpha = norm, float(default_alpha(norm, 2 * num_hidden_layers) if alpha is None else alpha)
        self.use_cache, self.step, self.branch_bf16, self.tokenizer_crc32 = use_cache, step, branch_bf16, tokenizer_crc32
        super().__init__(tie_word_embeddings=True, **kwargs)

    @property
    def L(self):
        """Sub-layers."""
        return 2 * self.num_hidden_layers
