"""Many replicas of a server, and many rows at once: Kubernetes, KServe and Ray.

    deployment = Deployment(name="digits", artifacts=("/models/digits.lepton",), ...)
    text = render("k8s", deployment)          # a manifest; `kserve`, `ray`: the same

A command line has all of it by three calls (`lepton serve` does):

    scale.add_options(group)              # --on, --dry-run, --submit, --replicas ...
    if scale.wanted(options):
        return scale.start(options, artifacts, scale.inside(words, artifacts))
"""

from lepton_jax.ship.scale.deployment import Deployment
from lepton_jax.ship.scale.submit import (
    PLACES,
    add_options,
    inside,
    render,
    start,
    wanted,
)

__all__ = [
    "PLACES",
    "Deployment",
    "add_options",
    "inside",
    "render",
    "start",
    "wanted",
]
