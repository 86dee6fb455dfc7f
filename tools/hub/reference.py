"""Published models in float64 NumPy, straight from configuration and tensors.

It shares no code with `lepton_jax`, and as little of its thinking as possible: pairs
are turned as complex numbers, heads are computed one by one, masks are made by asking
for each pair of tokens. It is slow, and for tiny models.

Source: the definitions in transformers 5.24, `models/*/modeling_*.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]
SLIDING = "sliding_attention"
GEMMAS = ("gemma", "gemma2", "gemma3_text")
# Of Abramowitz and Stegun 7.1.26 no use is made: `math.erf` is exact to float64.
_erf = np.vectorize(math.erf)


def logits(
    config: Mapping[str, Any],
    tensors: Tensors,
    tokens: np.ndarray,
) -> np.ndarray:
    """Return float64 logits (length, vocab) of one row of tokens.

    Args:
      config: content of config.json.
      tensors: by name, of any dtype.
      tokens: whole numbers (length,).
    """
    wide = {name: values.astype(np.float64) for name, values in tensors.items()}
    run = _gpt2 if config["model_type"] == "gpt2" else _rotary_model
    return run(config, wide, tokens)


# ---- Llama, Mistral, Qwen, Gemma ----


def _rotary_model(config, tensors, tokens):
    is_gemma = config["model_type"] in GEMMAS
    dim = config["hidden_size"]
    x = tensors["model.embed_tokens.weight"][tokens]
    if is_gemma:
        x = x * math.sqrt(dim)
    epsilon = config.get("rms_norm_eps", 1e-6)
    offset = 1.0 if is_gemma else 0.0

    def norm(x, name):
        return _rms(x, tensors[name], epsilon, offset)

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        mixed = _attention(
            config,
            tensors,
            norm(x, at + "input_layernorm.weight"),
            layer,
            offset,
        )
        has_post = at + "post_feedforward_layernorm.weight" in tensors
        before = "pre_feedforward" if has_post else "post_attention"
        if has_post:
            mixed = norm(mixed, at + "post_attention_layernorm.weight")
        x = x + mixed
        fed = _gated(config, tensors, norm(x, f"{at}{before}_layernorm.weight"), at)
        if has_post:
            fed = norm(fed, at + "post_feedforward_layernorm.weight")
        x = x + fed

    x = norm(x, "model.norm.weight")
    embedding = tensors["model.embed_tokens.weight"]
    out = x @ tensors.get("lm_head.weight", embedding).T
    cap = _default(config, "final_logit_softcapping", {"gemma2": 30.0})
    return cap * np.tanh(out / cap) if cap else out


def _attention(config, tensors, x, layer, offset):
    at = f"model.layers.{layer}.self_attn."
    heads = config["num_attention_heads"]
    size = _head_size(config)
    query = _linear(tensors, x, at + "q_proj")
    key = _linear(tensors, x, at + "k_proj")
    value = _linear(tensors, x, at + "v_proj")
    share = query.shape[1] // key.shape[1]  # query heads of a key head
    angles = _angles(config, len(x), layer)
    scale = _scale(config, size)
    cap = None
    if config["model_type"] == "gemma2":
        cap = _default(config, "attn_logit_softcapping", {"gemma2": 50.0})
    window = _window(config, layer)

    outputs = []
    for head in range(heads):
        q = query[:, head * size : (head + 1) * size]
        group = head // share
        k = key[:, group * size : (group + 1) * size]
        v = value[:, group * size : (group + 1) * size]
        if at + "q_norm.weight" in tensors:
            epsilon = config.get("rms_norm_eps", 1e-6)
            q = _rms(q, tensors[at + "q_norm.weight"], epsilon, offset)
            k = _rms(k, tensors[at + "k_norm.weight"], epsilon, offset)
        turned = (_turn(q, *angles) * np.conj(_turn(k, *angles))[:, None]).sum(-1)
        outputs.append(_softmax(_masked(turned.real.T * scale, cap, window)) @ v)
    return _linear(tensors, np.concatenate(outputs, axis=1), at + "o_proj")


def _turn(x, angles, amplitude):
    """Return pairs (x[i], x[i + d/2]) as complex numbers, turned."""
    half = x.shape[1] // 2
    return (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles) * amplitude


def _masked(scores, cap, window):
    if cap:
        scores = cap * np.tanh(scores / cap)
    length = len(scores)
    for query in range(length):
        for key in range(length):
            too_far = window is not None and query - key >= window
            if key > query or too_far:
                scores[query, key] = -np.inf
    return scores


def _softmax(scores):
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def _gated(config, tensors, x, at):
    kind = config.get("hidden_activation") or config.get("hidden_act")
    is_gemma = config["model_type"] in GEMMAS
    if is_gemma and kind in (None, "gelu"):
        kind = "gelu_pytorch_tanh"
    gate = _active(_linear(tensors, x, at + "mlp.gate_proj"), kind or "silu")
    up = _linear(tensors, x, at + "mlp.up_proj")
    return _linear(tensors, gate * up, at + "mlp.down_proj")


def _linear(tensors, x, name):
    return x @ tensors[name + ".weight"].T + tensors.get(name + ".bias", 0.0)


def _rms(x, weight, epsilon, offset):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * (offset + weight)


def _active(x, kind):
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "gelu":
        return x * (1 + _erf(x / math.sqrt(2))) / 2
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * (1 + np.tanh(inner)) / 2


def _default(config, name, defaults):
    return config[name] if name in config else defaults.get(config["model_type"])


def _head_size(config):
    defaults = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
    said = _default(config, "head_dim", defaults)
    return said or config["hidden_size"] // config["num_attention_heads"]


def _scale(config, size):
    if config["model_type"] in ("gemma2", "gemma3_text"):
        size = config.get("query_pre_attn_scalar", 256)
    return 1 / math.sqrt(size)


def _kind(config, layer):
    """Return whether a layer is "full_attention" or has a window."""
    if config.get("layer_types"):
        return config["layer_types"][layer]
    family = config["model_type"]
    slides = False
    if family == "mistral":
        slides = config.get("sliding_window", 4096) is not None
    elif family in ("qwen2", "qwen3"):
        uses = config.get("use_sliding_window", False)
        slides = uses and layer >= config.get("max_window_layers", 28)
    elif family == "gemma2":
        slides = layer % 2 == 0
    elif family == "gemma3_text":
        slides = (layer + 1) % config.get("sliding_window_pattern", 6) != 0
    return SLIDING if slides else "full_attention"


def _window(config, layer):
    is_sliding = _kind(config, layer) == SLIDING
    return config.get("sliding_window", 4096) if is_sliding else None


# ---- rotary positions ----


def _angles(config, length, layer):
    """Return angles (length, pairs) and the factor of both sides."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = _kind(config, layer)
    theta = config.get("rope_theta", 10_000.0)
    if config["model_type"] == "gemma3_text":
        if kind in rope:
            rope = rope[kind]
            theta = rope["rope_theta"]
        elif kind == SLIDING:
            theta = config.get("rope_local_base_freq", 10_000.0)
            rope = {}
        else:
            theta = config.get("rope_theta", 1_000_000.0)
    theta = rope.get("rope_theta", theta)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    size = _head_size(config)
    longest = config.get("max_position_embeddings")
    rule = {
        "default": _plain,
        "linear": _linearly,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
    }[scaling]
    radians = [
        rule(pair, size, theta, rope, longest, length) for pair in range(size // 2)
    ]
    amplitude = 1.0
    if scaling == "yarn":
        amplitude = rope.get("attention_factor") or _amplitude(rope)
    return np.outer(np.arange(length), radians), amplitude


def _plain(pair, size, theta, *rest):
    return theta ** (-2 * pair / size)


def _linearly(pair, size, theta, rope, *rest):
    return _plain(pair, size, theta) / rope["factor"]


def _dynamic(pair, size, theta, rope, longest, length):
    longer = max(length, longest)
    growth = rope["factor"] * longer / longest - (rope["factor"] - 1)
    return _plain(pair, size, theta * growth ** (size / (size - 2)))


def _llama3(pair, size, theta, rope, longest, length):
    original = rope.get("original_max_position_embeddings", longest)
    radians = _plain(pair, size, theta)
    wave = 2 * math.pi / radians
    if wave < original / rope["high_freq_factor"]:
        return radians
    if wave > original / rope["low_freq_factor"]:
        return radians / rope["factor"]
    low = rope["low_freq_factor"]
    smooth = (original / wave - low) / (rope["high_freq_factor"] - low)
    return (1 - smooth) * radians / rope["factor"] + smooth * radians


def _yarn(pair, size, theta, rope, longest, length):
    original = rope.get("original_max_position_embeddings", longest)

    def pair_of(turns):
        over = math.log(original / (turns * 2 * math.pi))
        return size * over / (2 * math.log(theta))

    first = pair_of(rope.get("beta_fast", 32))
    last = pair_of(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, size - 1)
    ramp = (pair - first) / ((last - first) or 0.001)
    ramp = min(max(ramp, 0), 1)
    radians = _plain(pair, size, theta)
    return radians / rope["factor"] * ramp + radians * (1 - ramp)


def _amplitude(rope):
    def growth(share):
        return 0.1 * share * math.log(rope["factor"]) + 1

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return growth(rope["mscale"]) / growth(rope["mscale_all_dim"])
    return growth(1)


# ---- GPT-2 ----


def _gpt2(config, tensors, tokens):
    base = "transformer." if "transformer.wte.weight" in tensors else ""
    epsilon = config.get("layer_norm_epsilon", 1e-5)

    def norm(x, name):
        centered = x - x.mean(-1, keepdims=True)
        unit = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon)
        return unit * tensors[base + name + ".weight"] + tensors[base + name + ".bias"]

    def dense(x, name):
        return x @ tensors[base + name + ".weight"] + tensors[base + name + ".bias"]

    heads = config["n_head"]
    size = config["n_embd"] // heads
    positions = np.arange(len(tokens))
    x = tensors[base + "wte.weight"][tokens] + tensors[base + "wpe.weight"][positions]
    for layer in range(config["n_layer"]):
        scale = size**-0.5 if config.get("scale_attn_weights", True) else 1.0
        if config.get("scale_attn_by_inverse_layer_idx"):
            scale /= layer + 1
        both = dense(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
        query, key, value = np.split(both, 3, axis=1)
        outputs = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = query[:, own] @ key[:, own].T * scale
            outputs.append(_softmax(_masked(scores, None, None)) @ value[:, own])
        x = x + dense(np.concatenate(outputs, axis=1), f"h.{layer}.attn.c_proj")
        inner = dense(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        kind = config.get("activation_function", "gelu_new")
        x = x + dense(_active(inner, kind), f"h.{layer}.mlp.c_proj")

    x = norm(x, "ln_f")
    return x @ tensors.get("lm_head.weight", tensors[base + "wte.weight"]).T
