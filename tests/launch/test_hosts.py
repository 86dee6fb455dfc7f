"""Several processes of one machine as hosts.

The roll call, joining JAX, output, signals, and the end of all if one fails.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lepton_jax.cli import launch as cli
from lepton_jax.errors import SettingError
from lepton_jax.launch import children, joining
from lepton_jax.launch.cluster import Cluster
from lepton_jax.launch.meeting import meet
from lepton_jax.launch.supervise.head import Head
from lepton_jax.launch.supervise.rules import Rules

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "the-token-of-a-run-in-these-tests"
JOINED = """
import sys
import jax
from lepton_jax.launch import discovery, joining
address, count, host = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cluster = discovery.find({}, coordinator=address, hosts=count, host_id=host, devices=2)
joining.ask_for_devices(2)

def work():
    from jax.experimental.multihost_utils import process_allgather
    seen = process_allgather(jax.numpy.array(jax.process_index())).tolist()
    devices = jax.local_device_count(), jax.device_count()
    print("saw", jax.process_count(), *devices, seen)

joining.run(cluster, work)
"""
SPAWN = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lepton_jax.launch.children"
    " import spawn; "
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def python(code, *arguments):
    return [sys.executable, "-u", "-c", code, *map(str, arguments)]


def call(clusters, facts=None, limit=10.0):
    """Let each cluster meet in a thread of its own.

    Returns the error of each, None if all was well.
    """
    raised = [None] * len(clusters)

    def one(number, cluster):
        try:
            meet(cluster, (facts or {}).get(number, {"jax": "1"}), limit, TOKEN)
        except SettingError as error:
            raised[number] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(clusters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return raised


def numbered(count, ids, port=None):
    port = port or free_port()
    return [
        Cluster("options", "a test", count, host, f"127.0.0.1:{port}") for host in ids
    ]


def test_all_hosts_meet_in_any_order():
    assert call(numbered(4, [2, 0, 3, 1])) == [None] * 4


@pytest.mark.parametrize(
    ("clusters", "facts", "named"),
    [
        (lambda port: numbered(3, [0, 1], port), None, "1 did not come within"),
        (lambda port: numbered(2, [1], port), None, "can't be met"),
        (
            lambda port: numbered(2, [0], port) + numbered(3, [1], port),
            None,
            "host 1 counts 3 hosts, host 0 counts 2",
        ),
        (
            lambda port: numbered(3, [0, 1, 1], port),
            None,
            "two processes say that they are host 1",
        ),
        (
            lambda port: numbered(2, [0, 1], port),
            {1: {"jax": "2"}},
            "host 1 differs from host 0 in jax: 2 there, 1 here",
        ),
    ],
    ids=["missing", "no coordinator", "counts", "twice", "facts"],
)
def test_hosts_that_do_not_fit_end_in_one_error_everywhere(clusters, facts, named):
    errors = call(clusters(free_port()), facts, limit=1.5)
    assert all(error is not None and named in error.what for error in errors), errors


def test_a_stranger_on_the_port_is_passed_over():
    first, second = numbered(2, [0, 1])
    port = int(first.coordinator.partition(":")[2])
    raised = []

    def strange():
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"host": "x"}\n', b"[]\n", b""):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port)) as connection:
                        connection.sendall(words)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)
        raised.extend(call([second]))

    thread = threading.Thread(target=strange)
    thread.start()
    assert call([first]) == [None]

    thread.join(20)
    assert raised == [None]


def test_a_taken_port_is_an_error():
    with socket.create_server(("", 0)) as taken:
        cluster = Cluster(
            "options", "a test", 2, 0, f"localhost:{taken.getsockname()[1]}"
        )
        with pytest.raises(SettingError, match="can't listen on port"):
            meet(cluster, {}, 1.0, TOKEN)


def test_processes_join_into_one_jax_even_in_the_environment_of_slurm(tmp_path):
    # under SLURM JAX would look around for itself, and take one device a process
    around = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "nowhere",
        "SLURM_NTASKS": "9",
        "SLURM_PROCID": "7",
        "SLURM_LOCALID": "1",
    }
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | around
    environment |= {"PYTHONPATH": str(ROOT), "LEPTON_TOKEN": TOKEN}
    port = free_port()
    started = [
        subprocess.Popen(
            python(JOINED, f"localhost:{port}", 2, host),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "saw 2 2 4 [0, 1]" in out
    assert "cluster: host 1" not in err, "host 0 speaks for all"


NOWHERE = {"own-name": None, joining.ELSEWHERE[0]: None, joining.ELSEWHERE[1]: None}


@pytest.mark.parametrize(
    ("coordinator", "ways", "expected"),
    [
        ("127.0.0.1:9001", {}, "127.0.0.1"),  # all are on this machine
        ("localhost:9001", {"localhost": "::1"}, "::1"),
        # the network on which the others are, whatever this machine is called
        ("head:9001", {"head": "10.1.0.7"}, "10.1.0.7"),
        ("[fd00::2]:9001", {"fd00::2": "fd00::7"}, "fd00::7"),
        # the head, as Debian writes its hosts file
        ("head:9001", {"head": "127.0.1.1", "own-name": "10.1.0.2"}, "10.1.0.2"),
        (
            "head:9001",
            {
                "head": "127.0.1.1",
                "own-name": "127.0.1.1",
                joining.ELSEWHERE[0]: "10.1.0.2",
            },
            "10.1.0.2",
        ),
        ("head:9001", NOWHERE | {"head": "127.0.1.1"}, "127.0.1.1"),
        ("head:9001", NOWHERE | {"head": None}, None),
    ],
)
def test_the_address_at_which_others_find_this_host(
    monkeypatch, coordinator, ways, expected
):
    monkeypatch.setattr(socket, "gethostname", lambda: "own-name")
    monkeypatch.setattr(joining, "_source", ({"127.0.0.1": "127.0.0.1"} | ways).get)
    assert joining.own_address(coordinator) == expected


def test_output_of_all_hosts(capfd):
    code = (
        "import sys; print('out', sys.argv[1]); print('err', sys.argv[1],"
        " file=sys.stderr)"
    )
    assert children.spawn([python(code, host) for host in range(3)]) == 0

    out, err = capfd.readouterr()
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == [
        "[host 1] err 1",
        "[host 1] out 1",
        "[host 2] err 2",
        "[host 2] out 2",
        "err 0",
    ]


@pytest.mark.parametrize(
    ("fail", "code", "how"),
    [
        ("sys.exit(7)", 7, "ended with exit code 7"),
        ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL"),
    ],
)
def test_one_that_fails_ends_all(capfd, tmp_path, fail, code, how):
    lives = (
        f"import time, pathlib; pathlib.Path({str(tmp_path)!r}, 'up').touch();"
        " time.sleep(60)"
    )
    fails = (
        f"import os, sys, time, pathlib\nwhile not pathlib.Path({str(tmp_path)!r},"
        f" 'up').exists(): time.sleep(0.01)\n{fail}"
    )
    started = time.monotonic()
    assert children.spawn([python(lives), python(fails), python(lives)]) == code
    assert time.monotonic() - started < 8

    err = capfd.readouterr().err
    assert f"host 1 {how}; the others were stopped" in err
    assert "remedy" in err


@pytest.mark.parametrize("code", [0, 4])
def test_one_that_fails_ends_nobody_where_fewer_may_go_on(capfd, code):
    lives = (
        "import time; time.sleep(0.5); print('lives', flush=True); raise"
        f" SystemExit({code})"
    )
    assert (
        children.spawn(
            [python(lives), python("raise SystemExit(7)"), python(lives)],
            with_fewer=True,
        )
        == code
    )

    out, err = capfd.readouterr()
    assert out == "lives\n"
    assert "[host 2] lives" in err
    assert ("host 0 ended with exit code 4" in err) == bool(code)


def test_one_that_does_not_listen_is_ended_after_the_grace(monkeypatch, capfd):
    monkeypatch.setattr(children, "GRACE", 0.5)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " print('up'); time.sleep(60)"
    )
    started = time.monotonic()
    assert (
        children.spawn(
            [python(deaf), python("import time; time.sleep(1); raise SystemExit(3)")]
        )
        == 3
    )
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_host_once(number):
    code = (
        "import signal, sys, time\ncame = []\n"
        "for each in (2, 15): signal.signal(each, lambda n, _: came.append(n))\n"
        "print('up', flush=True)\n"
        "while not came: time.sleep(0.01)\n"
        "time.sleep(0.3)\nprint('came', came, flush=True)\nsys.exit(130)"
    )
    process = subprocess.Popen(
        python(
            f"{SPAWN}sys.exit(spawn([[sys.executable, '-c', sys.argv[1]]] * 3))", code
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = []
    reader = threading.Thread(
        target=lambda: lines.extend(iter(process.stderr.readline, ""))
    )
    reader.start()
    assert process.stdout.readline() == "up\n"

    while sum("up" in line for line in lines) < 2:
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, number)  # as a terminal does
    assert process.wait(20) == 130

    reader.join(5)
    assert process.stdout.read() == f"came [{int(number)}]\n"
    assert sorted(line for line in lines if "came" in line) == [
        f"[host {host}] came [{int(number)}]\n" for host in (1, 2)
    ]
    assert not any("error" in line for line in lines), lines


def test_a_host_that_cannot_be_started(tmp_path):
    with pytest.raises(SettingError, match="host 1 can't be started"):
        children.spawn(
            [python("import time; time.sleep(60)"), [str(tmp_path / "nothing")]]
        )


GLOO = (
    "[Gloo] Rank 0 is connected to 3 peer ranks. Expected number of connected peer"
    " ranks is : 3\n"
)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["before\n", GLOO, "after\n"], "before\nafter\n"),
        (["a line", GLOO, "\n"], "a line\n"),
        (
            ["[", GLOO[:20], GLOO[20:] + "[Glo", "w] on\n[1, 2]\n"],
            "[[Glow] on\n[1, 2]\n",
        ),
        (
            ["[Gloo] Rank unknown\nx [Gloo] Rank "],
            "[Gloo] Rank unknown\nx [Gloo] Rank ",
        ),
    ],
)
def test_what_gloo_says_is_left_out_of_the_output(pieces, expected, capfd):
    reading, writing = os.pipe()
    thread = threading.Thread(target=children.pass_on, args=(os.fdopen(reading, "rb"),))
    thread.start()
    for piece in pieces:
        os.write(writing, piece.encode())
        time.sleep(0.05)
    os.close(writing)
    thread.join(10)
    assert capfd.readouterr().out == expected

    stream = subprocess.Popen(["printf", "%s", "".join(pieces)], stdout=subprocess.PIPE)
    children.forward(stream.stdout, 1)
    stream.wait()
    assert "is connected to" not in capfd.readouterr().err


def test_output_comes_at_once(capfd):
    reading, writing = os.pipe()
    thread = threading.Thread(target=children.pass_on, args=(os.fdopen(reading, "rb"),))
    thread.start()
    os.write(writing, b"no end of line yet")
    until = time.monotonic() + 10
    seen = ""
    while not seen and time.monotonic() < until:
        seen = capfd.readouterr().out
    os.close(writing)
    thread.join(10)
    assert seen == "no end of line yet"


def test_local_hosts_are_numbered_and_get_virtual_devices(monkeypatch, capfd, tmp_path):
    code = (
        "import os, sys, json; print(json.dumps([sys.argv[1:],"
        " os.environ['JAX_PLATFORMS'], os.environ['LEPTON_WORKER']]))"
    )
    monkeypatch.setattr("lepton_jax.launch.children.python", lambda: python(code))
    monkeypatch.delenv("JAX_PLATFORMS")
    arguments = [
        str(ROOT / "recipes/logistic.py"),
        "--run-dir",
        str(tmp_path / "run"),
        "--hosts",
        "local:2",
        "--devices",
        "3",
    ]
    assert cli.main(arguments) == 0

    out, err = capfd.readouterr()
    said = [
        json.loads(line)
        for line in (
            out,
            next(x for x in err.splitlines() if "[host 1]" in x).partition("] ")[2],
        )
    ]
    assert [each[:2] for each in said] == [[arguments, "cpu"]] * 2

    told = [json.loads(each[2]) for each in said]
    folder = str(tmp_path / "run")
    assert [(each["hosts"], each["host_id"], each["run_dir"]) for each in told] == [
        (2, 0, folder),
        (2, 1, folder),
    ]
    assert told[0]["coordinator"] == told[1]["coordinator"]
    assert told[0]["coordinator"].startswith("127.0.0.1:")
    assert "cluster: 2 hosts on this machine" in err


def test_a_signal_that_every_host_hears_once_is_one():
    """A signal that a scheduler sends to every host asks for one stop.

    SIGTERM may reach host 1, whose supervisor says so, seconds before host 0 hears of
    it.
    """
    head = Head(Cluster("local", "a test", 2), Rules(), {"jax": "1"})
    head._obey(None, {"at": "signal", "count": 1})
    head.signalled()
    assert head._signals == 1, "else all would be ended without a save"

    head._obey(None, {"at": "signal", "count": 2})
    assert head._signals == 2, "a person insists"

    head.gate.close(0, None)


def test_a_worker_goes_by_what_its_supervisor_says(launch, tmp_path):
    process = launch(
        ROOT / "recipes/logistic.py",
        "--steps",
        "300",
        "--restarts",
        "2",
        "--run-dir",
        "run",
        "--json",
        "--save-every",
        "100",
    )
    until = time.monotonic() + 100
    while not (tmp_path / "run" / "checkpoints" / "100").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    worker = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout
    os.kill(int(worker), signal.SIGKILL)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "hosts: host 0 was ended by SIGKILL, last seen in " in err
    assert "restart 1 of 2" in err
    assert json.loads(out.splitlines()[-1])["steps"] == 300

    said = json.loads((tmp_path / "run" / "hosts.json").read_text())
    assert (said["state"], said["restarts"], said["recoveries"][0]["cause"]) == (
        "over",
        1,
        "SIGKILL",
    )


def test_a_mistake_of_a_worker_is_the_command_lines_error(launch, tmp_path):
    process = launch(
        ROOT / "recipes/csv_mlp.py",
        "--data",
        "gone.csv",
        "--label",
        "x",
        "--restarts",
        "2",
        "--run-dir",
        "run",
    )
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 2
    assert err.count("gone.csv") == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_one_host_is_as_without_options(launch, tmp_path):
    process = launch(
        ROOT / "recipes/logistic.py",
        "--steps",
        "2",
        "--hosts",
        "1",
        "--devices",
        "2",
        "--json",
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["steps"] == 2


def test_sigterm_is_ctrl_c_in_a_job_that_may_be_started_again(tmp_path):
    arguments = [
        sys.executable,
        ROOT / "tools" / "launch.py",
        ROOT / "recipes" / "logistic.py",
        "--steps",
        10**7,
        "--save-every",
        10**6,
        "--run-dir",
        "run",
        "--go-on",
    ]
    # as a shell starts what is in the background: deaf for Ctrl-C
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *map(str, arguments)],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        for line in process.stdout:
            if "evaluation at step" in line:
                break
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 130, out
        assert "interrupted" in out, out
    finally:
        process.kill()
        process.communicate()


def test_go_on(launch, tmp_path):
    for steps in (2, 4):  # the second goes on where the first ended
        process = launch(
            ROOT / "recipes/logistic.py",
            "--steps",
            steps,
            "--run-dir",
            "run",
            "--go-on",
            "--json",
        )
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["steps"] == steps
    steps = [
        json.loads(line).get("step")
        for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    ]
    assert 4 in steps
    assert (tmp_path / "run" / "checkpoints").is_dir()
