"""The cluster that environment variables tell of: Open MPI, a TPU pod, SLURM,
Kubernetes, or JAX's own names.

Each finder returns None where nothing is set, and raises where only half of it is.
"""

from __future__ import annotations

import importlib.util
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lepton_jax.errors import SettingError
from lepton_jax.launch.cluster import (
    FIRST_PORT,
    MOST_HOSTS,
    PORT,
    PORTS,
    START_HERE,
    Cluster,
    address,
    joined,
    port_of,
    split,
    two,
)

Metadata = Callable[[str], str | None]
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
MEGASCALE = (
    "MEGASCALE_COORDINATOR_ADDRESS",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID",
)
# with these SLURM parts the GPUs itself
OWN_GPUS = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND")


def find(
    environ: Mapping[str, str],
    metadata: Metadata | None = None,
) -> Cluster:
    """The innermost cluster around this process; with none, this process alone.

    Raises:
      SettingError: half-set or wrong variables; two clusters of which neither contains
        the other.
    """
    environ = {name: value.strip() for name, value in environ.items() if value.strip()}
    # its processes also inherit the variables of what started mpirun
    mpi = open_mpi(environ)
    if mpi is not None:
        return _moved(mpi, environ)
    found = [tpu(environ, metadata), slurm(environ)]
    # GKE starts a TPU's hosts as indexed jobs, and numbers them itself
    if found[0] is None or "JAX_NUM_PROCESSES" in environ:
        found.append(
            kubernetes(environ) if "JOB_COMPLETION_INDEX" in environ else named(environ)
        )
    clusters = [_moved(each, environ) for each in found if each is not None]
    several = [each for each in clusters if each.hosts > 1]
    if len(several) > 1 and (several[0].hosts, several[0].host_id) != (
        several[1].hosts,
        several[1].host_id,
    ):
        raise two(several[0], several[1])
    if several:
        return several[-1]  # of two that agree, the one whose coordinator was said
    if clusters:
        return clusters[0]
    return Cluster("alone", "no cluster is around")


def open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    """As mpirun of Open MPI 4 and 5 numbers its processes."""
    if not _complete(
        environ,
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        "start the hosts by mpirun",
    ):
        return None
    size = _number(environ, "OMPI_COMM_WORLD_SIZE", 1)
    rank = _number(environ, "OMPI_COMM_WORLD_RANK", 0, size - 1)
    local = (
        _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, size)
        if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ
        else 1
    )
    seat = (
        _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0, local - 1)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in environ
        else 0
    )
    job = (
        environ.get("PMIX_NAMESPACE")
        or environ.get("OMPI_MCA_orte_hnp_uri", "").partition(";")[0]
    )
    inside = (
        f" inside SLURM job {environ['SLURM_JOB_ID']}"
        if "SLURM_JOB_ID" in environ
        else ""
    )
    why = f"Open MPI{inside}"
    if size == 1:
        return Cluster("open-mpi", why)
    name = "127.0.0.1" if local == size else _mpi_head(environ)
    return Cluster(
        "open-mpi",
        why,
        size,
        rank,
        joined(name, FIRST_PORT + zlib.crc32(job.encode()) % PORTS),
        visible=shared_gpus(environ, seat, local),
    )


def _mpi_head(environ: Mapping[str, str]) -> str:
    """The machine of rank 0: the first of SLURM's, for mpirun may run elsewhere; else
    mpirun's own.
    """
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if nodes:
        return expand(nodes)[0]
    if match := re.search(
        r"tcp6?://\[?([^],]+?)(?:,|\]|:\d+)", environ.get("OMPI_MCA_orte_hnp_uri", "")
    ):
        return match[1]
    if match := re.fullmatch(
        r"prte(?:run)?-(.+)-\d+@\d+", environ.get("PMIX_NAMESPACE", "")
    ):
        return match[1]
    if "JAX_COORDINATOR_ADDRESS" in environ:
        return split(environ["JAX_COORDINATOR_ADDRESS"])[0]
    raise SettingError(
        "Open MPI does not say on which machine rank 0 is",
        where="finding the cluster",
        remedy=(
            "add -x JAX_COORDINATOR_ADDRESS=NAME:PORT to mpirun, with the machine of"
            " rank 0"
        ),
    )


def tpu(
    environ: Mapping[str, str],
    metadata: Metadata | None = None,
) -> Cluster | None:
    """As a TPU VM's metadata server, or GKE by variables, tells of the hosts of a
    slice, and of several slices.
    """
    where = "the environment"
    addresses = (
        "TPU_PROCESS_ADDRESSES"
        if "TPU_PROCESS_ADDRESSES" in environ
        else "TPU_WORKER_HOSTNAMES"
    )
    names = ("TPU_WORKER_ID", addresses, *MEGASCALE)
    if (
        addresses not in environ
        and metadata is not None
        and "TPU_SKIP_MDS_QUERY" not in environ
    ):
        environ = {**_of_server(metadata), **environ}
        where = "the metadata server"
    if not any(name in environ for name in names):
        return None
    workers = [split(each)[0] for each in environ.get(addresses, "").split(",") if each]
    several = (
        bool(set(MEGASCALE) & set(environ))
        and environ.get("MEGASCALE_NUM_SLICES") != "1"
    )
    remedy = "set all of them, as GKE does, or none; " + START_HERE
    # where there is one host, it needs no number
    if several or len(workers) != 1 or "TPU_WORKER_ID" in environ:
        _complete(
            environ,
            (
                "TPU_WORKER_ID",
                addresses,
                *(MEGASCALE if several else ()),
            ),
            remedy,
        )
    if not workers:
        raise SettingError(
            f"{addresses} is {environ.get(addresses, '')!r}",
            where=f"environment variable {addresses}",
            remedy=f"it should be the hosts' names, separated by commas; {START_HERE}",
        )
    worker = (
        _number(environ, "TPU_WORKER_ID", 0, len(workers) - 1)
        if "TPU_WORKER_ID" in environ
        else 0
    )
    slices = 1
    slice_id = 0
    first = workers[0]
    if several:
        slices = _number(environ, "MEGASCALE_NUM_SLICES", 1)
        slice_id = _number(environ, "MEGASCALE_SLICE_ID", 0, slices - 1)
        first = split(environ["MEGASCALE_COORDINATOR_ADDRESS"])[0]
    hosts = len(workers) * slices
    if hosts == 1:
        return Cluster("tpu", f"a TPU of one host, by {where}")
    why = (
        f"a TPU pod of {len(workers)} hosts, by {where}"
        if slices == 1
        else (
            f"{slices} TPU slices of {len(workers)}"
            f" {'host' if len(workers) == 1 else 'hosts'}, by {where}"
        )
    )
    return Cluster(
        "tpu",
        why,
        hosts,
        slice_id * len(workers) + worker,
        joined(first, PORT),
    )


def _of_server(metadata: Metadata) -> dict[str, str]:
    """The variables that GKE would set, from what the metadata server of a TPU VM
    knows.
    """
    worker = metadata("agent-worker-number")
    endpoints = metadata("worker-network-endpoints")
    if worker is None or endpoints is None:
        return {}
    # older servers write name:id:address
    hosts = [
        each.strip().split(":")[-1] if each.count(":") == 2 else each.strip()
        for each in endpoints.split(",")
    ]
    found = {"TPU_WORKER_ID": worker.strip(), "TPU_WORKER_HOSTNAMES": ",".join(hosts)}
    for line in (metadata("tpu-env") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in MEGASCALE and value.strip().strip("'\""):
            found[name.strip()] = value.strip().strip("'\"")
    return found


def metadata_server(environ: Mapping[str, str]) -> Metadata | None:
    """How to ask the metadata server; None where this is no TPU VM, or the TPU is not
    wanted.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    wanted = not platforms or "tpu" in platforms.split(",")
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    if (
        not (wanted and chips and importlib.util.find_spec("libtpu"))
        or "TPU_SKIP_MDS_QUERY" in environ
    ):
        return None

    def ask(name: str) -> str | None:
        request = urllib.request.Request(
            METADATA + name, headers={"Metadata-Flavor": "Google"}
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                request, timeout=5
            ) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise SettingError(
                f"the metadata server does not tell {name}: {error}",
                where=METADATA + name,
                remedy=(
                    "start again, or give --coordinator, --hosts and --host-id;"
                    f" {START_HERE}"
                ),
            ) from error
        # a TPU outside of Google's cloud VMs
        except (urllib.error.URLError, TimeoutError):
            return None

    return ask


def slurm(environ: Mapping[str, str]) -> Cluster | None:
    """As srun numbers its tasks; an allocation of several tasks without srun is an
    error.
    """
    step = [
        name
        for name in ("SLURM_STEP_NODELIST", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")
        if name in environ
    ]
    if "SLURM_JOB_ID" not in environ and not step:
        return None
    # a shell in an allocation; only one of its tasks has the terminal
    if not step or "SLURM_PTY_PORT" in environ:
        tasks = "SLURM_STEP_NUM_TASKS" if step else "SLURM_NTASKS"
        named = next(
            (
                name
                for name in (
                    tasks,
                    "SLURM_NTASKS",
                    "SLURM_JOB_NUM_NODES",
                    "SLURM_NNODES",
                )
                if name in environ
            ),
            None,
        )
        count = 1 if named is None else _number(environ, named, 1)
        job = environ.get("SLURM_JOB_ID", "?")
        if count > 1:
            raise SettingError(
                f"SLURM job {job} is for {count} tasks ({named}), but srun did not"
                " start this process: SLURM_STEP_NODELIST and SLURM_PROCID of a step"
                " are not set",
                where="finding the cluster",
                remedy=f"write `srun` before the command; {START_HERE}",
            )
        return Cluster("slurm", f"SLURM job {job}, one task")
    tasks = (
        "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    )
    _complete(
        environ,
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", tasks, "SLURM_PROCID", *step),
        "start the hosts by srun",
    )
    if environ.get("SLURM_HET_SIZE", "1") != "1":
        raise SettingError(
            f"SLURM job {environ['SLURM_JOB_ID']} is heterogeneous:"
            f" SLURM_HET_SIZE={environ['SLURM_HET_SIZE']}",
            where="finding the cluster",
            remedy=(
                "ask for machines of one kind, or give --coordinator, --hosts "
                "and --host-id"
            ),
        )
    hosts = _number(environ, tasks, 1)
    rank = _number(environ, "SLURM_PROCID", 0, hosts - 1)
    job_id = _number(environ, "SLURM_JOB_ID", 0, 2**63)
    step_id = _number(
        {"SLURM_STEP_ID": "0", **environ},
        "SLURM_STEP_ID",
        0,
        2**63,
    )
    nodes = environ["SLURM_STEP_NODELIST"]
    why = f"SLURM job {job_id}, step {step_id} on {nodes}"
    if hosts == 1:
        return Cluster("slurm", why)
    local = 1
    if {"SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"} <= set(environ):
        counts = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
        local = counts[_number(environ, "SLURM_NODEID", 0, len(counts) - 1)]
    seat = (
        _number(
            environ,
            "SLURM_LOCALID",
            0,
            max(local - 1, 0),
        )
        if local > 1 and "SLURM_LOCALID" in environ
        else 0
    )
    # steps of one job may share a node: 257 apart, so that they meet no job near by
    return Cluster(
        "slurm",
        why,
        hosts,
        rank,
        joined(expand(nodes)[0], port_of(job_id + 257 * step_id)),
        visible=shared_gpus(environ, seat, local),
    )


def kubernetes(environ: Mapping[str, str]) -> Cluster | None:
    """As an indexed Job numbers its pods; how many they are and where the first one is,
    its manifest says.

    JAX_NUM_PROCESSES, and JAX_COORDINATOR_ADDRESS or, in a JobSet, JOBSET_NAME and
    REPLICATED_JOB_NAME.
    """
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    remedy = "set them in the manifest, as `launch.py --on k8s` does; " + START_HERE
    jobset = [
        name for name in ("JOBSET_NAME", "REPLICATED_JOB_NAME") if name in environ
    ]
    if jobset and "JAX_COORDINATOR_ADDRESS" not in environ:
        _complete(
            environ,
            (
                "JOB_COMPLETION_INDEX",
                "JAX_NUM_PROCESSES",
                "JOBSET_NAME",
                "REPLICATED_JOB_NAME",
            ),
            remedy,
        )
        name = f"{environ['JOBSET_NAME']}-{environ['REPLICATED_JOB_NAME']}-0-0.{environ['JOBSET_NAME']}"
        first = joined(name, PORT)
    else:
        _complete(
            environ,
            ("JOB_COMPLETION_INDEX", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"),
            remedy,
        )
        first = address(environ["JAX_COORDINATOR_ADDRESS"], "JAX_COORDINATOR_ADDRESS")
    hosts = _number(environ, "JAX_NUM_PROCESSES", 1)
    index = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environ else "JOB_COMPLETION_INDEX"
    host_id = _number(environ, index, 0, hosts - 1)
    why = (
        f"Kubernetes JobSet {environ['JOBSET_NAME']}"
        if "JOBSET_NAME" in environ
        else "an indexed job of Kubernetes"
    )
    return Cluster(
        "kubernetes",
        f"{why}, {index}={host_id}",
        hosts,
        host_id,
        first if hosts > 1 else None,
    )


def named(environ: Mapping[str, str]) -> Cluster | None:
    """As JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say, which
    Kubeflow sets.
    """
    if (
        "JAX_COORDINATOR_ADDRESS" in environ
        and any(n in environ for n in ("SLURM_JOB_ID", "TPU_WORKER_ID"))
        and not {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & set(environ)
    ):
        return None  # it only moves that cluster's coordinator
    if not _complete(
        environ,
        ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
        "set all three on every host, or none; " + START_HERE,
    ):
        return None
    hosts = _number(environ, "JAX_NUM_PROCESSES", 1)
    return Cluster(
        "environment",
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
        hosts,
        _number(environ, "JAX_PROCESS_ID", 0, hosts - 1),
        (
            address(environ["JAX_COORDINATOR_ADDRESS"], "JAX_COORDINATOR_ADDRESS")
            if hosts > 1
            else None
        ),
    )


def shared_gpus(
    environ: Mapping[str, str],
    seat: int,
    local: int,
) -> tuple[int, ...] | None:
    """The GPUs of the one host of `local` on a machine, if all of them see all of its
    GPUs; JAX would give each every one.
    """
    gpus = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if (
        local == 1
        or any(name in environ for name in OWN_GPUS)
        or len(gpus) % local
        or gpus == [""]
    ):
        return None
    each = len(gpus) // local
    return tuple(range(seat * each, (seat + 1) * each))


def expand(nodes: str) -> list[str]:
    """The names in a SLURM node list: `node[01-03,07],gpu5` is node01, node02, node03,
    node07, gpu5.

    Raises:
      SettingError: it is no such list.
    """
    text = nodes.strip()
    if not re.fullmatch(
        r"(?:[^\s,\[\]]|\[[\d,-]+\])+(?:,(?:[^\s,\[\]]|\[[\d,-]+\])+)*", text, re.ASCII
    ):
        raise _bad_nodes(nodes)
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^]]*\])+", text):
        made = [""]
        for fixed, ranges in re.findall(r"([^\[\]]+)|\[([^]]*)\]", part):
            ends = [fixed] if fixed else _range(ranges, nodes)
            if len(made) * len(ends) > MOST_HOSTS:
                raise _bad_nodes(nodes)
            made = [start + end for start in made for end in ends]
        names += made
    return names


def _range(text: str, nodes: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part, re.ASCII)
        if not match:
            raise _bad_nodes(nodes)
        first = int(match[1])
        last = int(match[2] or match[1])
        if not first <= last < first + MOST_HOSTS:
            raise _bad_nodes(nodes)
        numbers += [
            str(number).zfill(len(match[1])) for number in range(first, last + 1)
        ]
    return numbers


def _bad_nodes(nodes: str) -> SettingError:
    return SettingError(
        f"{nodes!r} is no list of nodes",
        where="SLURM_STEP_NODELIST or SLURM_JOB_NODELIST",
        remedy=(
            "it should read like node[01-03,07],gpu5; give --coordinator, --hosts and"
            " --host-id instead"
        ),
    )


def tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x3),1` is 2, 2, 2, 1.

    Raises:
      SettingError: it is no such list.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part, re.ASCII)
        if not match or int(match[2] or 1) > MOST_HOSTS:
            raise SettingError(
                f"SLURM_STEP_TASKS_PER_NODE is {text!r}",
                where="finding the cluster",
                remedy="it should read like 2(x3),1; start the hosts by srun",
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _complete(
    environ: Mapping[str, str],
    names: tuple[str, ...],
    remedy: str,
) -> bool:
    """Whether all are set; none of them is False, and some of them an error."""
    names = tuple(dict.fromkeys(names))
    missing = [name for name in names if name not in environ]
    if not missing:
        return True
    there = [f"{name}={environ[name]}" for name in names if name in environ]
    if not there:
        return False
    raise SettingError(
        f"{', '.join(there)} {'is' if len(there) == 1 else 'are'} set, but"
        f" {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not",
        where="environment variables",
        remedy=remedy,
    )


def _number(
    environ: Mapping[str, str],
    name: str,
    least: int,
    most: int = MOST_HOSTS,
) -> int:
    text = environ[name]
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not least <= int(text) <= most:
        raise SettingError(
            f"{name} is {text!r}",
            where=f"environment variable {name}",
            remedy=(
                f"it should be a whole number from {least} to {most}; mend it, or unset"
                " what is not meant"
            ),
        )
    return int(text)


def _moved(cluster: Cluster, environ: Mapping[str, str]) -> Cluster:
    """With its coordinator where JAX_COORDINATOR_ADDRESS says, should the name that was
    found not be the right one.
    """
    if (
        cluster.hosts == 1
        or cluster.source in ("kubernetes", "environment")
        or "JAX_COORDINATOR_ADDRESS" not in environ
    ):
        return cluster
    return replace(
        cluster,
        coordinator=address(
            environ["JAX_COORDINATOR_ADDRESS"], "JAX_COORDINATOR_ADDRESS"
        ),
        why=f"{cluster.why}, and JAX_COORDINATOR_ADDRESS",
    )
