"""Tiny random checkpoints over the cross product of configuration flags.

An axis is something that published configurations do in several ways: the schema and
type of the rotary scaling, which layers have windows, whether the head is tied. A case
is one value of each. Folders are written by this file alone, as other libraries write
them; `reference.py` says what they compute.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

# Sizes of all cases: large enough for two heads a group, small enough for NumPy loops.
DIM = 32
HEADS = 4
LAYERS = 3
HIDDEN = 40
VOCAB = 64  # rows, of which the last are padding
LENGTH = 24  # tokens of a text: longer than ORIGINAL, three times WINDOW
ORIGINAL = 16  # tokens before a scaling
WINDOW = 8
SPREAD = 0.3  # of the norms' weights around one
BIAS = 0.2  # standard deviation of biases
EMBEDDING = 0.5  # of the embeddings
SHARPNESS = 1.5  # of queries and keys, so that attention has something to choose
DTYPES = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
}
THETA = 500.0  # pairs of a small head then turn fast and slowly, as in a large one
LOCAL_THETA = 100.0

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 4.0,
    },
    "yarn, mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 6.0,
        "beta_slow": 0.5,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
}
ROPES = {
    "scaling": tuple(SCALINGS),
    "schema": ("type", "rope_type", "rope_parameters"),
}
HEAD_SIZES = (None, 12)
# How the head is told: flag and presence of lm_head.weight.
TIED = ("tied", "untied", "tied, with a copy")
STORAGE = {
    "dtype": tuple(DTYPES),
    "files": ("one", "several"),
}
AXES: dict[str, dict[str, tuple]] = {
    "llama": {
        **ROPES,
        "head_dim": HEAD_SIZES,
        "groups": (1, 2, 4),
        "attention_bias": (False, True),
        "mlp_bias": (False, True),
        "epsilon": (1e-5, 1e-2),
    },
    "mistral": {
        **ROPES,
        "head_dim": HEAD_SIZES,
        "groups": (2, 4),
        "windows": ("null", "all"),
    },
    "qwen2": {
        **ROPES,
        "groups": (1, 2),
        "windows": ("unused", "by number", "by type"),
    },
    "qwen3": {
        **ROPES,
        "head_dim": (8, 12),
        "attention_bias": (False, True),
        "windows": ("unused", "by number", "by type"),
    },
    "gemma": {
        **ROPES,
        "head_dim": (8, 12),
        "attention_bias": (False, True),
        "activation": ("gelu", "gelu_pytorch_tanh", "null"),
    },
    "gemma2": {
        **ROPES,
        "head_dim": (8, 12),
        "scalar": (8, 20),
        "attention_cap": (None, 1.5),
        "logit_cap": (None, 2.0),
        "windows": ("by default", "by type"),
    },
    "gemma3_text": {
        "scaling": ("default", "linear", "yarn"),
        # transformers 5.24 passes over Gemma 3's older "type", and scales nothing
        "schema": ("rope_type", "rope_parameters"),
        "head_dim": (8, 12),
        "attention_bias": (False, True),
        "logit_cap": (None, 2.0),
        "windows": ("by pattern", "by type"),
    },
    "gpt2": {
        "scale_attn_weights": (True, False),
        "scale_attn_by_inverse_layer_idx": (False, True),
        "n_inner": (None, 24),
        "activation": ("gelu_new", "gelu", "relu"),
        "prefix": (True, False),
        "buffers": (False, True),
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint.

    Attributes:
      family: `model_type`.
      flags: a value of each axis.
      tied: how the head is told.
      dtype: of the tensors.
      files: "one" or "several".
    """

    family: str
    flags: Mapping[str, Any]
    tied: str = "untied"
    dtype: str = "F32"
    files: str = "one"

    def __str__(self) -> str:
        flags = ", ".join(f"{name}={value}" for name, value in self.flags.items())
        return f"{self.family}: {flags}, {self.tied}, {self.dtype}, {self.files}"


def cases(family: str) -> Iterator[Case]:
    """Yield each case of a family; what concerns files alone goes round."""
    axes = AXES[family]
    storage = itertools.cycle(itertools.product(TIED, *STORAGE.values()))
    for values in itertools.product(*axes.values()):
        flags = dict(zip(axes, values, strict=True))
        tied, dtype, files = next(storage)
        yield Case(family, flags, tied, dtype, files)


def covering(family: str) -> list[Case]:
    """Return few cases in which each value of each axis occurs."""
    axes = {**AXES[family], "tied": TIED, **STORAGE}
    count = max(len(values) for values in axes.values())
    chosen = []
    for number in range(count):
        # Axes of equal length go round at another place each, so that they mix.
        flags = {
            name: values[(number + shift) % len(values)]
            for shift, (name, values) in enumerate(axes.items())
        }
        own = {name: flags.pop(name) for name in ("tied", *STORAGE)}
        chosen.append(Case(family, flags, **own))
    return chosen


def write(
    case: Case,
    folder: Path,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Write a checkpoint.

    Returns:
      Its configuration and its tensors.
    """
    config = config_of(case)
    tensors = tensors_of(case, config, np.random.default_rng(seed))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    stored = tensors | _buffers(case, config)
    if case.files == "one":
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        _write_several(stored, folder)
    return config, tensors


def tokens_of(seed: int = 0, length: int = LENGTH) -> np.ndarray:
    """Return tokens int32 (length,) of a random text."""
    return np.random.default_rng(seed + 1).integers(0, VOCAB, length).astype(np.int32)


# ---- configurations ----


def config_of(case: Case) -> dict[str, Any]:
    """Return config.json of a case."""
    flags = case.flags
    tied = {"tie_word_embeddings": case.tied != "untied"}
    if case.family == "gpt2":
        return _gpt2_config(flags) | tied
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[case.family]],
        "model_type": case.family,
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": flags.get("groups", 2),
        "max_position_embeddings": ORIGINAL,
        "rms_norm_eps": flags.get("epsilon", 1e-6),
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **tied,
    }
    if case.family in ("llama", "mistral", "qwen2", "qwen3"):
        config["hidden_act"] = "silu"
    if flags.get("head_dim") is not None:
        config["head_dim"] = flags["head_dim"]
    for name in ("attention_bias", "mlp_bias"):
        if name in flags:
            config[name] = flags[name]
    return config | _rope(case) | _window_keys(case) | _gemma_keys(case)


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def _rope(case: Case) -> dict[str, Any]:
    name = case.flags["scaling"]
    scaling = SCALINGS[name]
    kind = name.partition(",")[0]
    schema = case.flags["schema"]
    if schema == "rope_parameters":
        full = {"rope_theta": THETA, "rope_type": kind, **scaling}
        if case.family != "gemma3_text":
            return {"rope_parameters": full}
        local = {"rope_theta": LOCAL_THETA, "rope_type": "default"}
        both = {"full_attention": full, "sliding_attention": local}
        return {"rope_parameters": both}
    older = {"rope_theta": THETA, "rope_scaling": None}
    if scaling:
        older["rope_scaling"] = {schema: kind, **scaling}
    if case.family == "gemma3_text":
        older["rope_local_base_freq"] = LOCAL_THETA
    return older


def _window_keys(case: Case) -> dict[str, Any]:
    types = ["full_attention", "sliding_attention", "full_attention"]
    return {
        None: {},
        "null": {"sliding_window": None},
        "all": {"sliding_window": WINDOW},
        "unused": {"sliding_window": WINDOW, "use_sliding_window": False},
        "by number": {
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "max_window_layers": 1,
        },
        "by default": {"sliding_window": WINDOW},
        "by pattern": {"sliding_window": WINDOW, "sliding_window_pattern": 3},
        "by type": {
            "sliding_window": WINDOW,
            "layer_types": types,
            **({"use_sliding_window": True} if "qwen" in case.family else {}),
        },
    }[case.flags.get("windows")]


def _gemma_keys(case: Case) -> dict[str, Any]:
    flags = case.flags
    keys: dict[str, Any] = {}
    if case.family == "gemma":
        said = flags["activation"]
        keys = {"hidden_act": "gelu", "hidden_activation": None}
        if said != "null":
            keys = {"hidden_act": said}
    if case.family in ("gemma2", "gemma3_text"):
        keys["hidden_activation"] = "gelu_pytorch_tanh"
        keys["query_pre_attn_scalar"] = flags.get("scalar", 20)
        keys["final_logit_softcapping"] = flags["logit_cap"]
    if case.family == "gemma2":
        keys["attn_logit_softcapping"] = flags["attention_cap"]
    return keys


def _gpt2_config(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES["gpt2"]],
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_positions": LENGTH,
        "n_ctx": LENGTH,
        "n_embd": DIM,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": flags["n_inner"],
        "activation_function": flags["activation"],
        "scale_attn_weights": flags["scale_attn_weights"],
        "scale_attn_by_inverse_layer_idx": flags["scale_attn_by_inverse_layer_idx"],
        "resid_pdrop": 0.1,
        "summary_type": "cls_index",
    }


# ---- tensors ----


def tensors_of(
    case: Case,
    config: Mapping[str, Any],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Return random tensors of a case, by name, of its dtype."""
    shapes = _gpt2_shapes(case) if case.family == "gpt2" else _shapes(case, config)
    is_offset = case.family.startswith("gemma")
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if name.endswith("bias"):
            values *= BIAS
        elif len(shape) == 1:
            values = values * SPREAD + (0 if is_offset else 1)
        elif "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            values *= EMBEDDING
        else:
            sharp = any(part in name for part in ("q_proj", "k_proj", "c_attn"))
            inputs = shape[0] if case.family == "gpt2" else shape[1]
            values *= (SHARPNESS if sharp else 1) / np.sqrt(inputs)
        tensors[name] = values.astype(DTYPES[case.dtype])
    if case.tied == "tied, with a copy":
        embedding = next(name for name in tensors if name.endswith(EMBEDDINGS))
        tensors["lm_head.weight"] = tensors[embedding].copy()
    return tensors


EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def _shapes(case: Case, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all but GPT-2's tensors."""
    layer = _layer_shapes(case, config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, DIM)}
    for number in range(LAYERS):
        for name, shape in layer.items():
            shapes[f"model.layers.{number}.{name}"] = shape
    shapes["model.norm.weight"] = (DIM,)
    if case.tied == "untied":
        shapes["lm_head.weight"] = (VOCAB, DIM)
    return shapes


def _layer_shapes(case: Case, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    size = config.get("head_dim", DIM // HEADS)
    wide = HEADS * size
    narrow = config["num_key_value_heads"] * size
    dense = {
        "self_attn.q_proj": (wide, DIM),
        "self_attn.k_proj": (narrow, DIM),
        "self_attn.v_proj": (narrow, DIM),
        "self_attn.o_proj": (DIM, wide),
        "mlp.gate_proj": (HIDDEN, DIM),
        "mlp.up_proj": (HIDDEN, DIM),
        "mlp.down_proj": (DIM, HIDDEN),
    }
    norms = {"input_layernorm": DIM, "post_attention_layernorm": DIM}
    if case.family in ("gemma2", "gemma3_text"):
        norms["pre_feedforward_layernorm"] = DIM
        norms["post_feedforward_layernorm"] = DIM
    if case.family in ("qwen3", "gemma3_text"):
        norms["self_attn.q_norm"] = size
        norms["self_attn.k_norm"] = size

    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in dense.items():
        shapes[f"{name}.weight"] = shape
        if _has_bias(case, name):
            shapes[f"{name}.bias"] = shape[:1]
    for name, width in norms.items():
        shapes[f"{name}.weight"] = (width,)
    return shapes


def _has_bias(case: Case, name: str) -> bool:
    if name.startswith("mlp"):
        return case.flags.get("mlp_bias", False)
    if case.family == "qwen2":
        return "o_proj" not in name
    return case.flags.get("attention_bias", False)


def _gpt2_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    base = "transformer." if case.flags["prefix"] else ""
    inner = case.flags["n_inner"] or 4 * DIM
    shapes: dict[str, tuple[int, ...]] = {
        f"{base}wte.weight": (VOCAB, DIM),
        f"{base}wpe.weight": (LENGTH, DIM),
    }
    dense = {
        "attn.c_attn": (DIM, 3 * DIM),
        "attn.c_proj": (DIM, DIM),
        "mlp.c_fc": (DIM, inner),
        "mlp.c_proj": (inner, DIM),
    }
    for layer in range(LAYERS):
        at = f"{base}h.{layer}."
        for name, shape in dense.items():
            shapes[f"{at}{name}.weight"] = shape
            shapes[f"{at}{name}.bias"] = shape[1:]
        for name in ("ln_1", "ln_2"):
            shapes[f"{at}{name}.weight"] = (DIM,)
            shapes[f"{at}{name}.bias"] = (DIM,)
    shapes[f"{base}ln_f.weight"] = (DIM,)
    shapes[f"{base}ln_f.bias"] = (DIM,)
    if case.tied == "untied":
        shapes["lm_head.weight"] = (VOCAB, DIM)
    return shapes


def _buffers(case: Case, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return tensors that are no weights, which older files have."""
    if not case.flags.get("buffers"):
        return {}
    base = "transformer." if case.flags["prefix"] else ""
    mask = np.tril(np.ones((1, 1, LENGTH, LENGTH), np.float32))
    return {f"{base}h.{layer}.attn.bias": mask.copy() for layer in range(LAYERS)}


def _write_several(tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    names = list(tensors)
    halves = [names[::2], names[1::2]]
    index = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in half}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(half, file)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
