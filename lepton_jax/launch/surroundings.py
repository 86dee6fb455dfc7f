"""Clusters that environment variables tell of.

One finder each for Open MPI, a TPU pod, SLURM, Kubernetes, and JAX's own names. A
finder returns None where nothing is set, and raises where only half of it is.
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
METADATA_SECONDS = 5  # assumption: to wait for the metadata server's answer
MEGASCALE = (
    "MEGASCALE_COORDINATOR_ADDRESS",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID",
)
# with these SLURM parts the GPUs itself
OWN_GPUS = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND")
# of SLURM: the ports of two steps of one job lie this far apart, so that they meet no
# job with a number near by (assumption: fewer jobs than that start at once)
PORTS_BETWEEN_STEPS = 257
MOST_NUMBER = 2**63  # of a SLURM job or step
JAX_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def innermost(
    environ: Mapping[str, str],
    metadata: Metadata | None = None,
) -> Cluster:
    """Return the innermost cluster around this process; with none, a cluster of one.

    Raises:
      SettingError: half-set or wrong variables; two clusters of which neither contains
        the other.
    """
    stripped = {name: value.strip() for name, value in environ.items()}
    environ = {name: value for name, value in stripped.items() if value}

    # the processes of mpirun also inherit the variables of what started mpirun
    mpi = open_mpi(environ)
    if mpi is not None:
        return _moved(mpi, environ)

    pod = tpu(environ, metadata)
    candidates = [pod, slurm(environ)]
    # GKE starts a TPU's hosts as indexed jobs, and numbers them itself
    if pod is None or "JAX_NUM_PROCESSES" in environ:
        indexed = "JOB_COMPLETION_INDEX" in environ
        candidates.append(kubernetes(environ) if indexed else named(environ))

    clusters = [
        _moved(candidate, environ) for candidate in candidates if candidate is not None
    ]
    several = [cluster for cluster in clusters if cluster.hosts > 1]
    if len(several) > 1:
        outer, inner = several[:2]
        if (outer.hosts, outer.host_id) != (inner.hosts, inner.host_id):
            raise two(outer, inner)
    if several:
        return several[-1]  # of two that agree, the one that names its coordinator
    if clusters:
        return clusters[0]
    return Cluster("alone", "no cluster is around")


# ---- Open MPI ----


def open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    """Return the cluster that mpirun of Open MPI 4 or 5 has started."""
    if not _complete(
        environ,
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        "start the hosts by mpirun",
    ):
        return None

    size = _number(environ, "OMPI_COMM_WORLD_SIZE", 1)
    rank = _number(environ, "OMPI_COMM_WORLD_RANK", 0, size - 1)
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, size, default=1)
    seat = _number(
        environ,
        "OMPI_COMM_WORLD_LOCAL_RANK",
        0,
        local - 1,
        default=0,
    )

    why = "Open MPI"
    if "SLURM_JOB_ID" in environ:
        why += f" inside SLURM job {environ['SLURM_JOB_ID']}"
    if size == 1:
        return Cluster("open-mpi", why)

    job = (
        environ.get("PMIX_NAMESPACE")
        or environ.get("OMPI_MCA_orte_hnp_uri", "").partition(";")[0]
    )
    name = "127.0.0.1" if local == size else _mpi_head(environ)
    port = FIRST_PORT + zlib.crc32(job.encode()) % PORTS
    return Cluster(
        "open-mpi",
        why,
        hosts=size,
        host_id=rank,
        coordinator=joined(name, port),
        visible=shared_gpus(environ, seat, local),
    )


def _mpi_head(environ: Mapping[str, str]) -> str:
    """Return the machine of rank 0.

    That is the first of SLURM's machines, for mpirun may run elsewhere; without SLURM
    it is mpirun's own.
    """
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if nodes:
        return expand(nodes)[0]

    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    if match := re.search(r"tcp6?://\[?([^],]+?)(?:,|\]|:\d+)", uri):
        return match[1]

    namespace = environ.get("PMIX_NAMESPACE", "")
    if match := re.fullmatch(r"prte(?:run)?-(.+)-\d+@\d+", namespace):
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


# ---- TPU ----


def tpu(
    environ: Mapping[str, str],
    metadata: Metadata | None = None,
) -> Cluster | None:
    """Return the cluster of a TPU slice, or of several slices.

    GKE tells of it by variables, a TPU VM by its metadata server.
    """
    where = "the environment"
    addresses = "TPU_WORKER_HOSTNAMES"
    if "TPU_PROCESS_ADDRESSES" in environ:
        addresses = "TPU_PROCESS_ADDRESSES"
    skips = addresses in environ or "TPU_SKIP_MDS_QUERY" in environ
    if metadata is not None and not skips:
        environ = {**_from_server(metadata), **environ}
        where = "the metadata server"
    names = ("TPU_WORKER_ID", addresses, *MEGASCALE)
    if not any(name in environ for name in names):
        return None

    several = bool(environ.keys() & set(MEGASCALE))
    several = several and environ.get("MEGASCALE_NUM_SLICES") != "1"
    workers = _tpu_workers(environ, addresses, several)
    worker = _number(
        environ,
        "TPU_WORKER_ID",
        0,
        len(workers) - 1,
        default=0,
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
    why = f"a TPU pod of {len(workers)} hosts, by {where}"
    if slices > 1:
        size = f"{len(workers)} {'host' if len(workers) == 1 else 'hosts'}"
        why = f"{slices} TPU slices of {size}, by {where}"
    return Cluster(
        "tpu",
        why,
        hosts=hosts,
        host_id=slice_id * len(workers) + worker,
        coordinator=joined(first, PORT),
    )


def _tpu_workers(
    environ: Mapping[str, str],
    addresses: str,
    several: bool,
) -> list[str]:
    """Return the names of a slice's hosts, once all variables are known to be there."""
    texts = environ.get(addresses, "").split(",")
    workers = [split(text)[0] for text in texts if text]
    # where there is one host, it needs no number
    if several or len(workers) != 1 or "TPU_WORKER_ID" in environ:
        needed: tuple[str, ...] = ("TPU_WORKER_ID", addresses)
        if several:
            needed += MEGASCALE
        _complete(
            environ, needed, f"set all of them, as GKE does, or none; {START_HERE}"
        )
    if not workers:
        raise SettingError(
            f"{addresses} is {environ.get(addresses, '')!r}",
            where=f"environment variable {addresses}",
            remedy=f"it should be the hosts' names, separated by commas; {START_HERE}",
        )
    return workers


def _from_server(metadata: Metadata) -> dict[str, str]:
    """Return the variables that GKE would set, from a TPU VM's metadata server."""
    worker = metadata("agent-worker-number")
    endpoints = metadata("worker-network-endpoints")
    if worker is None or endpoints is None:
        return {}

    # older servers write name:id:address
    hosts = []
    for endpoint in endpoints.split(","):
        host = endpoint.strip()
        if host.count(":") == 2:
            host = host.split(":")[-1]
        hosts.append(host)

    variables = {
        "TPU_WORKER_ID": worker.strip(),
        "TPU_WORKER_HOSTNAMES": ",".join(hosts),
    }
    for line in (metadata("tpu-env") or "").splitlines():
        name, _, value = line.partition(":")
        value = value.strip().strip("'\"")
        if name.strip() in MEGASCALE and value:
            variables[name.strip()] = value
    return variables


def metadata_server(environ: Mapping[str, str]) -> Metadata | None:
    """Return a function that asks the metadata server for an attribute.

    None where this is no TPU VM, or the TPU is not wanted.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    wanted = not platforms or "tpu" in platforms.split(",")
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    usable = wanted and chips and importlib.util.find_spec("libtpu") is not None
    if not usable or "TPU_SKIP_MDS_QUERY" in environ:
        return None
    return _ask_server


def _ask_server(name: str) -> str | None:
    """Return an attribute of the metadata server; None where it has none."""
    request = urllib.request.Request(
        METADATA + name, headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=METADATA_SECONDS) as answer:
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
    except (urllib.error.URLError, TimeoutError):
        return None  # a TPU outside of Google's cloud VMs


# ---- SLURM ----


def slurm(environ: Mapping[str, str]) -> Cluster | None:
    """Return the cluster whose tasks srun has numbered.

    An allocation of several tasks without srun is an error.
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
        return _slurm_shell(environ, bool(step))

    tasks = "SLURM_NTASKS"
    if "SLURM_STEP_NUM_TASKS" in environ:
        tasks = "SLURM_STEP_NUM_TASKS"
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
    job_id = _number(environ, "SLURM_JOB_ID", 0, MOST_NUMBER)
    step_id = _number(environ, "SLURM_STEP_ID", 0, MOST_NUMBER, default=0)
    nodes = environ["SLURM_STEP_NODELIST"]
    why = f"SLURM job {job_id}, step {step_id} on {nodes}"
    if hosts == 1:
        return Cluster("slurm", why)

    seat, local = _slurm_seat(environ)
    port = port_of(job_id + PORTS_BETWEEN_STEPS * step_id)
    return Cluster(
        "slurm",
        why,
        hosts=hosts,
        host_id=rank,
        coordinator=joined(expand(nodes)[0], port),
        visible=shared_gpus(environ, seat, local),
    )


def _slurm_shell(environ: Mapping[str, str], in_step: bool) -> Cluster:
    """Return the one task of an allocation in which srun did not start this process."""
    candidates = ["SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"]
    if in_step:
        candidates.insert(0, "SLURM_STEP_NUM_TASKS")
    given = [name for name in candidates if name in environ]
    count = _number(environ, given[0], 1) if given else 1

    job = environ.get("SLURM_JOB_ID", "?")
    if count > 1:
        raise SettingError(
            f"SLURM job {job} is for {count} tasks ({given[0]}), but srun did not"
            " start this process: SLURM_STEP_NODELIST and SLURM_PROCID of a step"
            " are not set",
            where="finding the cluster",
            remedy=f"write `srun` before the command; {START_HERE}",
        )
    return Cluster("slurm", f"SLURM job {job}, one task")


def _slurm_seat(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return this task's number on its machine, and how many tasks are there."""
    local = 1
    if {"SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"} <= environ.keys():
        counts = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
        local = counts[_number(environ, "SLURM_NODEID", 0, len(counts) - 1)]
    if local <= 1:
        return 0, local
    return _number(environ, "SLURM_LOCALID", 0, local - 1, default=0), local


def expand(nodes: str) -> list[str]:
    """Return the names in a SLURM node list.

    Raises:
      SettingError: it is no such list.

    >>> expand("node[01-03,07],gpu5")
    ['node01', 'node02', 'node03', 'node07', 'gpu5']
    """
    text = nodes.strip()
    name = r"(?:[^\s,\[\]]|\[[\d,-]+\])+"
    if not re.fullmatch(rf"{name}(?:,{name})*", text, re.ASCII):
        raise _bad_nodes(nodes)

    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^]]*\])+", text):
        starts = [""]
        for fixed, ranges in re.findall(r"([^\[\]]+)|\[([^]]*)\]", part):
            ends = [fixed] if fixed else _range(ranges, nodes)
            if len(starts) * len(ends) > MOST_HOSTS:
                raise _bad_nodes(nodes)
            starts = [start + end for start in starts for end in ends]
        names += starts
    return names


def _range(text: str, nodes: str) -> list[str]:
    """Return the numbers of "01-03,07", as they are written."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part, re.ASCII)
        if not match:
            raise _bad_nodes(nodes)
        first = int(match[1])
        last = int(match[2] or match[1])
        if not first <= last < first + MOST_HOSTS:
            raise _bad_nodes(nodes)
        digits = len(match[1])
        numbers += [str(number).zfill(digits) for number in range(first, last + 1)]
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
    """Return the number of tasks on each node of a SLURM step.

    Raises:
      SettingError: it is no such list.

    >>> tasks_per_node("2(x3),1")
    [2, 2, 2, 1]
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


def shared_gpus(
    environ: Mapping[str, str],
    seat: int,
    local: int,
) -> tuple[int, ...] | None:
    """Return this host's share of a machine's GPUs; None: all.

    A share is needed where several hosts are on a machine and all of them see all of
    its GPUs: JAX would give every GPU to each of them.

    Args:
      environ: the environment variables.
      seat: number of this host among those on the machine.
      local: number of hosts on the machine.
    """
    gpus = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    parted_by_slurm = any(name in environ for name in OWN_GPUS)
    if local == 1 or parted_by_slurm or len(gpus) % local or gpus == [""]:
        return None
    share = len(gpus) // local
    return tuple(range(seat * share, (seat + 1) * share))


# ---- Kubernetes, and JAX's own names ----


def kubernetes(environ: Mapping[str, str]) -> Cluster | None:
    """Return the cluster whose pods an indexed Job has numbered.

    The manifest says how many pods there are and where the first one is: by
    JAX_NUM_PROCESSES, and JAX_COORDINATOR_ADDRESS or, in a JobSet, JOBSET_NAME and
    REPLICATED_JOB_NAME.
    """
    if "JOB_COMPLETION_INDEX" not in environ:
        return None

    first = _first_pod(environ)
    hosts = _number(environ, "JAX_NUM_PROCESSES", 1)
    index = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environ else "JOB_COMPLETION_INDEX"
    host_id = _number(environ, index, 0, hosts - 1)
    why = "an indexed job of Kubernetes"
    if "JOBSET_NAME" in environ:
        why = f"Kubernetes JobSet {environ['JOBSET_NAME']}"
    return Cluster(
        "kubernetes",
        f"{why}, {index}={host_id}",
        hosts=hosts,
        host_id=host_id,
        coordinator=first if hosts > 1 else None,
    )


def _first_pod(environ: Mapping[str, str]) -> str:
    """Return "name:port" of the pod with index 0."""
    remedy = f"set them in the manifest, as `launch.py --on k8s` does; {START_HERE}"
    numbers = ("JOB_COMPLETION_INDEX", "JAX_NUM_PROCESSES")
    in_jobset = "JOBSET_NAME" in environ or "REPLICATED_JOB_NAME" in environ
    if in_jobset and "JAX_COORDINATOR_ADDRESS" not in environ:
        _complete(environ, (*numbers, "JOBSET_NAME", "REPLICATED_JOB_NAME"), remedy)
        jobset = environ["JOBSET_NAME"]
        pod = f"{jobset}-{environ['REPLICATED_JOB_NAME']}-0-0"
        return joined(f"{pod}.{jobset}", PORT)

    _complete(environ, (*numbers, "JAX_COORDINATOR_ADDRESS"), remedy)
    return _said_coordinator(environ)


def named(environ: Mapping[str, str]) -> Cluster | None:
    """Return the cluster of `JAX_NAMES`, which Kubeflow sets."""
    in_another = "SLURM_JOB_ID" in environ or "TPU_WORKER_ID" in environ
    address_alone = environ.keys() & set(JAX_NAMES) == {"JAX_COORDINATOR_ADDRESS"}
    if in_another and address_alone:
        return None  # it only moves that cluster's coordinator

    remedy = f"set all three on every host, or none; {START_HERE}"
    if not _complete(environ, JAX_NAMES, remedy):
        return None

    hosts = _number(environ, "JAX_NUM_PROCESSES", 1)
    return Cluster(
        "environment",
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
        hosts=hosts,
        host_id=_number(environ, "JAX_PROCESS_ID", 0, hosts - 1),
        coordinator=_said_coordinator(environ) if hosts > 1 else None,
    )


def _moved(cluster: Cluster, environ: Mapping[str, str]) -> Cluster:
    """Return the cluster with its coordinator where JAX_COORDINATOR_ADDRESS says.

    A user sets it where the name that a finder derives is not the right one.
    """
    has_read_it = cluster.source in ("kubernetes", "environment")
    if cluster.hosts == 1 or has_read_it or "JAX_COORDINATOR_ADDRESS" not in environ:
        return cluster
    return replace(
        cluster,
        coordinator=_said_coordinator(environ),
        why=f"{cluster.why}, and JAX_COORDINATOR_ADDRESS",
    )


def _said_coordinator(environ: Mapping[str, str]) -> str:
    return address(environ["JAX_COORDINATOR_ADDRESS"], "JAX_COORDINATOR_ADDRESS")


# ---- variables ----


def _complete(
    environ: Mapping[str, str],
    names: tuple[str, ...],
    remedy: str,
) -> bool:
    """Return True if all variables are set, False if none is.

    Raises:
      SettingError: only some of them are set.
    """
    names = tuple(dict.fromkeys(names))
    missing = [name for name in names if name not in environ]
    if not missing:
        return True

    given = [f"{name}={environ[name]}" for name in names if name in environ]
    if not given:
        return False
    raise SettingError(
        f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} set, but"
        f" {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not",
        where="environment variables",
        remedy=remedy,
    )


def _number(
    environ: Mapping[str, str],
    name: str,
    least: int,
    most: int = MOST_HOSTS,
    default: int | None = None,
) -> int:
    """Return a variable as a number within bounds; `default` where it is not set."""
    if default is not None and name not in environ:
        return default

    text = environ[name]
    is_number = re.fullmatch(r"\d{1,18}", text, re.ASCII) is not None
    if not (is_number and least <= int(text) <= most):
        raise SettingError(
            f"{name} is {text!r}",
            where=f"environment variable {name}",
            remedy=(
                f"it should be a whole number from {least} to {most}; fix it, or unset"
                " what is not meant"
            ),
        )
    return int(text)
