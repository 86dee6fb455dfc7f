"""Manifests as YAML, and the parts that those of Kubernetes and KServe share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from lepton_jax.launch.submit.job import Volume
from lepton_jax.ship.scale.deployment import (
    GRACE,
    LONGEST_START,
    PAUSE,
    PORT,
    Deployment,
)

MEBIBYTE = 2**20
PERIOD = 5  # seconds between two probes; assumption
# Folders that a server writes to; all others of its container are closed to it.
SCRATCH = {"tmp": "/tmp", "cache": "/cache"}
USER = 10001  # of the image, without rights on the node
# Writable caches, whatever the user of the container is.
CACHES = {
    "XDG_CACHE_HOME": "/cache",
    "JAX_COMPILATION_CACHE_DIR": "/cache/jax",
    "PYTHONDONTWRITEBYTECODE": "1",
}
GCSFUSE = "gcsfuse.csi.storage.gke.io"
BUCKET = "gs://"


class _Dumper(yaml.SafeDumper):
    """YAML as manifests are written: lists below their key, nothing by reference."""

    def increase_indent(
        self,
        flow: bool = False,
        indentless: bool = False,
    ) -> None:
        """Indent lists, too."""
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        """Write out what stands in several places."""
        return True


def as_yaml(
    documents: Iterable[Any],
    heading: Iterable[str] = (),
) -> str:
    """Return documents as one text, under lines of comment."""
    comment = "".join(f"# {line}\n" for line in heading if line)
    return comment + yaml.dump_all(
        documents,
        Dumper=_Dumper,
        sort_keys=False,
        width=1000,
        allow_unicode=True,
    )


def container(
    deployment: Deployment,
    name: str,
    command: list[str],
    port_name: str = "http",
) -> dict[str, Any]:
    """Return a container of a replica, without probes.

    Args:
      deployment: the request; it has an image.
      name: of the container.
      command: of the server.
      port_name: of the server's port.
    """
    resources = _resources(deployment)
    return {
        "name": name,
        "image": deployment.image,
        "command": [literal(word) for word in command],
        "ports": [{"name": port_name, "containerPort": PORT, "protocol": "TCP"}],
        "env": _environment(deployment),
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": USER,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            *({"name": name, "mountPath": folder} for name, folder in SCRATCH.items()),
            *(
                {"name": f"volume-{number}", "mountPath": volume.folder}
                | _read_only(volume)
                for number, volume in enumerate(deployment.volumes)
            ),
        ],
    }


def probes(deployment: Deployment) -> dict[str, Any]:
    """Return the probes of a replica: has it started, is it ready, does it live."""
    ready = _get("/v2/health/ready", deployment.scheme)
    live = _get("/v2/health/live", deployment.scheme)
    return {
        # compiling a ladder of sizes takes minutes, and is no reason to begin again
        "startupProbe": {
            "httpGet": ready,
            "periodSeconds": PERIOD,
            "failureThreshold": LONGEST_START // PERIOD,
        },
        "readinessProbe": {
            "httpGet": ready,
            "periodSeconds": PERIOD,
            "failureThreshold": 1,
        },
        "livenessProbe": {
            "httpGet": live,
            "periodSeconds": 2 * PERIOD,
            "timeoutSeconds": PERIOD,
            "failureThreshold": 3,
        },
    }


def ending() -> dict[str, Any]:
    """Return what a container does before SIGTERM: wait until nobody sends any more."""
    return {"lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PAUSE)]}}}}


def pod(
    deployment: Deployment,
    containers: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the specification of a replica's pod."""
    found: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE + PAUSE,
    }
    if deployment.node:
        found["nodeSelector"] = dict(deployment.node)
    if deployment.gpus:
        found["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    found["containers"] = containers
    found["volumes"] = volumes(deployment)
    return found


def pod_annotations(deployment: Deployment) -> dict[str, str]:
    """Return the annotations of a pod: where its metrics are; buckets."""
    found = {
        "prometheus.io/scrape": "true",
        "prometheus.io/path": "/metrics",
        "prometheus.io/port": str(PORT),
        "prometheus.io/scheme": deployment.scheme.lower(),
    }
    if any(volume.source.startswith(BUCKET) for volume in deployment.volumes):
        found["gke-gcsfuse/volumes"] = "true"
    return found


def volumes(deployment: Deployment) -> list[dict[str, Any]]:
    """Return the volumes of a pod."""
    return [
        *({"name": name, "emptyDir": {}} for name in SCRATCH),
        *(
            {"name": f"volume-{number}"} | _source(volume)
            for number, volume in enumerate(deployment.volumes)
        ),
    ]


def literal(text: str) -> str:
    """Return a text in which Kubernetes puts no variable in for $(NAME)."""
    return text.replace("$", "$$")


# ---- internals ----


def _get(path: str, scheme: str) -> dict[str, Any]:
    # by number: Knative, below KServe, knows no ports by name
    return {"path": path, "port": PORT, "scheme": scheme}


def _environment(deployment: Deployment) -> list[dict[str, str]]:
    variables = {
        # a replica whose GPU fails ends, instead of answering from its CPU
        "JAX_PLATFORMS": deployment.platform,
        "PYTHONUNBUFFERED": "1",
        **CACHES,
        **deployment.environment,
    }
    return [
        {"name": name, "value": literal(value)} for name, value in variables.items()
    ]


def _resources(deployment: Deployment) -> dict[str, Any]:
    """Return what a container requests, and its limits: no limit on its cores.

    A limit on cores slows a server down in the middle of a batch, whether or not others
    want them.
    """
    requests: dict[str, Any] = {"cpu": deployment.cpus}
    limits: dict[str, Any] = {}
    if deployment.memory:
        amount = f"{deployment.memory // MEBIBYTE}Mi"
        requests["memory"] = amount
        limits["memory"] = amount
    if deployment.gpus:
        limits["nvidia.com/gpu"] = deployment.gpus
    return {"requests": requests} | ({"limits": limits} if limits else {})


def _source(volume: Volume) -> dict[str, Any]:
    """Return where Kubernetes finds a volume: a bucket, a node's folder, or a claim."""
    if volume.source.startswith(BUCKET):
        return {
            "csi": {
                "driver": GCSFUSE,
                **_read_only(volume),
                "volumeAttributes": {"bucketName": volume.source.removeprefix(BUCKET)},
            }
        }
    if volume.source.startswith("/"):
        return {"hostPath": {"path": volume.source}}
    claim = {"claimName": volume.source} | _read_only(volume)
    return {"persistentVolumeClaim": claim}


def _read_only(volume: Volume) -> dict[str, Any]:
    return {"readOnly": True} if volume.read_only else {}
