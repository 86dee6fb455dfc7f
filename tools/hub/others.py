"""Logits of folders by transformers, in a Python that has it and torch.

    python tools/hub/others.py REQUEST.json ANSWER.npz

It is run as a file, by another interpreter, and imports nothing of this repository.
The request is a list of [name, folder, tokens, dtype]; the answer has logits float32
(length, vocab) under each name, or under "error/NAME" why there are none.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM


def main(request: str, answer: str) -> None:
    """Write logits of each folder."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {"version": np.asarray([transformers.__version__, torch.__version__])}
    for name, folder, tokens, dtype in json.loads(Path(request).read_text()):
        try:
            found[name] = logits(folder, tokens, getattr(torch, dtype))
        except Exception as error:
            found[f"error/{name}"] = np.asarray(f"{type(error).__name__}: {error}")
    np.savez(answer, **found)


def logits(folder: str, tokens: list[int], dtype: torch.dtype) -> np.ndarray:
    """Return the logits of one row of tokens, computed in a dtype."""
    model, told = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
    )
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(name):
            raise ValueError(f"{name}: {sorted(told[name])[:3]}")
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


if __name__ == "__main__":
    main(*sys.argv[1:])
