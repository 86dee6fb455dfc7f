"""The same model served as one would without Lepton's server.

    python -m tools.bench.serving.rivals fastapi|fastapi-threads|litserve ARTIFACT PORT

`fastapi` is the handler that comes to mind: a Pydantic model, an `async def` that calls
the jitted function on one row; `fastapi-threads` has a plain `def`, which FastAPI runs
in its threads. LitServe puts requests together, in a process of its own for the model.
Each prints "ready" once the model is warm.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np


def function_of(place: str) -> Any:
    """Return the artifact's program under `jit`, from an array to an array."""
    import jax

    from lepton_jax import Artifact

    artifact = Artifact.open(place)
    weights = {path: jax.device_put(array) for path, array in artifact.weights.items()}
    (tensor,) = artifact.inputs
    run = jax.jit(artifact.exported.call)

    def call(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(run(weights, {tensor.name: inputs})["outputs"])

    return call, (1, *tensor.shape[1:])


def fastapi(place: str, port: int, in_threads: bool) -> None:
    """Serve with a plain handler of FastAPI."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    call, shape = function_of(place)
    call(np.zeros(shape, np.float32))
    app = FastAPI()

    class Body(BaseModel):
        inputs: list[float]

    def answer(body: Body) -> dict[str, Any]:
        row = np.array(body.inputs, np.float32).reshape(shape)
        return {"outputs": call(row).tolist()}

    async def handler(body: Body) -> dict[str, Any]:
        return answer(body)

    answer.__annotations__["body"] = Body
    handler.__annotations__["body"] = Body
    app.post("/predict")(answer if in_threads else handler)
    print("ready", flush=True)
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def main() -> None:
    """Run the server that the command line names."""
    kind, place, port = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    if kind == "litserve":
        from tools.bench.serving.lit_api import serve

        serve(place, int(port))
    else:
        fastapi(place, int(port), kind == "fastapi-threads")


if __name__ == "__main__":
    main()
