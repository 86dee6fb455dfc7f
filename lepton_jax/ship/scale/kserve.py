"""Manifests for KServe: a runtime that serves artifacts, and a service for each.

    ServingRuntime      how `lepton serve` runs, for models of the format "lepton"
    InferenceService    one model: where its artifact is, how many replicas

KServe's own storage initializer fetches the artifact (s3://, gs://, pvc://, hf://,
https://), and puts it where the runtime looks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lepton_jax.errors import SettingError
from lepton_jax.ship.scale.deployment import (
    MODELS,
    TARGET_CPU,
    URI,
    Deployment,
    check_image,
    name_of,
    path_of,
)
from lepton_jax.ship.scale.documents import (
    as_yaml,
    container,
    ending,
    pod,
    pod_annotations,
    probes,
)

SUFFIX = ".yaml"
CONTAINER = "kserve-container"  # the name by which KServe knows the server's container
PORT_NAME = "http1"  # Knative's word for HTTP that is not version 2
FORMAT = "lepton"
FORMAT_VERSION = "1"
PVC = "pvc://"
ZIP = ".zip"


def client(deployment: Deployment, file: Path) -> list[str]:
    """Return the command that submits the manifest."""
    return ["kubectl", "apply", *deployment.options, "-f", str(file)]


def render(deployment: Deployment) -> str:
    """Return the manifest as YAML.

    Raises:
      SettingError: no image; an artifact that is no URI that KServe can fetch.
    """
    check_image(deployment, "kserve")
    services = [_service(deployment, artifact) for artifact in deployment.artifacts]
    return as_yaml([_runtime(deployment), *services], [deployment.made_by])


# ---- internals ----


def _runtime_name(deployment: Deployment) -> str:
    return f"lepton-{deployment.name}"


def _runtime(deployment: Deployment) -> dict[str, Any]:
    """Return the runtime; KServe puts a service's own name in for {{.Name}}."""
    deployment = _without_models(deployment)
    command = deployment.command(("{{.Name}}=" + str(MODELS),))
    server = container(deployment, CONTAINER, command, port_name=PORT_NAME)
    server |= probes(deployment) | ending()
    whole = pod(deployment, [server])
    spec = {
        "annotations": pod_annotations(deployment),
        "supportedModelFormats": [
            {"name": FORMAT, "version": FORMAT_VERSION, "autoSelect": True}
        ],
        "protocolVersions": ["v2"],
        "multiModel": False,
        "containers": whole["containers"],
        "volumes": whole["volumes"],
    }
    for name in ("nodeSelector", "tolerations"):
        if name in whole:
            spec[name] = whole[name]
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": _runtime_name(deployment)},
        "spec": spec,
    }


def _service(deployment: Deployment, artifact: str) -> dict[str, Any]:
    only = len(deployment.artifacts) == 1
    name = deployment.name if only else name_of(artifact)
    predictor: dict[str, Any] = {
        "minReplicas": deployment.least,
        "maxReplicas": deployment.most,
        "scaleMetric": "cpu",
        "scaleTarget": TARGET_CPU,
        "terminationGracePeriodSeconds": pod(deployment, [])[
            "terminationGracePeriodSeconds"
        ],
        "model": {
            "modelFormat": {"name": FORMAT, "version": FORMAT_VERSION},
            "runtime": _runtime_name(deployment),
            "protocolVersion": "v2",
            "storageUri": _uri(deployment, artifact),
        },
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {"predictor": predictor},
    }


def _without_models(deployment: Deployment) -> Deployment:
    """Return the request without the volumes that only hold its artifacts.

    The storage initializer mounts these.
    """
    paths = [path_of(artifact) for artifact in deployment.artifacts]
    others = [
        volume
        for volume in deployment.volumes
        if not any(_is_below(path, volume.folder) for path in paths)
    ]
    return replace(deployment, volumes=tuple(others))


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _uri(deployment: Deployment, artifact: str) -> str:
    """Return an artifact's URI: its own, or that of its place on a claim.

    Raises:
      SettingError: it is a path that is on no claim, or a zip file.
    """
    path = path_of(artifact)
    if path.endswith(ZIP):
        raise SettingError(
            f"KServe puts {path} into a folder as it is, and the runtime looks for the"
            " artifact there",
            where="command line, ARTIFACT",
            remedy="export the artifact as a folder: lepton export RUN -o NAME.lepton",
        )
    if URI.fullmatch(path):
        return path
    for volume in deployment.volumes:
        if _is_below(path, volume.folder) and not volume.source.startswith("/"):
            source = volume.source if "://" in volume.source else PVC + volume.source
            return source + path.removeprefix(volume.folder.rstrip("/"))
    raise SettingError(
        f"KServe can't fetch the artifact {path}",
        where="command line, ARTIFACT",
        remedy=(
            "name it by a URI, such as s3://BUCKET/digits.lepton or"
            " pvc://CLAIM/digits.lepton"
        ),
    )
