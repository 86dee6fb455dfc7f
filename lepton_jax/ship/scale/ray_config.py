"""Configuration of a Ray Serve application: replicas on a Ray cluster.

The cluster's own proxies take requests, and hand each to the replica that has the
shorter queue of two; the replica is the same server as anywhere else, batches included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lepton_jax.errors import SettingError
from lepton_jax.ship.scale.deployment import (
    GRACE,
    PORT,
    TARGET_QUEUE,
    Deployment,
    check_seen,
)
from lepton_jax.ship.scale.documents import as_yaml

SUFFIX = ".yaml"
APPLICATION = "lepton_jax.cli.ray_serve:application"
REPLICA = "Replica"  # of Ray's deployment in the application
# Requests that a replica has at once before Ray sends it no more: its own queue says
# 503 first. Assumption.
MOST_REQUESTS = 1_000


def client(deployment: Deployment, file: Path) -> list[str]:
    """Return the command that submits the configuration."""
    return ["serve", "deploy", *deployment.options, str(file)]


def render(deployment: Deployment) -> str:
    """Return the configuration as YAML.

    Raises:
      SettingError: an artifact that the replicas can't see; an option that a Ray
        cluster does not know.
    """
    check_seen(deployment)
    for name in ("image", "volumes", "node"):
        if getattr(deployment, name):
            flag = f"--job-{name.removesuffix('s')}"
            raise SettingError(
                f"{flag} means nothing to --on ray",
                where=f"command line, {flag}",
                remedy="leave it out: the cluster's nodes are there already",
            )
    return as_yaml([config(deployment)], [deployment.made_by])


def config(deployment: Deployment) -> dict[str, Any]:
    """Return the configuration as plain data, as Ray's `ServeDeploySchema` reads it."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "logging_config": {"encoding": "JSON"},
        "applications": [
            {
                "name": deployment.name,
                "route_prefix": "/",
                "import_path": APPLICATION,
                "runtime_env": {"env_vars": _variables(deployment)},
                "args": {
                    "artifacts": list(deployment.artifacts),
                    "arguments": list(deployment.arguments),
                },
                "deployments": [_replica(deployment)],
            }
        ],
    }


# ---- internals ----


def _variables(deployment: Deployment) -> dict[str, str]:
    return {"JAX_PLATFORMS": deployment.platform, **deployment.environment}


def _replica(deployment: Deployment) -> dict[str, Any]:
    actor: dict[str, Any] = {"num_cpus": deployment.cpus}
    if deployment.gpus:
        actor["num_gpus"] = deployment.gpus
    if deployment.memory:
        actor["memory"] = deployment.memory
    replica: dict[str, Any] = {
        "name": REPLICA,
        "max_ongoing_requests": MOST_REQUESTS,
        "graceful_shutdown_timeout_s": GRACE,
        "health_check_period_s": 5,
        "ray_actor_options": actor,
    }
    if deployment.grows:
        replica["autoscaling_config"] = {
            "min_replicas": deployment.least,
            "max_replicas": deployment.most,
            "target_ongoing_requests": TARGET_QUEUE,
        }
    else:
        replica["num_replicas"] = deployment.least
    return replica
