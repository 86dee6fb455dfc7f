"""Manifests for Kubernetes: replicas behind a service, and what keeps them there.

Deployment                how a replica runs, and that a new version comes up
                          before an old one goes
Service                   one address for all of them; only ready ones are asked
PodDisruptionBudget       a drained node takes one replica at a time
HorizontalPodAutoscaler   more replicas under load, fewer when it is over
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lepton_jax.ship.scale.deployment import (
    PORT,
    TARGET_CPU,
    TARGET_QUEUE,
    Deployment,
    check_image,
    check_seen,
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
CONTAINER = "serve"
HTTP = 80  # port of the service
# Seconds for which a quiet server keeps its replicas: Kubernetes' own default, said
# here because a warm replica is dear.
QUIET = 300
KEPT_VERSIONS = 3  # of the Deployment, to go back to; assumption


def client(deployment: Deployment, file: Path) -> list[str]:
    """Return the command that submits the manifest."""
    return ["kubectl", "apply", *deployment.options, "-f", str(file)]


def render(deployment: Deployment) -> str:
    """Return the manifest as YAML.

    Raises:
      SettingError: no image; an artifact that the replicas can't see.
    """
    check_image(deployment, "k8s")
    check_seen(deployment)
    documents = [
        _deployment(deployment),
        _service(deployment),
        _budget(deployment),
    ]
    if deployment.grows:
        documents.append(_autoscaler(deployment))
    return as_yaml(documents, _heading(deployment))


# ---- internals ----


def _heading(deployment: Deployment) -> list[str]:
    lines = [deployment.made_by]
    if not deployment.volumes:
        lines.append("no volume is mounted: the artifacts must lie in the image")
    if deployment.grows and deployment.gpus:
        lines.append(
            "a replica with GPUs is judged by its queue: needs an adapter that serves"
            " Prometheus' metrics to Kubernetes (custom.metrics.k8s.io)"
        )
    return lines


def _labels(deployment: Deployment) -> dict[str, str]:
    return {"app.kubernetes.io/name": deployment.name}


def _metadata(deployment: Deployment) -> dict[str, Any]:
    return {"name": deployment.name, "labels": _labels(deployment)}


def _deployment(deployment: Deployment) -> dict[str, Any]:
    labels = _labels(deployment)
    replica = container(deployment, CONTAINER, deployment.command())
    replica |= probes(deployment) | ending()
    spec: dict[str, Any] = {
        "revisionHistoryLimit": KEPT_VERSIONS,
        "selector": {"matchLabels": labels},
        # a replica goes only when another one is ready in its place
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
        },
        "template": {
            "metadata": {"labels": labels, "annotations": pod_annotations(deployment)},
            "spec": pod(deployment, [replica])
            | {"topologySpreadConstraints": [_spread(labels)]},
        },
    }
    # where it grows, the autoscaler says how many: a number here would undo its work
    if not deployment.grows:
        spec = {"replicas": deployment.least, **spec}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(deployment),
        "spec": spec,
    }


def _spread(labels: dict[str, str]) -> dict[str, Any]:
    """Return the wish that replicas lie on different machines."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels},
    }


def _service(deployment: Deployment) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(deployment),
        "spec": {
            "selector": _labels(deployment),
            "ports": [
                {"name": "http", "port": HTTP, "targetPort": PORT, "protocol": "TCP"}
            ],
        },
    }


def _budget(deployment: Deployment) -> dict[str, Any]:
    """Return the budget: one replica at a time may be taken away.

    A budget that kept the only replica would keep its node from ever being drained.
    """
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(deployment),
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": _labels(deployment)},
        },
    }


def _autoscaler(deployment: Deployment) -> dict[str, Any]:
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(deployment),
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": deployment.name,
            },
            "minReplicas": deployment.least,
            "maxReplicas": deployment.most,
            "metrics": [_by_queue() if deployment.gpus else _by_cores()],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": QUIET}},
        },
    }


def _by_cores() -> dict[str, Any]:
    return {
        "type": "Resource",
        "resource": {
            "name": "cpu",
            "target": {"type": "Utilization", "averageUtilization": TARGET_CPU},
        },
    }


def _by_queue() -> dict[str, Any]:
    """Return the measure of a server whose cores are idle while its GPU computes."""
    return {
        "type": "Pods",
        "pods": {
            "metric": {"name": "lepton_serve_queue_rows"},
            "target": {"type": "AverageValue", "averageValue": str(TARGET_QUEUE)},
        },
    }
