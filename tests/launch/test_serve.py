"""The server of a run's status.

What it tells to whom, what it refuses, and that no client's doing reaches the run.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lepton_jax.cli.control import main
from lepton_jax.errors import SettingError
from lepton_jax.hosts import phase
from lepton_jax.hosts.mailbox import Mailbox
from lepton_jax.launch import serve
from lepton_jax.launch.supervise import watchdog
from lepton_jax.monitor import Monitor
from lepton_jax.train.requests import perform

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return folder and token of a run at work, which answers requests."""
    folder = tmp_path_factory.mktemp("run")
    monitor = Monitor(folder)
    monitor.event("start", name="<b>toy</b>", step=0, steps=100)
    monitor.event(
        "steps",
        first=1,
        last=5,
        seconds=1.0,
        data_wait=0.1,
        samples=40,
        records={"loss": [3.0, 2.5, 2.0, 1.5, 1.0]},
    )
    mailbox = Mailbox(folder)
    over = threading.Event()

    class Loop:
        step = 5
        paused = False
        records = SimpleNamespace(monitor=Monitor(None))
        test = None

        def status(self):
            return {
                "until": 100,
                "record": {"loss": 1.0},
                "rollbacks": 0,
                "seconds": 1.0,
            }

    def work():
        while not over.wait(0.02):
            for name, request in mailbox.take():
                mailbox.answer(name, perform(Loop(), request))

    thread = threading.Thread(target=work)
    thread.start()
    yield folder, json.loads((folder / "control" / "run.json").read_text())["token"]
    over.set()
    thread.join()
    mailbox.close("finished")
    monitor.close()


@pytest.fixture(scope="module")
def server(run):
    with serve.serving(("127.0.0.1", 0), run[0]) as server:
        yield server


def ask(server, path="/status", method="GET", body=None, **headers):
    """Return status, headers and body."""
    connection = http.client.HTTPConnection(server.name, server.port, timeout=20)
    try:
        connection.request(
            method,
            path,
            body,
            {name.replace("_", "-"): value for name, value in headers.items()},
        )
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def send(server, data):
    """Return the answer to raw bytes.

    A client that sends too much is hung up on before the end.
    """
    found = b""
    with (
        socket.create_connection((server.name, server.port), timeout=20) as connection,
        contextlib.suppress(OSError),
    ):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while more := connection.recv(1 << 16):
            found += more
    return found


def test_what_it_tells(server, run):
    code, headers, body = ask(server)
    found = json.loads(body)
    assert (code, found["step"], found["state"], found["loss"]) == (
        200,
        5,
        "running",
        1.0,
    )
    assert headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"

    code, headers, body = ask(server, "/metrics?x=1")
    assert code == 200
    assert b"\nlepton_step 5\n" in body
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")

    code, headers, body = ask(server, "/")
    assert code == 200
    assert b"&lt;b&gt;toy&lt;/b&gt;" in body
    assert b"<b>toy" not in body
    assert b"<script" not in body
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")

    code, headers, body = ask(server, method="HEAD")
    assert code == 200
    assert int(headers["Content-Length"]) > 100
    assert body == b""


def test_a_change_takes_the_token_of_the_run_at_work(server, run):
    folder, token = run
    request = json.dumps({"do": "pause"})
    for wrong in (
        {},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {token}x"},
        {"Authorization": f"Basic {token}"},
        {"Authorization": f"Bearer {token[:-1]}"},
        {"Authorization": "Bearer \xff\xfe"},
    ):
        code, headers, body = ask(server, "/control", "POST", request, **wrong)
        assert code == 401
        assert headers["WWW-Authenticate"] == "Bearer"
        assert token.encode() not in body
    assert not [*(folder / "control").glob("*.request")]

    code, _, body = ask(
        server,
        "/control",
        "POST",
        json.dumps({"do": "status"}),
        Authorization=f"bearer {token}",
    )
    assert code == 200
    assert json.loads(body)["until"] == 100

    code, _, body = ask(
        server,
        "/control",
        "POST",
        json.dumps({"do": "evaluate"}),
        Authorization=f"Bearer {token}",
    )
    assert code == 409
    assert "nothing to evaluate on" in json.loads(body)["text"]

    path = folder / "control" / "run.json"
    before = path.read_text()
    path.write_text(before.replace(token, "another"))  # as the next attempt does
    code, _, body = ask(
        server, "/control", "POST", request, Authorization=f"Bearer {token}"
    )
    assert code == 409
    assert "of an earlier attempt" in json.loads(body)["error"]
    assert (
        ask(server, Authorization=f"Bearer {token}", Host="elsewhere.example")[0] == 200
    ), "it may still look"

    path.write_text(before)


@pytest.mark.parametrize(
    ("body", "length", "code"),
    [
        (b"[1]", None, 400),
        (b"{", None, 400),
        (b'{"do": "fly"}', None, 400),
        (b'{"do": ["set"]}', None, 400),
        (b'{"do": "set", "settings": []}', None, 400),
        (b'{"do": "set", "settings": {"x": {}}}', None, 400),
        (b'{"do": "save", "until": 1e99}', None, 400),
        (b"[" * 8000, None, 400),
        (b"\xff\xfe", None, 400),
        (b"{}", "-1", 411),
        (b"{}", "x", 411),
        (b"{}", "\xb2", 411),
        (b"{}", "9" * 9000, 413),
        (b"x" * 9000, None, 413),
    ],
)
def test_requests_that_are_none(server, run, body, length, code):
    headers = {
        "Authorization": f"Bearer {run[1]}",
        **({} if length is None else {"Content_Length": length}),
    }
    assert ask(server, "/control", "POST", body, **headers)[0] == code
    assert not [*(run[0] / "control").glob("*.request")]
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/control",
        "/run.json",
        "/../../etc/passwd",
        "/%2e%2e/control/run.json",
        "/control/run.json",
        "//etc/passwd",
        "/status/",
        "/events.jsonl",
        "/\x80",
    ],
)
def test_there_are_no_other_places(server, run, path):
    answer = send(server, f"GET {path} HTTP/1.0\r\n\r\n".encode("latin-1"))
    assert re.match(rb"HTTP/1.0 40[45] ", answer)
    assert run[1].encode() not in answer


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"\r\n\r\n",
        b"GET",
        b"GET /status\r\n",
        b"GET /status HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1 x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
        b"A" * 100_000,
        b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n",
        b"GET /status HTTP/1.0\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET /status HTTP/1.0\r\nX: " + b"y" * 90_000,
        b"DELETE /status HTTP/1.0\r\n\r\n",
        b"<script> / HTTP/1.0\r\n\r\n",
        b"POST /control HTTP/1.0\r\nContent-Length: 99\r\n\r\n{",
        b"GET /status HTTP/1.1\r\nHost: [\r\nAuthorization\r\n\r\n",
        b"GET http://x/status HTTP/1.0\r\n\r\n",
    ],
    ids=range(17),
)
def test_hostile_bytes(server, run, data, capfd):
    answer = send(server, data)
    assert len(answer) < 4000
    assert run[1].encode() not in answer
    assert b"<script>" not in answer.partition(b"\r\n\r\n")[0]
    assert b"text/html" not in answer
    assert ask(server)[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_dawdles_is_hung_up_on_and_many_hold_nobody_up_for_ever(
    server, monkeypatch
):
    monkeypatch.setattr(serve, "PATIENCE", 0.6)
    slow = [
        socket.create_connection((server.name, server.port), timeout=20)
        for _ in range(serve.AT_ONCE + 4)
    ]
    began = time.monotonic()
    while time.monotonic() - began < 0.5:  # a byte now and then does not keep it open
        for connection in slow:
            with contextlib.suppress(OSError):  # one too many
                connection.sendall(b"G")
        time.sleep(0.1)
    for connection in slow:
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1 << 16) == b""
        connection.close()
    assert time.monotonic() - began < 10

    until = time.monotonic() + 10
    while True:
        try:
            assert ask(server)[0] == 200
            return
        except (OSError, http.client.HTTPException):  # its room is being cleared
            assert time.monotonic() < until


def test_who_asks_by_another_name_or_from_elsewhere_needs_the_token(
    server, run, monkeypatch
):
    for name in ("localhost", "127.0.0.1:80", "[::1]:9", "LOCALHOST"):
        assert ask(server, Host=name)[0] == 200, name
    for name in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "",
    ):
        assert ask(server, Host=name)[0] == 401, name
    assert ask(server, Host="evil.example", Authorization=f"Bearer {run[1]}")[0] == 200

    with serve.serving(("0.0.0.0", 0), run[0]) as everywhere:
        assert not everywhere.loopback
        for path in ("/", "/status", "/metrics"):
            assert ask(everywhere, path)[0] == 401
            assert ask(everywhere, path, Authorization="Bearer x")[0] == 401
            assert ask(everywhere, path, Authorization=f"Bearer {run[1]}")[0] == 200


def test_before_there_is_a_run_and_after_it(tmp_path):
    with serve.serving(("127.0.0.1", 0), tmp_path / "run") as server:
        code, _, body = ask(server)
        assert code == 503
        assert "no run" in json.loads(body)["error"]
        assert (
            ask(server, "/control", "POST", '{"do": "save"}', Authorization="Bearer x")[
                0
            ]
            == 401
        )
        mailbox = Mailbox(tmp_path / "run")
        token = json.loads((tmp_path / "run" / "control" / "run.json").read_text())[
            "token"
        ]
        assert ask(server, Host="x", Authorization=f"Bearer {token}")[0] == 200
        mailbox.close("finished")
        assert ask(server, Host="x", Authorization=f"Bearer {token}")[0] in (200, 503)
        code, _, body = ask(
            server,
            "/control",
            "POST",
            '{"do": "save"}',
            Authorization=f"Bearer {token}",
        )
        assert code == 409, body


def test_a_port_that_is_taken_is_no_reason_to_end_the_run(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = taken.getsockname()
        with serve.serving(place, tmp_path) as server:
            assert server is None
        err = capsys.readouterr().err
        assert err.startswith(
            f"warning: the status can't be served at 127.0.0.1:{place[1]}: "
        )
        assert err.count("\n") == 1
        (tmp_path / "events.jsonl").touch()
        assert main([str(tmp_path), "serve", "--port", str(place[1])]) == 2
        err = capsys.readouterr().err
        assert "can't be had" in err
        assert "--port" in err
        assert "Traceback" not in err
    with serve.serving(("no-such-name.invalid", 80), tmp_path) as server:
        assert server is None
    with serve.serving(None, tmp_path) as server:
        assert server is None
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("8477", ("127.0.0.1", 8477)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::]:99", ("::", 99)),
        ("head.example:65535", ("head.example", 65535)),
    ],
)
def test_addresses(text, place):
    assert serve.address(text) == place


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        ":",
        ":80",
        "a:",
        "::1",
        "[::1]",
        "65536",
        "1:2:3",
        "-1",
        "8 0",
        "9" * 5000,
        "\xb2",
    ],
)
def test_addresses_that_are_none(text):
    with pytest.raises(SettingError, match="is no place to serve the status at"):
        serve.address(text)


def test_one_host_alone_tells_of_itself(run, monkeypatch):
    monkeypatch.setattr(watchdog, "_device_memory", None)
    reads = iter([7, 9])
    watchdog.measure(lambda: next(reads, None), every=0.0)
    here = serve.Here()
    with phase.phase("data"):
        time.sleep(0.05)
        with serve.serving(("127.0.0.1", 0), run[0], here) as server:
            found = json.loads(ask(server)[2])
    row = found["hosts"]["0"]
    assert row["phase"] == "data"
    assert row["seconds"]["data"] >= 0.05
    assert row["limit"] is None
    assert row["device_memory"] == found["memory"]["device"] == 9
    assert row["memory"] is None or row["memory"] > 10 * 2**20


def test_seconds_spent_in_each_phase():
    before = phase.spent()
    with phase.phase("save"):
        time.sleep(0.02)
        during = phase.spent()["save"]
        with phase.phase("data"):
            time.sleep(0.03)
    after = phase.spent()
    assert set(after) == set(phase.PHASES)
    assert during - before["save"] >= 0.02
    assert after["data"] - before["data"] >= 0.03
    assert 0.02 <= after["save"] - before["save"] < during - before["save"] + 0.02

    step = phase.where().step
    phase.reached(step=step + 1)
    assert phase.spent()["save"] == after["save"]
    assert phase.spent()[phase.where().phase] >= after[phase.where().phase]

    phase.reached(step=step)


def test_a_run_under_supervision_is_seen_steered_and_seen_after_its_end(
    launch, tmp_path, capsys
):
    process = launch(
        ROOT / "recipes" / "logistic.py",
        "--steps",
        10_000_000,
        "--save-every",
        10_000_000,
        "--restarts",
        1,
        "--run-dir",
        "run",
        "--status",
        "0",
    )
    line = process.stderr.readline()
    port = int(re.fullmatch(r"status: http://127\.0\.0\.1:(\d+)/\n", line)[1])
    threading.Thread(target=process.stderr.read, daemon=True).start()

    class there:
        name = "127.0.0.1"

    there.port = port
    until = time.monotonic() + 120
    found = {}
    while not found.get("step"):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
        code, _, body = ask(there)
        found = json.loads(body) if code == 200 else {}
    assert found["state"] == "running"
    assert found["hosts"]["0"]["seconds"]["steps"] >= 0
    assert found["restarts"] == 0
    assert main([str(tmp_path / "run"), "status"]) == 0
    assert re.search(r"^0 \S+ +running +\w+ ", capsys.readouterr().out, re.MULTILINE)

    token = json.loads((tmp_path / "run" / "control" / "run.json").read_text())["token"]
    code, _, body = ask(
        there, "/control", "POST", '{"do": "stop"}', Authorization=f"Bearer {token}"
    )
    assert code == 200
    assert "stops after step" in json.loads(body)["text"]
    assert process.wait(60) == 130

    tool = subprocess.Popen(
        [
            sys.executable,
            ROOT / "tools" / "control.py",
            tmp_path / "run",
            "serve",
            "--port",
            "0",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        there.port = int(re.search(r":(\d+)/", tool.stderr.readline())[1])
        assert json.loads(ask(there)[2])["state"] == "interrupted"
        tool.send_signal(2)
        assert tool.wait(20) == 130
        assert tool.stderr.read() == ""
    finally:
        tool.kill()
        tool.communicate()
