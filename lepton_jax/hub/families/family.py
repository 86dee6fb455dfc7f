"""A family of published models: its configurations to shapes, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lepton_jax.errors import LeptonError, nearest
from lepton_jax.hub.keys import Keys
from lepton_jax.models import DecoderShape

# Keys that say nothing about what a model computes.
INFORMATION = frozenset(
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_implementation",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "eos_token_id",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "label2id",
        "length_penalty",
        "max_length",
        "max_position_embeddings",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    )
)
# Keys that must have this value, or not be there.
FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "encoder_no_repeat_ngram_size": 0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      name: `model_type` of its configurations.
      architecture: class of its language models in transformers.
      scheme: of its tensors' names: "llama", "gemma" (with norms after the layers) or
        "gpt2".
      read: keys to a shape; it takes the keys that it knows.
      write: a shape to keys.
      tied: whether the head is tied where a configuration does not say it.
    """

    name: str
    architecture: str
    scheme: str
    read: Callable[[Keys], DecoderShape]
    write: Callable[[DecoderShape], dict[str, Any]]
    tied: bool = False

    def shape_of(
        self,
        config: Mapping[str, Any],
        where: object,
        ignore: tuple[str, ...] = (),
    ) -> DecoderShape:
        """Return the shape of a configuration.

        Args:
          config: the configuration.
          where: its file, for messages.
          ignore: keys that are passed over.

        Raises:
          ModelError: a key is missing, unknown, or has a value that isn't read.
        """
        kept = {name: value for name, value in config.items() if name not in ignore}
        keys = Keys(kept, where)
        _check_kind(keys, self)
        for name, value in FIXED.items():
            keys.must_be(name, value, None)
        try:
            shape = self.read(keys)
        except ValueError as error:
            raise keys.fault(str(error), "correct the configuration") from error
        keys.pass_over(INFORMATION)
        if unknown := keys.left():
            known = keys.known()
            raise keys.fault(
                f"{unknown[0]!r} is no known key of {self.name}"
                f"{nearest(unknown[0], known)}",
                f"if it does not change what the model computes, pass it over:"
                f" ignore=[{unknown[0]!r}], or --ignore {unknown[0]}",
            )
        return shape

    def config_of(
        self,
        shape: DecoderShape,
        context: int,
    ) -> dict[str, Any]:
        """Return a configuration of a shape.

        Args:
          shape: what it says.
          context: tokens of the longest text that the model is for.
        """
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            **_longest(shape, context),
            **self.write(shape),
            "tie_word_embeddings": shape.tied,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def holds(self, shape: DecoderShape) -> bool:
        """Whether a configuration of this family can say all of a shape."""
        try:
            again = self.shape_of(self.config_of(shape, 1), "")
        except LeptonError:
            return False
        return canonical(again) == canonical(shape)


def difference(
    ours: DecoderShape,
    theirs: DecoderShape,
) -> str | None:
    """Return in which field two shapes differ, and how; None: they are the same."""
    here = vars(canonical(ours))
    there = vars(canonical(theirs))
    for name, value in here.items():
        if value != there[name]:
            return f"{name} is {value!r}, and {there[name]!r} there"
    return None


def canonical(shape: DecoderShape) -> DecoderShape:
    """Return a shape in which nothing that means the same is said in two ways."""
    windows = shape.windows if any(shape.windows) else ()
    local = shape.local_rotary if windows else None
    default_scale = shape.head_size**-0.5
    scale = default_scale if shape.scale is None else shape.scale
    return dataclasses.replace(
        shape,
        kv_heads=shape.groups,
        head=shape.head_size,
        windows=windows,
        local_rotary=None if local == shape.rotary else local,
        scale=scale,
        loop="unrolled",
    )


# ---- internals ----


def _check_kind(keys: Keys, family: Family) -> None:
    """Check that the folder holds a language model, with no code or codes of its own.

    Raises:
      ModelError: it holds something else.
    """
    found = keys.content.get("architectures") or [family.architecture]
    if found != [family.architecture]:
        raise keys.fault(
            f"architectures is {found}",
            f"this reads language models: {family.architecture}",
        )
    if keys.content.get("quantization_config") is not None:
        raise keys.fault(
            "the weights are quantized (quantization_config)",
            "give the model in float32, bfloat16 or float16",
        )
    if keys.content.get("auto_map") is not None:
        raise keys.fault(
            "the model brings its own code (auto_map), which is not run",
            "give a model that transformers knows by itself; if the code changes"
            " nothing, pass it over: ignore=['auto_map'], or --ignore auto_map",
        )
    keys.pass_over(["quantization_config", "auto_map"])


def _longest(shape: DecoderShape, context: int) -> dict[str, int]:
    """Return `max_position_embeddings`, from which "dynamic" scaling counts.

    GPT-2 has its table's rows instead.
    """
    if shape.positions:
        return {}
    if shape.rotary is not None and shape.rotary.kind == "dynamic":
        context = shape.rotary.original
    return {"max_position_embeddings": context}
