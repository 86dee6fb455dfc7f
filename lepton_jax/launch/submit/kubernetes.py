"""A manifest for Kubernetes: a JobSet, or a plain indexed Job with its service where
JobSet is not installed.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

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
# in a manifest that is only shown; a run refuses it, for it has spaces
NO_TOKEN = "write another here: openssl rand -hex 32"
# seconds from SIGTERM to SIGKILL; the supervisors' own limit, "stop", is shorter
TIME_TO_SAVE = 120
# seconds in which a machine that does not answer is waited for; Kubernetes' own are 300
TIME_TO_RETURN = 30
GCSFUSE = "gcsfuse.csi.storage.gke.io"
# GKE's name of the machines, the most chips that one machine of the kind has alone, and
# the chips of one in a larger slice
# (cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, tables of machine types
# and topologies)
TPUS = {
    "v4": ("tpu-v4-podslice", 4, 4),
    "v5e": ("tpu-v5-lite-podslice", 8, 4),
    "v5p": ("tpu-v5p-slice", 4, 4),
    "v6e": ("tpu-v6e-slice", 8, 4),
    "tpu7x": ("tpu7x", 4, 4),
}


def client(job: Job, file: Path) -> list[str]:
    return [
        "kubectl",
        "create",
        *job.options,
        "-f",
        str(file),
    ]


def render(job: Job) -> str:
    """The manifest as YAML.

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
        run_dir.is_relative_to(each.folder) and not each.read_only
        for each in job.volumes
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
    """Lists indented below their key, as manifests are written; nothing by
    reference.
    """

    def increase_indent(
        self,
        flow: bool = False,
        indentless: bool = False,
    ) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _secret(job: Job) -> dict[str, Any]:
    """The token by which the hosts know each other."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": _secret_name(job)},
        "stringData": {TOKEN_KEY: job.token or NO_TOKEN},
    }


def _secret_name(job: Job) -> str:
    return f"{job.name}-token"


def _jobset(job: Job) -> dict[str, Any]:
    hosts, chips = _machines(job)
    first = f"{job.name}-{ROLE}-0-0.{job.name}"
    template = _job_spec(job, hosts, chips, first)
    replicated = {
        "name": ROLE,
        "replicas": job.slices,
        "template": {"spec": template},
    }
    metadata: dict[str, Any] = {"name": job.name}
    if job.slices > 1:  # the hosts of a slice lie in one node pool, and nobody else's
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
    spec["template"]["spec"] = {"subdomain": job.name, **spec["template"]["spec"]}
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
    """A pod that fails is replaced, and its supervisor found again by the others, who
    wait for it.
    """
    code = {"containerName": CONTAINER, "operator": "In"}
    rules = [
        {"action": "FailJob", "onExitCodes": {**code, "values": [MISTAKE]}},
        # of a pod that is evicted, and of the others, which have saved with it:
        # that is no failure
        {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {"action": "Ignore", "onExitCodes": {**code, "values": [130, 143]}},
    ]
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
    }
    if job.seconds:
        spec["activeDeadlineSeconds"] = job.seconds
    annotations = (
        {"gke-gcsfuse/volumes": "true"}
        if any(_bucket(each) for each in job.volumes)
        else {}
    )
    template: dict[str, Any] = (
        {"metadata": {"annotations": annotations}} if annotations else {}
    )
    # counted for each pod by itself, for when a run ends all do
    spec |= {
        "backoffLimitPerIndex": job.retries,
        "maxFailedIndexes": 0,
        "podFailurePolicy": {"rules": rules},
    }
    return spec | {
        "template": template
        | {
            "spec": _pod(
                job,
                hosts,
                chips,
                first,
            )
        }
    }


def _pod(
    job: Job,
    hosts: int,
    chips: int,
    first: str,
) -> dict[str, Any]:
    node = dict(job.node)
    if job.topology:
        kind, _, shape = job.topology.partition(":")
        node = {
            "cloud.google.com/gke-tpu-accelerator": TPUS[kind][0],
            "cloud.google.com/gke-tpu-topology": shape,
        } | node
    variables = {
        name: value
        for name, (value, _) in job.variables(
            "tpu" if chips else "cuda" if job.gpus else None
        ).items()
    }
    # GKE tells a TPU's hosts of each other by itself; their number Kubernetes tells all
    if not chips and hosts > 1:
        variables = {
            "JAX_COORDINATOR_ADDRESS": joined(first, PORT),
            "JAX_NUM_PROCESSES": str(hosts),
        } | variables
    amounts: dict[str, Any] = {}
    if job.cpus:
        amounts["cpu"] = job.cpus
    if job.memory:
        amounts["memory"] = f"{job.memory // 2**20}Mi"
    extra = (
        {"google.com/tpu": chips}
        if chips
        else {"nvidia.com/gpu": job.gpus}
        if job.gpus
        else {}
    )
    container: dict[str, Any] = {"name": CONTAINER, "image": job.image}
    if job.folder:
        container["workingDir"] = job.folder
    container["command"] = [_literal(word) for word in job.command]
    container["env"] = [
        {"name": name, "value": _literal(value)} for name, value in variables.items()
    ]
    if hosts * job.slices > 1:
        of = {"secretKeyRef": {"name": _secret_name(job), "key": TOKEN_KEY}}
        container["env"].append({"name": tokens.VARIABLE, "valueFrom": of})
    if amounts or extra:
        container["resources"] = (
            {"requests": amounts, "limits": amounts | extra}
            if amounts
            else {"limits": extra}
        )
    mounts, volumes = _volumes(job)
    if not chips and hosts > 1:
        container["ports"] = [{"containerPort": PORT}]
    if mounts:
        container["volumeMounts"] = mounts
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": TIME_TO_SAVE,
    }
    if node:
        pod["nodeSelector"] = node
    pod["tolerations"] = [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": TIME_TO_RETURN,
        }
        for state in ("not-ready", "unreachable")
    ]
    if job.gpus:  # machines with GPUs are kept free of whatever does not say this
        pod["tolerations"].append(
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        )
    return pod | {"containers": [container]} | ({"volumes": volumes} if volumes else {})


def _literal(text: str) -> str:
    """Kubernetes puts variables in for $(NAME); doubled, a $ is only a $."""
    return text.replace("$", "$$")


def _bucket(volume: Volume) -> str:
    return (
        volume.source.removeprefix("gs://") if volume.source.startswith("gs://") else ""
    )


def _volumes(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    mounts: list[dict[str, Any]] = []
    volumes: list[dict[str, Any]] = []
    for number, each in enumerate(job.volumes):
        name = f"volume-{number}"
        only = {"readOnly": True} if each.read_only else {}
        mounts.append({"name": name, "mountPath": each.folder} | only)
        if _bucket(each):
            source: dict[str, Any] = {
                "csi": {
                    "driver": GCSFUSE,
                    **only,
                    "volumeAttributes": {"bucketName": _bucket(each)},
                }
            }
        elif each.source.startswith("/"):
            source = {"hostPath": {"path": each.source}}
        else:
            source = {"persistentVolumeClaim": {"claimName": each.source} | only}
        volumes.append({"name": name} | source)
    # NCCL's GPUs of a machine meet in shared memory, of which a container has 64 MB
    if job.gpus > 1:
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    return mounts, volumes


def _machines(job: Job) -> tuple[int, int]:
    """Hosts of a slice, and chips of a host; 0 chips where there is no TPU."""
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
    _, alone, among = TPUS[kind]
    if chips <= alone:
        return 1, chips
    if chips % among:
        raise SettingError(
            f"{job.topology} has {chips} chips, and a machine has {among}",
            where="command line, --job-topology",
            remedy="name a slice of whole machines",
        )
    return chips // among, among
