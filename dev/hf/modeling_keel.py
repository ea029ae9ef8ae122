"""The KEEL GPT for Hugging Face's transformers (4.45 and later, PyTorch 1.13 and later).

    x_0     = sqrt(C) (wte[token] + wpe[position])
    z_l     = alpha_l x_l + F_l(norm_in ? RMSNorm(x_l) : x_l)        F_l: attention for even l, feed-forward for odd l
    x_{l+1} = norm_out ? RMSNorm(z_l) : z_l
    logits  = (norm_final ? RMSNorm(x_L) : x_L) @ wte^T

Every norm placement runs the one sub-layer below from its row in placements.py. The highway (x, z and all norms) is FP32
whatever the weights' type: with alpha = L = 1024 a sub-layer moves x by about 2^-10 of its size, and a BF16 x would round it away.
A model that is cast to half precision, by dtype=, .to() or autocast, computes the branches F_l and the logits in it and nothing
else; the norms' gains stay FP32 too. output_hidden_states gives x_0 to x_L.

Shapes: B batch, T queries, S keys, C channels, H heads, D = C/H, V vocabulary.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_keel import KeelConfig
from .placements import FINAL_NORM, sub_layer

RMS_EPS = 1e-6
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"  # its name in this transformers


def highway_type(dtype):
    """FP32, or FP64 where the weights are."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


class RMSNorm(nn.Module):
    """gamma x / sqrt(mean(x^2) + eps)"""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=highway_type(torch.get_default_dtype())))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)

    def _apply(self, fn, *args, **kwargs):
        """What .to() and .bfloat16() go through: the gain follows to another device, but not to half precision."""
        def convert(weight):
            converted = fn(weight)
            return converted if highway_type(converted.dtype) == converted.dtype else weight.to(converted.device)
        return super()._apply(convert, *args, **kwargs)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over the keys that mask (.,1,T,S) lets each query see, or with mask added, written out."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=highway_type(q.dtype)).to(v.dtype) @ v


class Attention(nn.Module):
    """f = y attprojw^T; rows of qkv.weight: q, k, v, head h at h*D in each"""

    def __init__(self, config, index, norm_qkv):
        super().__init__()
        C, D = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.config, self.index, self.head_size = config, index, D
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.norm_q, self.norm_k, self.norm_v = (RMSNorm(D) if norm_qkv else None for _ in "qkv")
        self.proj = nn.Linear(C, C, bias=False)

    def forward(self, u, mask, keys, cache, slots):
        B, T, C = u.shape
        q, k, v = (i.view(B, T, -1, self.head_size).transpose(1, 2) for i in self.qkv(u).split(C, dim=-1))  # (B,H,T,D)
        if self.norm_q is not None:
            q, k, v = (norm(i.to(norm.weight.dtype)).to(i.dtype)
                       for norm, i in ((self.norm_q, q), (self.norm_k, k), (self.norm_v, v)))
        if cache is not None:
            k, v = cache.update(k, v, self.index, {"cache_position": slots})
            k, v = k[:, :, :keys], v[:, :, :keys]  # a static cache has places beyond the last key
        if self.config._attn_implementation == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        else:
            y = attend(q, k, v, causal_mask(None, T, keys, slots) if mask is None else mask)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """f = gelu_tanh(u fcw^T) fcprojw^T"""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.fc, self.proj = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, u, *_):
        return self.proj(F.gelu(self.fc(u), approximate="tanh"))


class KeelSubLayer(nn.Module):
    """z = alpha x + F(norm_in ? RMSNorm(x) : x);  norm_out ? RMSNorm(z) : z"""

    def __init__(self, config, l):
        super().__init__()
        s = sub_layer(config, l)
        self.alpha = s.alpha
        self.norm_in = RMSNorm(config.hidden_size) if s.norm_in else None
        self.branch = FeedForward(config) if l % 2 else Attention(config, l // 2, s.norm_qkv)
        self.norm_out = RMSNorm(config.hidden_size) if s.norm_out else None
        if config.norm == "deepnorm":  # V, the output projection and both FFN matrices start L^-0.25 times as large
            for name, matrix in self.branch.named_children():
                matrix.first_small_row = 2 * config.hidden_size if name == "qkv" else 0

    def forward(self, x, *context):
        u = x if self.norm_in is None else self.norm_in(x)
        weight = self.branch.proj.weight
        f = self.branch(u.to(weight.dtype) if weight.is_floating_point() else u, *context)
        z = self.alpha * x + f.to(x.dtype)
        return z if self.norm_out is None else self.norm_out(z)


def causal_mask(padding, T, S, slots):
    """(B or 1,1,T,S) bool: query t, at slots[t] among the keys, sees itself and the keys before it that are no padding.
    padding: None or (B,S), 0 for padding. A query that is padding sees itself, so that its softmax is a number."""
    key, query = torch.arange(S, device=slots.device), slots.view(T, 1)
    sees = (key <= query)[None, None]
    if padding is not None:
        sees = sees & padding.bool()[:, None, None, :] | (key == query)[None, None]
    return sees


class KeelPreTrainedModel(PreTrainedModel):
    config_class = KeelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = True
    _no_split_modules = ["KeelSubLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["norm_in", "norm_out", "norm_q", "norm_k", "norm_v", "norm_final"]

    if not hasattr(PreTrainedModel, "_keep_in_fp32_modules_strict"):  # older ones round all weights on their way to a device_map
        @classmethod
        def from_pretrained(cls, path, *args, torch_dtype=None, **kwargs):
            if torch_dtype == "auto":
                torch_dtype = (kwargs.get("config") or cls.config_class.from_pretrained(path)).torch_dtype
            if isinstance(torch_dtype, str):
                torch_dtype = getattr(torch, torch_dtype)
            half = torch_dtype in (torch.bfloat16, torch.float16)
            model = super().from_pretrained(path, *args, torch_dtype=torch.float32 if half else torch_dtype, **kwargs)
            return model.to(torch_dtype) if half else model

    def _init_weights(self, module):
        """Uniform with variance 1/fan_in, embeddings 1/C: the trainers' distributions, drawn by PyTorch."""
        weight = getattr(module, "weight", None)
        if weight is None or getattr(weight, "_is_hf_initialized", False):
            return
        with torch.no_grad():
            if isinstance(module, RMSNorm):
                weight.fill_(1)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                weight.uniform_(-1, 1).mul_(math.sqrt(3 / weight.shape[1]))
                weight[getattr(module, "first_small_row", len(weight)):] *= self.config.L ** -0.25


class KeelModel(KeelPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.sublayers = nn.ModuleList([KeelSubLayer(config, l) for l in range(config.L)])
        self.norm_final = RMSNorm(config.hidden_size) if config.norm in FINAL_NORM else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, wte):
        self.wte = wte

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, output_hidden_states=None, output_attentions=None, return_dict=None, cache=None, **_):
        """attention_mask: (B,S), 0 for padding on either side, or (B,1,T,S), true where a query sees a key or, of floats, added to
        the scores. S counts the cache's tokens too. past_key_values, or cache in newer versions of transformers: the keys and
        values of the tokens before."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions: attention's weights are not kept")
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        cache = past_key_values if cache is None else cache
        checkpointing = self.gradient_checkpointing and self.training
        if checkpointing:
            cache = None
        elif cache is None and (config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        T, past = x.shape[1], 0 if cache is None else cache.get_seq_length()
        slots = past + torch.arange(T, device=x.device)  # each query's place among the keys; transformers says cache_position
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:  # a text's first token has position 0
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
            else:
                position_ids = slots[None]
        if past + T > config.max_position_embeddings and int(position_ids.max()) >= config.max_position_embeddings:
            raise ValueError(f"expected at most {config.max_position_embeddings} tokens, the positions that the model has learnt,"
                             f" found {int(position_ids.max()) + 1}")
        keys = past + T
        shape = None if attention_mask is None else tuple(attention_mask.shape)
        if shape and len(shape) == 4:
            mask, keys = attention_mask, shape[-1]
        elif shape and (len(shape) != 2 or shape[1] != keys):
            raise ValueError(f"attention_mask: expected (B,S) of the S = {keys} tokens so far, or (B,1,T,S), found {shape}")
        else:
            mask = causal_mask(attention_mask, T, keys, slots) if shape or past else None

        highway = highway_type(x.dtype)
        x = math.sqrt(config.hidden_size) * (x.to(highway) + self.wpe(position_ids).to(highway))
        xs, context = [x], (mask, keys, cache, slots)
        for sublayer in self.sublayers:
            x = self._gradient_checkpointing_func(sublayer.__call__, x, *context) if checkpointing else sublayer(x, *context)
            if output_hidden_states:
                xs.append(x)
        if self.norm_final is not None:
            x = self.norm_final(x)
        hidden_states = tuple(xs) if output_hidden_states else None
        out = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden_states, **{CACHE: cache})
        return out if return_dict else out.to_tuple()


class KeelForCausalLM(KeelPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = KeelModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, lm_head):
        self.lm_head = lm_head

    if "input_ids" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:  # before transformers 4.46
        def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None,
                                          cache_position=None, use_cache=None, **_):
            """The inputs of the next step: of the text so far what the cache does not have yet."""
            if inputs_embeds is not None and cache_position[0] == 0:
                text = {"inputs_embeds": inputs_embeds}
            else:
                text = {"input_ids": input_ids[:, -len(cache_position):] if past_key_values is not None else input_ids}
            return text | {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": use_cache}

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, num_items_in_batch=None, output_hidden_states=None,
                return_dict=None, **inputs):
        """labels (B,T): as input_ids, which they are compared with one place further on; -100: no target. loss: the mean over the
        targets, or their sum / num_items_in_batch. logits_to_keep: only of the last so many tokens; 0: of all."""
        out = self.model(input_ids, output_hidden_states=output_hidden_states, return_dict=True, **inputs)
        x = out.last_hidden_state
        if not isinstance(logits_to_keep, int):
            x = x[:, logits_to_keep]
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = self.lm_head(x.to(self.lm_head.weight.dtype))
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(logits.device)
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).to(x.dtype), targets, ignore_index=-100, reduction="sum")
            loss = losses / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        cache = {CACHE: getattr(out, CACHE)}
        out = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states, **cache)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


KeelConfig.register_for_auto_class()  # so that save_pretrained writes these files too
KeelModel.register_for_auto_class("AutoModel")
KeelForCausalLM.register_for_auto_class("AutoModelForCausalLM")
