"""The server's description by OpenAPI, and the page that shows it.

FastAPI makes both of the functions below. They are never called: `application`
answers these paths before.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Body, FastAPI, Path
from fastapi.openapi.constants import REF_PREFIX
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

DESCRIPTION = """\
The [Open Inference Protocol v2](https://github.com/kserve/open-inference-protocol),
with the extension for binary tensors, and raw rows of data.
"""

Scalar = bool | int | float | str
Data = list[Any]
Parameters = dict[str, Any]
Model = Annotated[str, Path(description="name of a model")]
Change = Annotated[dict[str, Any] | None, Body()]
Version = Annotated[str, Path(description="of the model")]


class Error(BaseModel):
    """An error."""

    error: str


class Server(BaseModel):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """Whether the server lives."""

    live: bool


class Ready(BaseModel):
    """Whether the server, or a model, is to get requests."""

    ready: bool


class Names(BaseModel):
    """The models of the server."""

    models: list[str]


class Tensor(BaseModel):
    """A tensor that a model takes or returns; an extent of -1 is the rows."""

    name: str
    datatype: str
    shape: list[int]


class Metadata(BaseModel):
    """A model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: Parameters


class RequestInput(BaseModel):
    """A tensor that is sent."""

    name: str
    datatype: str
    shape: list[int]
    data: Data = Field(description="nested, or flat in row-major order")
    parameters: Parameters | None = None


class RequestOutput(BaseModel):
    """A tensor that is wanted."""

    name: str
    parameters: Parameters | None = None


class InferRequest(BaseModel):
    """A request for inference; parameters: `priority`, `timeout` in microseconds."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "7",
                "inputs": [
                    {
                        "name": "inputs",
                        "datatype": "FP32",
                        "shape": [1, 3],
                        "data": [0.5, 1, 2],
                    }
                ],
            }
        }
    )
    id: str | None = None
    inputs: list[RequestInput]
    outputs: list[RequestOutput] | None = None
    parameters: Parameters | None = None


class ResponseOutput(BaseModel):
    """A tensor that is returned."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Scalar]


class InferResponse(BaseModel):
    """The answer to a request for inference."""

    model_name: str
    model_version: str
    id: str = ""
    outputs: list[ResponseOutput]


class RowsRequest(BaseModel):
    """Raw rows by column; a picture is its file in base64."""

    id: str | None = None
    rows: list[dict[str, Any]]
    parameters: Parameters | None = None


class RowsResponse(BaseModel):
    """The answer to raw rows: predictions in words where there are some."""

    model_name: str
    model_version: str
    id: str = ""
    predictions: list[Any] = []
    outputs: dict[str, list[Any]]


class Entry(BaseModel):
    """A version of a model."""

    name: str
    version: str
    state: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": description}
    for status, description in {
        400: "the request is not as it should be",
        401: "no token",
        403: "not from here",
        404: "no such model, version or output",
        405: "not by this method",
        408: "the body took too long",
        413: "the body is too large",
        415: "compressed in a way that is not known",
        500: "the model failed",
        503: "not ready, leaving or full; see Retry-After",
        504: "no batch was free in time",
    }.items()
}
UNREADY: dict[int | str, dict[str, Any]] = {503: {"model": Ready}}
BINARY: dict[str, Any] = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {"$ref": f"{REF_PREFIX}InferRequest"},
            },
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary"},
            },
        },
        "required": True,
    }
}


def documents() -> FastAPI:
    """Return the application that describes the server."""
    app = FastAPI(
        title="lepton serve",
        description=DESCRIPTION,
        version="2",
        redoc_url=None,
        strict_content_type=False,
    )
    _add_health(app)
    _add_models(app)
    _add_inference(app)
    _add_repository(app)
    app.add_exception_handler(HTTPException, _as_error)
    return app


# ---- internals ----


async def _as_error(request: Any, error: Any) -> JSONResponse:
    """Return an error in the protocol's form."""
    return JSONResponse(
        {"error": f"there is nothing at {request.url.path!r}"},
        status_code=error.status_code,
    )


def _add_health(app: FastAPI) -> None:
    @app.get("/v2", responses=ERRORS, tags=["server"])
    async def server() -> Server:
        """Describe the server."""
        raise AssertionError

    @app.get("/v2/health/live", tags=["server"])
    async def live() -> Live:
        """Say that the server lives."""
        raise AssertionError

    @app.get("/v2/health/ready", responses=UNREADY, tags=["server"])
    async def ready() -> Ready:
        """Say whether the server is to get requests."""
        raise AssertionError


def _add_models(app: FastAPI) -> None:
    @app.get("/v2/models", responses=ERRORS, tags=["models"])
    async def names() -> Names:
        """List the models."""
        raise AssertionError

    @app.get("/v2/models/{model}", responses=ERRORS, tags=["models"])
    async def newest(model: Model) -> Metadata:
        """Describe the newest version of a model."""
        raise AssertionError

    @app.get("/v2/models/{model}/ready", responses=ERRORS, tags=["models"])
    async def newest_ready(model: Model) -> Ready:
        """Say whether a model is ready."""
        raise AssertionError

    path = "/v2/models/{model}/versions/{version}"

    @app.get(path, responses=ERRORS, tags=["models"])
    async def one(model: Model, version: Version) -> Metadata:
        """Describe a version of a model."""
        raise AssertionError

    @app.get(f"{path}/ready", responses=ERRORS, tags=["models"])
    async def one_ready(model: Model, version: Version) -> Ready:
        """Say whether a version of a model is ready."""
        raise AssertionError


def _add_inference(app: FastAPI) -> None:
    @app.post(
        "/v2/models/{model}/infer",
        responses=ERRORS,
        tags=["inference"],
        openapi_extra=BINARY,
    )
    async def infer(model: Model, body: InferRequest) -> InferResponse:
        """Return the outputs of tensors."""
        raise AssertionError

    @app.post(
        "/v2/models/{model}/versions/{version}/infer",
        responses=ERRORS,
        tags=["inference"],
        openapi_extra=BINARY,
    )
    async def infer_version(
        model: Model, version: Version, body: InferRequest
    ) -> InferResponse:
        """Return the outputs of tensors, by a version of a model."""
        raise AssertionError

    @app.post("/v2/models/{model}/rows", responses=ERRORS, tags=["inference"])
    async def rows(model: Model, body: RowsRequest) -> RowsResponse:
        """Return predictions of raw rows."""
        raise AssertionError

    @app.post(
        "/v2/models/{model}/versions/{version}/rows",
        responses=ERRORS,
        tags=["inference"],
    )
    async def rows_version(
        model: Model, version: Version, body: RowsRequest
    ) -> RowsResponse:
        """Return predictions of raw rows, by a version of a model."""
        raise AssertionError


def _add_repository(app: FastAPI) -> None:
    @app.post("/v2/repository/index", responses=ERRORS, tags=["repository"])
    async def index() -> list[Entry]:
        """List all versions of all models."""
        raise AssertionError

    @app.post(
        "/v2/repository/models/{model}/load", responses=ERRORS, tags=["repository"]
    )
    async def load(model: Model, body: Change = None) -> dict[str, str]:
        """Load an artifact, as a version, a canary or a shadow."""
        raise AssertionError

    @app.post(
        "/v2/repository/models/{model}/unload", responses=ERRORS, tags=["repository"]
    )
    async def unload(model: Model, body: Change = None) -> dict[str, str]:
        """Serve a model, or a version of it, no longer."""
        raise AssertionError
