"""A process that compiles one program, until it is stopped.

It is a script that imports nothing of Lepton, so that it starts at once. XLA's dumps
tell the parent how far it is, see `early`. Its one argument is a folder with

    module.mlir     the program, MLIR bytecode
    options.pb      XLA's compile options, a serialized protocol buffer
    request.json    platform, and device ids in the mesh's order; for TPUs the topology

If the program compiles, or is refused, before the process is stopped, it writes
`end.json`: XLA's account of memory, or its message.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
from jax._src.interpreters import mlir
from jax.experimental import topologies
from jaxlib import _jax
from jaxlib.mlir import ir

PARTS = ("argument", "temp", "output", "alias", "generated_code")


def main(folder: Path) -> None:
    """Compile the program in a folder."""
    request = json.loads((folder / "request.json").read_text())
    options = _jax.CompileOptions.ParseFromString((folder / "options.pb").read_bytes())
    by_id = {device.id: device for device in _devices(request)}
    chosen = tuple(by_id[number] for number in request["devices"])
    devices = _jax.DeviceList(chosen)
    client = chosen[0].client
    debug = options.executable_build_options.debug_options
    debug.xla_dump_to = str(folder / "dump")
    with mlir.make_ir_context():
        module = ir.Module.parse((folder / "module.mlir").read_bytes())
        live = request["platform"] == "cpu"
        compile_program = client.compile_and_load if live else client.compile
        try:
            compiled = compile_program(module, devices, options)
        except jax.errors.JaxRuntimeError as error:
            _write(folder, {"error": str(error)})
            return
    stats = compiled.get_compiled_memory_stats()
    sizes = {name: getattr(stats, f"{name}_size_in_bytes") for name in PARTS}
    high = None if live else stats.peak_memory_in_bytes
    _write(folder, sizes | {"high": high})


def _devices(request: dict[str, Any]) -> list[Any]:
    if request["platform"] == "cpu":
        return jax.devices("cpu")
    description = topologies.get_topology_desc(
        platform=request["platform"],
        topology_name=request["topology"],
        **request["topology_options"],
    )
    return list(description.devices)


def _write(folder: Path, data: dict[str, Any]) -> None:
    draft = folder / "end.draft"
    draft.write_text(json.dumps(data))
    draft.replace(folder / "end.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
