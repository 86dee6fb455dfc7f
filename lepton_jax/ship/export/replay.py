"""Run an exported model in its target's own runtime: a script that needs no Lepton.

    python replay.py FOLDER INPUTS.npz OUTPUTS.npz

FOLDER is what `lepton export` wrote; `signature.json` in it names the target, the
arrays, and the batch size where that is fixed. Besides NumPy only the runtime is
imported, so the script shows that nothing else is needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
THREADS = 1  # of a runtime, so that sums are added up in the same order each time


def stablehlo(
    folder: Path,
    signature: dict[str, Any],
) -> Run:
    """Open a program of `jax.export`; the runtime is JAX."""
    from jax import export
    from safetensors.numpy import load_file

    program = export.deserialize(bytearray((folder / "program.stablehlo").read_bytes()))
    weights = load_file(folder / "weights.safetensors")

    def run(inputs: Arrays) -> Arrays:
        outputs = program.call(weights, inputs)
        return {name: np.asarray(leaf) for name, leaf in outputs.items()}

    return run


def onnx(
    folder: Path,
    signature: dict[str, Any],
) -> Run:
    """Open an ONNX model; the runtime is ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"),
        options,
        providers=["CPUExecutionProvider"],
    )

    # two outputs that are one value have one name
    wanted = list(dict.fromkeys(names(signature, "outputs")))

    def run(inputs: Arrays) -> Arrays:
        results = session.run(wanted, inputs)
        pairs = zip(wanted, results, strict=True)
        return {name: np.asarray(leaf) for name, leaf in pairs}

    return run


def litert(
    folder: Path,
    signature: dict[str, Any],
) -> Run:
    """Open a LiteRT (TensorFlow Lite) model."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(
        str(folder / "model.tflite"),
        num_threads=THREADS,
    )
    runner = interpreter.get_signature_runner()

    def run(inputs: Arrays) -> Arrays:
        # a copy: the interpreter gives out the same memory again
        return {name: np.array(leaf) for name, leaf in runner(**inputs).items()}

    return run


def savedmodel(
    folder: Path,
    signature: dict[str, Any],
) -> Run:
    """Open a SavedModel; the runtime is TensorFlow."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder / "model"))
    function = loaded.signatures["serving_default"]

    def run(inputs: Arrays) -> Arrays:
        tensors = {name: tf.constant(leaf) for name, leaf in inputs.items()}
        return {name: leaf.numpy() for name, leaf in function(**tensors).items()}

    return run


def iree(
    folder: Path,
    signature: dict[str, Any],
) -> Run:
    """Open a module of IREE."""
    from iree import runtime

    content = (folder / "model.vmfb").read_bytes()
    module = runtime.load_vm_flatbuffer(
        content,
        driver=signature["driver"],
    )
    order = names(signature, "inputs")
    out = names(signature, "outputs")

    def run(inputs: Arrays) -> Arrays:
        results = module.main(*[inputs[name] for name in order])
        if len(out) == 1:
            results = [results]
        pairs = zip(out, results, strict=True)
        return {name: np.array(leaf.to_host()) for name, leaf in pairs}

    return run


TARGETS = {
    "stablehlo": stablehlo,
    "onnx": onnx,
    "litert": litert,
    "savedmodel": savedmodel,
    "iree": iree,
}


def names(
    signature: dict[str, Any],
    part: str,
) -> list[str]:
    """Return the names of inputs or outputs as the target has them."""
    return [entry["as"] for entry in signature[part]]


def replay(folder: Path, inputs: Arrays) -> Arrays:
    """Return the outputs of any number of rows.

    Args:
      folder: of the exported model.
      inputs: by the signature's names.
    """
    signature = json.loads((folder / "signature.json").read_text())
    run = TARGETS[signature["target"]](folder, signature)
    given = {entry["as"]: inputs[entry["name"]] for entry in signature["inputs"]}
    rows = len(next(iter(given.values())))
    # Where a prediction depends on its batch, these are the batches of the trainer.
    fixed = signature["batch"]
    size = fixed or signature["at_once"] or rows
    starts = range(0, rows, size)
    sizes = [
        fixed
        or min(
            size,
            rows - start,
        )
        for start in starts
    ]
    parts = [
        run(rows_of(given, *part))
        for part in zip(
            starts,
            sizes,
            strict=True,
        )
    ]
    outputs = {}
    for entry in signature["outputs"]:
        leaves = [part[entry["as"]] for part in parts]
        outputs[entry["name"]] = np.concatenate(leaves)[:rows]
    return outputs


def rows_of(
    arrays: Arrays,
    start: int,
    size: int,
) -> Arrays:
    """Return a batch of rows, filled up by repeating the last one."""
    batch = {}
    for name, array in arrays.items():
        rows = array[start : start + size]
        filling = np.repeat(
            rows[-1:],
            size - len(rows),
            axis=0,
        )
        batch[name] = np.concatenate([rows, filling])
    return batch


def weights_of(folder: Path) -> Arrays:
    """Return the arrays of a safetensors file, which is no program."""
    from safetensors.numpy import load_file

    return dict(load_file(folder / "weights.safetensors"))


def main(arguments: list[str]) -> int:
    """Replay the rows of a file."""
    folder = Path(arguments[0])
    signature = json.loads((folder / "signature.json").read_text())
    with np.load(
        arguments[1],
        allow_pickle=False,
    ) as file:
        inputs = {name: file[name] for name in file.files}
    is_program = signature["target"] in TARGETS
    outputs = (
        replay(
            folder,
            inputs,
        )
        if is_program
        else weights_of(folder)
    )
    np.savez(arguments[2], **outputs)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    # a neighbour of this script must not hide a library of the same name
    sys.path = [
        place for place in sys.path if Path(place or ".") != Path(__file__).parent
    ]
    sys.exit(main(sys.argv[1:]))
