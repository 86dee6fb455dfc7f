"""The same model served by LitServe, which sends this class to its own processes."""

from __future__ import annotations

from typing import Any

import litserve
import numpy as np

from tools.bench.serving.rivals import function_of

LARGEST = 64  # rows of a batch
COLLECT = 0.002  # seconds that a request waits for company


class Api(litserve.LitAPI):
    """A model that takes one row a request.

    Args:
      place: of the artifact.
      **settings: of LitServe.
    """

    def __init__(self, place: str, **settings: Any):
        super().__init__(**settings)
        self.place = place

    def setup(self, device: Any) -> None:
        """Compile each size that a batch is filled up to."""
        self.call, self.shape = function_of(self.place)
        size = 1
        while size <= LARGEST:
            self.call(np.zeros((size, *self.shape[1:]), np.float32))
            size *= 2

    def decode_request(self, request):  # LitServe takes an annotation for a schema
        """Return a row."""
        return np.array(request["inputs"], np.float32).reshape(self.shape[1:])

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Return rows as an array."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the outputs of a batch, filled up to the next power of two."""
        size = 1 << (len(x) - 1).bit_length()
        filling = np.repeat(x[-1:], size - len(x), axis=0)
        return self.call(np.concatenate([x, filling]))[: len(x)]

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """Return the rows of the outputs."""
        return list(output)

    def encode_response(self, output):
        """Return an answer."""
        return {"outputs": output.tolist()}


def serve(place: str, port: int) -> None:
    """Serve an artifact until a signal."""
    api = Api(place, max_batch_size=LARGEST, batch_timeout=COLLECT)
    server = litserve.LitServer(api, accelerator="cpu", timeout=60)
    server.run(port=port, generate_client_file=False, log_level="error")
