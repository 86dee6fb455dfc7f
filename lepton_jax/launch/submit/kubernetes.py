"""Manifest for Kubernetes: a JobSet, or a plain indexed Job with its service.

The latter is for clusters where JobSet is not installed.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from lepton_jax.errors import SettingError, nearest
from lepton_jax.hardware import topology
from lepton_jax.launch import tokens
from lepton_jax.launch.cluster import PORT, joined
from lepton_jax.launch.submit.job import MISTAKE, Job, Volume, heading

SUFFIX = ".yaml"
CONTAINER = "train"
ROLE = "hosts"
TOKEN_KEY = "token"
# stands in a manifest that is only shown; a run refuses it, for it has spaces
NO_TOKEN = "write another here: openssl rand -hex 32"
# seconds from SIGTERM to SIGKILL; the supervisors' own limit, "stop", is shorter
TIME_TO_SAVE = 120
# assumption: seconds for which a machine that does not answer is waited for;
# Kubernetes' own are 300
TIME_TO_RETURN = 30
GCSFUSE = "gcsfuse.csi.storage.gke.io"


class TpuMachine(NamedTuple):
    """Machines of one kind of TPU on GKE.

    Args:
      accelerator: GKE's name of the machines.
      alone: the most chips of a machine that is a slice by itself.
      among: chips of a machine in a larger slice.
    """

    accelerator: str
    alone: int
    among: int


# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, tables of machine types
# and topologies
TPUS = {
    "v4": TpuMachine("tpu-v4-podslice", 4, 4),
    "v5e": TpuMachine("tpu-v5-lite-podslice", 8, 4),
    "v5p": TpuMachine("tpu-v5p-slice", 4, 4),
    "v6e": TpuMachine("tpu-v6e-slice", 8, 4),
    "tpu7x": TpuMachine("tpu7x", 4, 4),
}


def client(job: Job, file: Path) -> list[str]:
    """Return the command that submits the manifest."""
    return [
        "kubectl",
        "create",
        *job.options,
        "-f",
        str(file),
    ]


def render(job: Job) -> str:
    """Return the manifest as YAML.

    Raises:
      SettingError: no image; a run folder that would be lost with its container; an
        unknown TPU slice.
    """
    if job.image is None:
        raise SettingError(
            "--on k8s needs an image",
            where="command line, --job-image",
            remedy=(
                "build one (docs/kubernetes/Dockerfile) and name it: --job-image IMAGE"
            ),
        )
    run_dir = PurePosixPath(job.run_dir)
    if not any(
        run_dir.is_relative_to(volume.folder) and not volume.read_only
        for volume in job.volumes
    ):
        raise SettingError(
            f"the run folder {job.run_dir} would be lost with its container",
            where="command line, --run-dir",
            remedy=(
                "mount a volume and put the run there: --job-volume CLAIM:/data"
                " --run-dir /data/runs/NAME"
            ),
        )
    documents = _plain(job) if job.detail == "job" else [_jobset(job)]
    hosts, _ = _machines(job)
    if hosts * job.slices > 1:
        documents = [_secret(job), *documents]
    comment = "".join(f"{line}\n" for line in heading(job))
    return comment + yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=1000
    )


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


def _secret(job: Job) -> dict[str, Any]:
    """Return the secret that holds the token by which the hosts know each other."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": _secret_name(job)},
        "stringData": {TOKEN_KEY: job.token or NO_TOKEN},
    }


def _secret_name(job: Job) -> str:
    return f"{job.name}-token"


def _jobset(job: Job) -> dict[str, Any]:
    """Return a JobSet: one indexed Job for each slice."""
    hosts, chips = _machines(job)
    first = f"{job.name}-{ROLE}-0-0.{job.name}"
    template = _job_spec(job, hosts, chips, first)
    replicated = {
        "name": ROLE,
        "replicas": job.slices,
        "template": {"spec": template},
    }
    metadata: dict[str, Any] = {"name": job.name}
    # the hosts of a slice lie in one node pool, which no other job uses
    if job.slices > 1:
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": (
                "cloud.google.com/gke-nodepool"
            )
        }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            # its jobs replace their pods themselves
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [replicated],
        },
    }


def _plain(job: Job) -> list[dict[str, Any]]:
    """Return an indexed Job, and the service by which its pods have names."""
    labels = {"job-name": job.name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels,
        },
    }
    spec = _job_spec(job, job.hosts, 0, f"{job.name}-0.{job.name}")
    template = spec["template"]
    template["spec"] = {"subdomain": job.name, **template["spec"]}
    return [
        service,
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job.name},
            "spec": spec,
        },
    ]


def _job_spec(
    job: Job,
    hosts: int,
    chips: int,
    first: str,
) -> dict[str, Any]:
    """Return the specification of an indexed Job.

    A pod that fails is replaced; the supervisors of the others wait for its own.

    Args:
      job: the request.
      hosts: number of pods.
      chips: TPU chips of each; 0: none.
      first: name of the pod with index 0.
    """
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
    }
    if job.seconds:
        spec["activeDeadlineSeconds"] = job.seconds
    # counted for each pod by itself, for when a run ends all do
    spec["backoffLimitPerIndex"] = job.retries
    spec["maxFailedIndexes"] = 0
    spec["podFailurePolicy"] = {"rules": _failure_rules()}

    template: dict[str, Any] = {}
    if any(_bucket(volume) for volume in job.volumes):
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    template["spec"] = _pod(job, hosts, chips, first)
    return spec | {"template": template}


def _failure_rules() -> list[dict[str, Any]]:
    """Return which ends of a pod are a failure."""
    code = {"containerName": CONTAINER, "operator": "In"}
    return [
        {"action": "FailJob", "onExitCodes": {**code, "values": [MISTAKE]}},
        # a pod that is evicted, and the others, which have saved with it, did not fail
        {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {"action": "Ignore", "onExitCodes": {**code, "values": [130, 143]}},
    ]


# ---- the pod ----


def _pod(
    job: Job,
    hosts: int,
    chips: int,
    first: str,
) -> dict[str, Any]:
    """Return the specification of a pod; arguments as of `_job_spec`."""
    mounts, volumes = _volumes(job)
    container = _container(job, hosts, chips, first)
    if mounts:
        container["volumeMounts"] = mounts

    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": TIME_TO_SAVE,
    }
    labels = _labels(job)
    if labels:
        pod["nodeSelector"] = labels
    pod["tolerations"] = [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": TIME_TO_RETURN,
        }
        for state in ("not-ready", "unreachable")
    ]
    if job.gpus:  # machines with GPUs are kept free of pods that do not say this
        pod["tolerations"].append(
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        )
    pod["containers"] = [container]
    if volumes:
        pod["volumes"] = volumes
    return pod


def _labels(job: Job) -> dict[str, str]:
    """Return the labels that a node must have; the user's come last, and win."""
    if not job.topology:
        return dict(job.node)
    kind, _, shape = job.topology.partition(":")
    labels = {
        "cloud.google.com/gke-tpu-accelerator": TPUS[kind].accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    return labels | dict(job.node)


def _container(
    job: Job,
    hosts: int,
    chips: int,
    first: str,
) -> dict[str, Any]:
    container: dict[str, Any] = {"name": CONTAINER, "image": job.image}
    if job.folder:
        container["workingDir"] = job.folder
    container["command"] = [_literal(word) for word in job.command]
    container["env"] = _environment(job, hosts, chips, first)
    resources = _resources(job, chips)
    if resources:
        container["resources"] = resources
    if not chips and hosts > 1:
        container["ports"] = [{"containerPort": PORT}]
    return container


def _environment(
    job: Job,
    hosts: int,
    chips: int,
    first: str,
) -> list[dict[str, Any]]:
    """Return the variables of a container."""
    platform = "cuda" if job.gpus else None
    variables: dict[str, str] = {}
    if chips:
        # GKE tells a TPU's hosts of each other by itself
        platform = "tpu"
    elif hosts > 1:
        variables["JAX_COORDINATOR_ADDRESS"] = joined(first, PORT)
        variables["JAX_NUM_PROCESSES"] = str(hosts)
    for name, (value, _) in job.variables(platform).items():
        variables[name] = value

    environment: list[dict[str, Any]] = [
        {"name": name, "value": _literal(value)} for name, value in variables.items()
    ]
    if hosts * job.slices > 1:
        key = {"name": _secret_name(job), "key": TOKEN_KEY}
        environment.append(
            {"name": tokens.VARIABLE, "valueFrom": {"secretKeyRef": key}}
        )
    return environment


def _resources(job: Job, chips: int) -> dict[str, Any]:
    """Return what a container requests, and its limits."""
    amounts: dict[str, Any] = {}
    if job.cpus:
        amounts["cpu"] = job.cpus
    if job.memory:
        amounts["memory"] = f"{job.memory // 2**20}Mi"

    limits = dict(amounts)
    if chips:
        limits["google.com/tpu"] = chips
    elif job.gpus:
        limits["nvidia.com/gpu"] = job.gpus

    resources = {}
    if amounts:
        resources["requests"] = amounts
    if limits:
        resources["limits"] = limits
    return resources


def _literal(text: str) -> str:
    """Return a text in which Kubernetes puts no variable in for $(NAME)."""
    return text.replace("$", "$$")


def _bucket(volume: Volume) -> str:
    """Return the name of a bucket; empty if the volume is none."""
    prefix = "gs://"
    if volume.source.startswith(prefix):
        return volume.source.removeprefix(prefix)
    return ""


def _volumes(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the mounts of the container, and the volumes of the pod."""
    mounts: list[dict[str, Any]] = []
    volumes: list[dict[str, Any]] = []
    for number, volume in enumerate(job.volumes):
        name = f"volume-{number}"
        mount = {"name": name, "mountPath": volume.folder}
        mounts.append(mount | _read_only(volume))
        volumes.append({"name": name} | _source(volume))

    # NCCL's GPUs of a machine meet in shared memory, of which a container has 64 MB
    if job.gpus > 1:
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    return mounts, volumes


def _source(volume: Volume) -> dict[str, Any]:
    """Return where Kubernetes finds a volume: a bucket, a node's folder, or a claim."""
    if _bucket(volume):
        return {
            "csi": {
                "driver": GCSFUSE,
                **_read_only(volume),
                "volumeAttributes": {"bucketName": _bucket(volume)},
            }
        }
    if volume.source.startswith("/"):
        return {"hostPath": {"path": volume.source}}
    claim = {"claimName": volume.source} | _read_only(volume)
    return {"persistentVolumeClaim": claim}


def _read_only(volume: Volume) -> dict[str, Any]:
    return {"readOnly": True} if volume.read_only else {}


def _machines(job: Job) -> tuple[int, int]:
    """Return the hosts of a slice, and the chips of a host; 0 chips without a TPU."""
    if job.topology is None:
        if job.slices > 1:
            raise SettingError(
                "--job-slices is given without --job-topology",
                where="command line, --job-slices",
                remedy=(
                    "name the slice, e.g. --job-topology v5p:4x4x4, or ask for more"
                    " --hosts"
                ),
            )
        return job.hosts, 0
    kind, _, shape = job.topology.partition(":")
    if kind not in TPUS or not shape:
        raise SettingError(
            f"--job-topology is {job.topology!r}{nearest(kind, TPUS)}",
            where="command line, --job-topology",
            remedy=f"name a TPU slice, e.g. v5p:4x4x4; the kinds are {', '.join(TPUS)}",
        )
    if job.gpus:
        raise SettingError(
            "--job-gpus and --job-topology are both given",
            where="command line, --job-gpus",
            remedy="leave out one of them",
        )
    chips = topology(job.topology).chips
    machine = TPUS[kind]
    if chips <= machine.alone:
        return 1, chips
    if chips % machine.among:
        raise SettingError(
            f"{job.topology} has {chips} chips, and a machine has {machine.among}",
            where="command line, --job-topology",
            remedy="name a slice of whole machines",
        )
    return chips // machine.among, machine.among
