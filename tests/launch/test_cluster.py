"""Finding the cluster.

Environments are as each launcher really sets them, halves of them, and contradictions;
and there are SLURM's lists of nodes.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_jax.errors import SettingError
from lepton_jax.launch.cluster import FIRST_PORT, PORTS, Cluster, address, split
from lepton_jax.launch.discovery import find
from lepton_jax.launch.surroundings import expand, tasks_per_node

# as `srun` of SLURM 22.05 sets them in the second of two tasks on two nodes, of four
# tasks in the third
SLURM = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_JOB_NODELIST": "n[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
}
FOUR = {
    **SLURM,
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
# as mpirun of Open MPI 5.0.11 sets them
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "PMIX_NAMESPACE": "prterun-head-01-7838@1",
}
TPU = {"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "t-0.s,t-1.s,t-2.s,t-3.s"}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.job:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
INDEXED = {
    "JOB_COMPLETION_INDEX": "1",
    "JAX_NUM_PROCESSES": "3",
    "JAX_COORDINATOR_ADDRESS": "run-0.run:8476",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}
JOBSET = {
    "JOB_COMPLETION_INDEX": "1",
    "JAX_NUM_PROCESSES": "3",
    "JOBSET_NAME": "run",
    "REPLICATED_JOB_NAME": "hosts",
}
NAMED = {
    "JAX_COORDINATOR_ADDRESS": "first",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.mark.parametrize(
    ("environ", "source", "hosts", "host_id", "coordinator"),
    [
        ({}, "alone", 1, 0, None),
        (
            {
                "SLURM_CONF": "/etc/slurm.conf",
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                "TPU_SKIP_MDS_QUERY": "1",
            },
            "alone",
            1,
            0,
            None,
        ),
        (SLURM, "slurm", 2, 1, f"n07:{FIRST_PORT + 42}"),
        (
            {**SLURM, "SLURM_STEP_ID": "1"},
            "slurm",
            2,
            1,
            f"n07:{FIRST_PORT + 42 + 257}",
        ),
        (
            {**SLURM, "JAX_COORDINATOR_ADDRESS": "10.1.2.3:99"},
            "slurm",
            2,
            1,
            "10.1.2.3:99",
        ),
        (
            {
                "SLURM_JOB_ID": "42",
                "SLURM_NTASKS": "1",
                "SLURM_PROCID": "0",
                "SLURM_NODELIST": "n1",
            },
            "slurm",
            1,
            0,
            None,
        ),
        (
            {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            "slurm",
            1,
            0,
            None,
        ),
        (TPU, "tpu", 4, 3, "t-0.s:8476"),
        (
            {
                **TPU,
                "TPU_PROCESS_ADDRESSES": (
                    "10.0.0.1:8471,10.0.0.2:8471,[fd00::3]:8471,10.0.0.4:8471"
                ),
            },
            "tpu",
            4,
            3,
            "10.0.0.1:8476",
        ),
        ({**TPU, **SLICES}, "tpu", 8, 7, "job-0-0.job:8476"),
        ({**TPU, "MEGASCALE_NUM_SLICES": "1"}, "tpu", 4, 3, "t-0.s:8476"),
        (
            {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
            "tpu",
            1,
            0,
            None,
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu", 1, 0, None),
        (INDEXED, "kubernetes", 3, 1, "run-0.run:8476"),
        ({**INDEXED, "JAX_PROCESS_ID": "2"}, "kubernetes", 3, 2, "run-0.run:8476"),
        (JOBSET, "kubernetes", 3, 1, "run-hosts-0-0.run:8476"),
        (NAMED, "environment", 2, 1, "first:8476"),
        (
            {**NAMED, "JAX_COORDINATOR_ADDRESS": "[fd00::1]:80"},
            "environment",
            2,
            1,
            "[fd00::1]:80",
        ),
        (
            {
                **MPI,
                "OMPI_COMM_WORLD_SIZE": "1",
                "OMPI_COMM_WORLD_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            },
            "open-mpi",
            1,
            0,
            None,
        ),
    ],
)
def test_what_is_found(environ, source, hosts, host_id, coordinator):
    found = find(environ)
    assert (found.source, found.hosts, found.host_id, found.coordinator) == (
        source,
        hosts,
        host_id,
        coordinator,
    )
    assert "\n" not in str(found)
    assert found.why


@pytest.mark.parametrize(
    ("more", "host"),
    [
        ({}, "head-01"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "127.0.0.1"),
        (
            {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
            "10.96.0.1",
        ),
        (
            {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp6://[fe80::b9b,2620::2]:43370"},
            "fe80::b9b",
        ),
        # mpirun itself may be on the login node
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[3-4]"}, "gpu3"),
        ({"PMIX_NAMESPACE": "1234@1", "JAX_COORDINATOR_ADDRESS": "first"}, "first"),
    ],
)
def test_open_mpi_knows_where_rank_0_is(more, host):
    found = find({**MPI, **more})
    name, port = split(found.coordinator)
    assert name == host
    assert (found.hosts, found.host_id) == (4, 2)
    assert FIRST_PORT <= int(port) < FIRST_PORT + PORTS or port == "8476"


def test_open_mpi_that_does_not_say_where_rank_0_is():
    with pytest.raises(SettingError, match="rank 0") as error:
        find({**MPI, "PMIX_NAMESPACE": "1234@1"})
    assert "JAX_COORDINATOR_ADDRESS" in error.value.remedy


def test_jobs_that_share_a_node_get_ports_of_their_own():
    ports = {
        find(
            {**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        ).coordinator
        for job in range(5000, 5100)
        for step in range(3)
    }
    assert len(ports) == 300


@pytest.mark.parametrize(
    "complete",
    [SLURM, MPI, {**TPU, **SLICES}, INDEXED, JOBSET, NAMED],
    ids=lambda e: next(iter(e)),
)
def test_half_of_a_cluster_is_an_error_that_names_what_is_missing(complete):
    needed = {
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
        "SLURM_PROCID",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "TPU_WORKER_ID",
        "TPU_WORKER_HOSTNAMES",
        *SLICES,
        "JAX_NUM_PROCESSES",
        "JAX_COORDINATOR_ADDRESS",
        "JOBSET_NAME",
        "REPLICATED_JOB_NAME",
        "JAX_PROCESS_ID",
    } & set(complete)
    assert needed

    for name in needed:
        with pytest.raises(SettingError, match=re.escape(name)) as error:
            find({key: value for key, value in complete.items() if key != name})
        assert any(key in error.value.what for key in complete if key != name), (
            "it names what is set, too"
        )


@pytest.mark.parametrize(
    "environ",
    [
        {**SLURM, "SLURM_PROCID": "2"},
        {**SLURM, "SLURM_PROCID": "-1"},
        {**SLURM, "SLURM_PROCID": "one"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "0"},
        {**SLURM, "SLURM_STEP_NODELIST": "n[1-"},
        {**SLURM, "SLURM_HET_SIZE": "2"},
        {**SLURM, "JAX_COORDINATOR_ADDRESS": "n:0"},
        {**FOUR, "SLURM_STEP_TASKS_PER_NODE": "2(y2)"},
        {**MPI, "OMPI_COMM_WORLD_RANK": "4"},
        {**TPU, "TPU_WORKER_ID": "4"},
        {**TPU, "TPU_WORKER_HOSTNAMES": ","},
        {**TPU, **SLICES, "MEGASCALE_SLICE_ID": "2"},
        {**INDEXED, "JOB_COMPLETION_INDEX": "3"},
        {**NAMED, "JAX_COORDINATOR_ADDRESS": "first:http"},
        {**NAMED, "JAX_NUM_PROCESSES": "1e3"},
        {"JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_wrong_values_are_errors_with_a_remedy(environ):
    with pytest.raises(SettingError) as error:
        find(environ)
    assert error.value.where
    assert error.value.remedy


@pytest.mark.parametrize(
    "environ",
    [
        # a batch script
        {
            "SLURM_JOB_ID": "1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "0",
            "SLURM_JOB_NUM_NODES": "2",
        },
        {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"},  # salloc -N2
        {**SLURM, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "1234"},  # srun -N2 --pty bash
    ],
)
def test_a_slurm_job_of_several_tasks_wants_srun(environ):
    with pytest.raises(SettingError, match="srun did not start this process") as error:
        find(environ)
    assert "--hosts 1" in error.value.remedy
    assert find(environ, hosts=1) == Cluster("alone", "--hosts 1")


@pytest.mark.parametrize(
    ("environ", "source"),
    [
        ({**SLURM, **MPI}, "open-mpi"),  # mpirun in a SLURM job
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", **MPI}, "open-mpi"),
        ({**INDEXED, **MPI}, "open-mpi"),  # the MPI operator
        # GKE
        (
            {**TPU, "JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            "tpu",
        ),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", **TPU}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", **SLURM}, "slurm"),
    ],
)
def test_the_inner_cluster_decides(environ, source):
    assert find(environ).source == source


@pytest.mark.parametrize(
    "environ",
    [
        {**SLURM, **TPU},
        {**SLURM, **INDEXED},
        {**SLURM, **NAMED, "JAX_PROCESS_ID": "0"},
        {**TPU, **NAMED},
    ],
)
def test_two_clusters_at_once_are_an_error(environ):
    with pytest.raises(SettingError, match="two clusters at once"):
        find(environ)


def test_two_that_agree_are_one():
    assert find({**SLURM, **NAMED}).coordinator == "first:8476"


def test_the_command_line_goes_before_the_environment_unless_they_contradict():
    three = {"coordinator": "first:1234", "hosts": "2", "host_id": 1}
    expected = Cluster(
        "options", "--coordinator, --hosts and --host-id", 2, 1, "first:1234", devices=3
    )
    assert find({}, **three, devices=3) == expected
    assert find(SLURM, **three, devices=3) == expected  # it agrees
    # a shell in an allocation
    assert (
        find({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, **three, devices=3) == expected
    )

    with pytest.raises(SettingError, match="two clusters at once"):
        find({**SLURM, "SLURM_PROCID": "0"}, **three)
    with pytest.raises(SettingError, match="two clusters at once"):
        find(SLURM, hosts="local:2")
    assert find(SLURM, hosts="local:1").hosts == 1


@pytest.mark.parametrize(
    "given",
    [
        {"coordinator": "a:1"},
        {"host_id": 0},
        {"hosts": "2"},
        {"coordinator": "a:1", "hosts": "2"},
        {"hosts": "2", "host_id": 1},
        {"coordinator": "a:1", "hosts": "2", "host_id": 2},
        {"coordinator": "a:1", "hosts": "2", "host_id": -1},
        {"coordinator": "a:x", "hosts": "2", "host_id": 1},
        {"coordinator": "", "hosts": "2", "host_id": 1},
        {"hosts": "0"},
        {"hosts": "local:0"},
        {"hosts": "local"},
        {"hosts": "local:x"},
        {"hosts": "two"},
        {"hosts": "local:2", "coordinator": "a:1"},
        {"hosts": "local:2", "host_id": 1},
        {"hosts": "99999999"},
        {"hosts": "local:-2"},
    ],
)
def test_options_that_are_half_set_or_wrong(given):
    with pytest.raises(SettingError) as error:
        find({}, **given)
    assert "command line" in error.value.where


def test_local_hosts():
    found = find({}, hosts="local:4", devices=2)
    assert (found.source, found.hosts, found.devices) == ("local", 4, 2)


def test_the_metadata_server_of_a_tpu_vm():
    said = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:0:10.0.0.1,unknown:1:10.0.0.2",
        "tpu-env": (
            "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID:"
            " '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1:8080'\n"
        ),
    }
    found = find({}, metadata=said.get)
    assert (found.source, found.hosts, found.host_id, found.coordinator) == (
        "tpu",
        4,
        3,
        "10.9.0.1:8476",
    )
    assert "metadata" in str(found)

    said = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "10.0.0.1, 10.0.0.2",
    }
    assert find({}, metadata=said.get).coordinator == "10.0.0.1:8476"
    assert find({}, metadata=lambda name: None).source == "alone"

    asked = []
    find(TPU, metadata=asked.append)
    find({"TPU_SKIP_MDS_QUERY": "1"}, metadata=asked.append)
    assert not asked


@pytest.mark.parametrize(
    ("environ", "visible"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, None),  # can't be parted evenly
        # SLURM has parted them
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
    ],
)
def test_hosts_that_share_a_machine_share_its_gpus(environ, visible):
    assert find({**FOUR, **environ}).visible == visible
    assert find({**SLURM, **environ}).visible is None


def test_a_list_of_nodes():
    assert expand("node[01-03,07],gpu5") == [
        "node01",
        "node02",
        "node03",
        "node07",
        "gpu5",
    ]
    assert expand("r[1-2]n[09-10].x") == ["r1n09.x", "r1n10.x", "r2n09.x", "r2n10.x"]
    assert expand("a") == ["a"]

    for wrong in (
        "",
        "a[",
        "a[1",
        "a]",
        "a[]",
        "a[2-1]",
        "a,,b",
        "a[1--2]",
        "a[x]",
        "a b",
        "a[1-99999999]",
        ",a",
        "a[1-60000][1-60000]",
    ):
        with pytest.raises(SettingError):
            expand(wrong)


PREFIX = st.from_regex(r"[a-z]([a-z-]{0,5}[a-z])?", fullmatch=True)


@st.composite
def node_lists(draw):
    """Draw a list of nodes as SLURM writes it, and the names that it stands for."""
    parts = []
    names = []
    for prefix in draw(st.lists(PREFIX, min_size=1, max_size=4)):
        if draw(st.booleans()):
            parts.append(prefix)
            names.append(prefix)
            continue
        width = draw(st.integers(1, 4))
        ranges = []
        for first, more in draw(
            st.lists(
                st.tuples(st.integers(0, 2000), st.integers(0, 12)),
                min_size=1,
                max_size=3,
            )
        ):
            ranges.append(
                f"{first:0{width}}" + (f"-{first + more:0{width}}" if more else "")
            )
            names += [
                f"{prefix}{number:0{width}}"
                for number in range(first, first + more + 1)
            ]
        parts.append(f"{prefix}[{','.join(ranges)}]")
    return ",".join(parts), names


@given(node_lists())
def test_any_list_of_nodes(case):
    text, names = case
    assert expand(text) == names


@given(st.text(alphabet="ab01[]-, ", max_size=20))
def test_what_is_no_list_of_nodes_is_an_error_and_nothing_else(text):
    try:
        names = expand(text)
    except SettingError:
        return
    assert names
    assert all(names)
    assert not any(set(name) & set("[], ") for name in names)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=5)
)
def test_tasks_of_nodes(counts):
    text = ",".join(
        f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in counts
    )
    assert tasks_per_node(text) == [
        tasks for tasks, nodes in counts for _ in range(nodes)
    ]


@given(st.sampled_from(["a", "a.b", "10.0.0.1", "fd00::1"]), st.integers(1, 65535))
def test_addresses_survive(name, port):
    text = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    assert address(text, "here") == text
    assert split(text) == (name, str(port))


@given(
    st.dictionaries(
        st.sampled_from(
            sorted({**SLURM, **MPI, **TPU, **SLICES, **INDEXED, **JOBSET, **NAMED})
        ),
        st.sampled_from(
            ["0", "1", "2", "4", "n[1-2]", "a,b", "x", "", " ", "1(x2)", "-1", "٣"]
        ),
    )
)
def test_no_environment_is_more_than_an_error(environ):
    try:
        found = find(environ)
    except SettingError:
        return
    assert 0 <= found.host_id < found.hosts
    assert (found.coordinator is None) == (found.hosts == 1)
