"""Proofs of the run's token: the exchange, and callers who try to get past it.

The callers here write the exchange by hand, by the words of `lepton_jax.launch.proof`.
"""

import contextlib
import hashlib
import hmac
import itertools
import json
import multiprocessing
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watched import Watched

from lepton_jax.errors import SettingError
from lepton_jax.launch import door, proof
from lepton_jax.launch.cluster import Cluster
from lepton_jax.launch.meeting import meet
from lepton_jax.launch.supervise.head import Head
from lepton_jax.launch.supervise.rules import Rules
from lepton_jax.launch.wire import LONGEST_UNPROVEN, Line

HERE = Path(__file__).resolve().parent
TOKEN = "f00dfeed" * 8
OTHER = "deadbeef" * 8
FINISHED = {"status": "finished", "exit_code": 0}
PATIENT = {"limits": {"steps": 20.0, "data": 20.0, "silence": 20.0}, "lost": 8.0}


def mac(key, *parts):
    return hmac.new(key, b"\n".join(parts), hashlib.sha256).hexdigest().encode()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- the exchange ----


def ends(tokens=(TOKEN, TOKEN), channels=("a", "a")):
    """Return a host's end and host 0's, joined."""
    one, other = socket.socketpair()
    return (
        Line(one, tokens[0], channels[0], head=False),
        Line(other, tokens[1], channels[1], head=True),
    )


def spoken(*lines):
    """Return the messages that each end has received, once all have come."""
    heard = [[] for _ in lines]
    for _ in range(4):
        for messages, line in zip(heard, lines, strict=True):
            messages += line.receive()
            line.flush()
    return heard


def test_both_prove_themselves_and_what_waited_is_said():
    host, head = ends()
    host.send(at="hello", number=1)
    head.send(do="welcome")
    host.send(at="where", place=[1, "é\n"])
    assert spoken(host, head) == [
        [{"do": "welcome"}],
        [{"at": "hello", "number": 1}, {"at": "where", "place": [1, "é\n"]}],
    ]
    assert host.proven
    assert head.proven
    assert host.open
    assert head.open


def test_the_lines_are_these():
    """Every byte is compared with a second computation."""
    one, other = socket.socketpair()
    host = Line(one, TOKEN, "supervisors", head=False)
    host.send(n=1)
    host.send(n=2)
    greeting = other.recv(1000)
    assert greeting.startswith(b"lepton-hosts 1 ")
    assert greeting.endswith(b"\n")

    mine = greeting[15:-1]
    yours = secrets.token_hex(32).encode()

    other.sendall(yours + b"\n")
    assert host.receive() == []

    key = TOKEN.encode()
    said = b"proof", b"supervisors", b"host", mine, yours
    assert other.recv(1000) == mac(key, *said) + b"\n"
    assert not host.proven, "it waits for the other's proof"

    other.sendall(mac(key, b"proof", b"supervisors", b"head", mine, yours) + b"\n")
    assert host.receive() == []
    assert host.proven

    to_head = mac(key, b"key", b"host", b"supervisors", mine, yours)
    first = mac(to_head, b"message", b"0", b'{"n": 1}') + b' {"n": 1}\n'
    second = mac(to_head, b"message", b"1", b'{"n": 2}') + b' {"n": 2}\n'
    assert other.recv(1000) == first + second

    to_host = mac(key, b"key", b"head", b"supervisors", mine, yours)
    other.sendall(mac(to_host, b"message", b"0", b'{"do": 3}') + b' {"do": 3}\n')
    assert host.receive() == [{"do": 3}]


@pytest.mark.parametrize(
    ("tokens", "channels"),
    [((OTHER, TOKEN), ("a", "a")), ((TOKEN, TOKEN), ("roll call", "supervisors"))],
    ids=["token", "channel"],
)
def test_another_token_or_channel_is_no_proof_and_learns_nothing(tokens, channels):
    host, head = ends(tokens, channels)
    host.send(at="hello")
    head.send(do="secret")
    assert spoken(host, head) == [[], []]
    assert (head.fault, head.proven, head.open) == (proof.NOT_GIVEN, False, False)
    head.close()
    host.receive()
    assert (host.fault, host.proven) == (proof.NOT_TAKEN, False)
    assert head._in == b""
    assert TOKEN.encode() not in host._out


def test_a_host_believes_nobody_who_has_no_token_and_tells_nothing():
    one, other = socket.socketpair()
    host = Line(one, TOKEN, "a", head=False)
    host.send(at="hello", facts={"jax": "1"})
    mine = other.recv(1000)[15:-1]
    yours = secrets.token_hex(32).encode()
    other.sendall(yours + b"\n")
    host.receive()
    own_proof = other.recv(1000)
    other.sendall(own_proof + b'{"do": "over", "code": 0}\n')  # its own, sent back
    assert host.receive() == []
    assert host.fault == proof.NOT_GIVEN

    host.close()
    assert other.recv(1000) == b"", "not the hello"
    assert mine != yours


@pytest.mark.parametrize("change", ["repeat", "swap", "leave out", "other way", "flip"])
def test_messages_that_were_tampered_with_are_not_believed(change):
    host, head = ends()
    spoken(host, head)
    wires = [socket.socketpair() for _ in range(2)]
    host.connection, head.connection = wires[0][0], wires[1][1]
    for each in (host, head):
        each.connection.setblocking(False)
    for number in range(3):
        host.send(number=number)
    head.send(do="end")
    lines = wires[0][1].recv(1000).splitlines(keepends=True)
    back = wires[1][0].recv(1000)
    changed = {
        "repeat": [lines[0], lines[0], lines[1]],
        "swap": [lines[1], lines[0]],
        "leave out": [lines[0], lines[2]],
        "other way": [lines[0], back],
        "flip": [lines[0], lines[1].replace(b"1}", b"2}")],
    }[change]
    wires[1][0].sendall(b"".join(changed))
    expected = [] if change == "swap" else [{"number": 0}]
    assert head.receive() == expected
    assert not head.open
    assert head.fault


MESSAGES = st.lists(
    st.dictionaries(
        st.text(max_size=4), st.integers() | st.text(max_size=8), max_size=3
    ),
    max_size=4,
)
QUIET = settings(
    max_examples=80,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def cut(text, places):
    """Return the pieces of a text that is cut at these places."""
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@QUIET
@given(MESSAGES, st.lists(st.integers(0, 10**6), max_size=6))
def test_messages_arrive_however_the_network_cuts_them(messages, places):
    host, head = ends()
    spoken(host, head)
    near, far = socket.socketpair()
    host.connection = near
    for message in messages:
        host.send(**message)
    near.close()
    sent = b""
    while more := far.recv(1 << 16):
        sent += more
    far.close()

    near, head.connection = socket.socketpair()
    head.connection.setblocking(False)
    heard = []
    for piece in cut(sent, places):
        near.sendall(piece)
        heard += head.receive()
    near.close()
    head.close()
    assert heard == messages


@QUIET
@given(MESSAGES, st.integers(0, 10**6), st.binary(max_size=90), st.integers(0, 90))
def test_of_a_stream_that_was_changed_only_true_messages_are_believed(
    messages, place, put, taken
):
    host, head = ends()
    spoken(host, head)
    near, far = socket.socketpair()
    host.connection = near
    for message in messages:
        host.send(**message)
    near.close()
    sent = b""
    while more := far.recv(1 << 16):
        sent += more
    far.close()
    place %= len(sent) + 1
    changed = sent[:place] + put + sent[place + taken :]

    near, head.connection = socket.socketpair()
    head.connection.setblocking(False)
    near.sendall(changed)
    heard = head.receive()
    near.close()
    head.close()
    assert heard == messages[: len(heard)]

    if changed.startswith(sent):
        assert heard == messages


@QUIET
@given(st.binary(max_size=400), st.booleans())
def test_whatever_a_stranger_says_is_no_message(text, as_host):
    near, far = socket.socketpair()
    line = Line(far, TOKEN, "a", head=as_host)
    with contextlib.suppress(OSError):
        near.sendall(text)
    assert line.receive() == []
    assert not line.proven
    if text.count(b"\n") > 1 or len(text) > LONGEST_UNPROVEN:
        assert not line.open
    near.close()
    line.close()


# ---- callers at the port ----


class Caller:
    """A connection to host 0's port, by hand."""

    def __init__(self, port):
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=5.0)
        self.mine = secrets.token_hex(32).encode()
        self.sent = b""

    def say(self, text):
        self.sent += text
        self.connection.sendall(text)

    def line(self):
        """Return the next line; empty once the connection is closed."""
        text = b""
        with contextlib.suppress(OSError):
            while not text.endswith(b"\n"):
                more = self.connection.recv(1)
                if not more:
                    return b""
                text += more
        return text[:-1]

    def greet(self):
        """Return the other's random number."""
        self.say(b"lepton-hosts 1 " + self.mine + b"\n")
        return self.line()

    def prove(self, token, channel, role=b"host"):
        """Whether the proof was answered by a right one."""
        yours = self.yours = self.greet()
        said = channel.encode(), role, self.mine, yours
        self.say(mac(token.encode(), b"proof", *said) + b"\n")
        whole = channel.encode(), b"head", self.mine, yours
        self.key = mac(
            token.encode(), b"key", b"host", channel.encode(), self.mine, yours
        )
        return self.line() == mac(token.encode(), b"proof", *whole)

    def close(self):
        self.connection.close()


def calling(act):
    """Run an attack again and again until it is told to stop."""

    def attack(port, channel, token, over, done):
        while not over.is_set():
            try:
                act(port, channel, token, over)
                done.append(1)
            except (OSError, BrokenPipeError):
                time.sleep(0.01)

    return attack


@calling
def lies(port, channel, token, over):
    """Make the right exchange with another token, then say what a host would."""
    with contextlib.closing(Caller(port)) as caller:
        assert not caller.prove(OTHER, channel)
        caller.say(b'{"host": 1, "hosts": 2, "facts": {}}\n')
        assert caller.line() == b""
    time.sleep(0.05)


@calling
def speaks_without_proof(port, channel, token, over):
    """Speak as hosts did before they proved themselves, and as a browser does."""
    hello = {"at": "hello", "run": "", "host": 1, "hosts": 9, "facts": {"x": "y"}}
    for text in (json.dumps({**hello, "generation": 0}).encode(), b"GET / HTTP/1.1"):
        with contextlib.closing(Caller(port)) as caller:
            caller.say(text + b"\n")
            assert caller.line() == b"", "it is answered with nothing"
    time.sleep(0.05)


@calling
def plays_again(port, channel, token, over):
    """Repeat, word for word, what a true host said."""
    with contextlib.closing(Caller(port)) as true:
        proven = true.prove(token(), channel)
    if not proven:
        raise OSError("it had to make room")
    with contextlib.closing(Caller(port)) as caller:
        caller.connection.settimeout(2.0)
        caller.say(true.sent)
        number = caller.line()
        if not number:
            raise OSError("it had to make room, or all is over")
        assert number != true.yours, "a fresh one"
        assert caller.line() == b""
    time.sleep(0.05)


@calling
def reflects(port, channel, token, over):
    """Give back host 0's own number, or let one connection answer another."""
    with (
        contextlib.closing(Caller(port)) as one,
        contextlib.closing(Caller(port)) as two,
    ):
        number = one.greet()
        two.mine = number
        second = two.greet()
        if not number or not second:
            raise OSError("host 0 has hung up, as the run is over")
        assert number != second
        one.say(number + b"\n")
        two.say(second + b"\n")
        assert one.line() == two.line() == b""
    time.sleep(0.05)


@calling
def floods(port, channel, token, over):
    """Open many connections at once, and send megabytes without a line end."""
    held = []
    try:
        for number in range(400):
            caller = Caller(port)
            held.append(caller)
            if number % 4 == 0:
                with contextlib.suppress(OSError):
                    caller.say(b"x" * (1 << 20))
            if over.is_set():
                break
    finally:
        for caller in held:
            caller.close()


@calling
def says_nothing(port, channel, token, over):
    """Hold hundreds of connections, and open them again when they are closed."""
    held = []
    try:
        while len(held) < 300 and not over.is_set():
            held.append(Caller(port))
        over.wait(3.0)
    finally:
        for caller in held:
            caller.close()


@calling
def proves_and_rants(port, channel, token, over):
    """Prove the token, then say what is no message, or none of a host's."""
    for text in (b"\0\xff" * 100 + b"\n", b'{"host": 1}\n', b"x" * (1 << 21)):
        with contextlib.closing(Caller(port)) as caller:
            if caller.prove(token(), channel):
                caller.say(text)
                assert caller.line() == b""
    for text in (b"[]", b"[" * 10_000, b"{}", b'{"host": "x", "facts": 1}'):
        with contextlib.closing(Caller(port)) as caller:
            if caller.prove(token(), channel):
                caller.say(
                    mac(caller.key, b"message", b"0", text) + b" " + text + b"\n"
                )
                assert caller.line() == b""
    time.sleep(0.05)


ATTACKS = {
    "lies": lies,
    "without a proof": speaks_without_proof,
    "plays again": plays_again,
    "reflects": reflects,
    "floods": floods,
    "says nothing": says_nothing,
    "proves itself and rants": proves_and_rants,
}


@contextlib.contextmanager
def attacked(name, port, channel, token):
    """Have an attacker at the port inside the block.

    Yields how often it got there.
    """
    over = threading.Event()
    done: list[int] = []
    failed: list[BaseException] = []

    def run():
        try:
            ATTACKS[name](port, channel, token, over, done)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join(30)
    if failed:
        raise failed[0]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_roll_is_called_whoever_else_calls(name, capfd):
    """Silent and slow callers do not use up the time of the hosts."""
    port = free_port()
    hosts = [Cluster("options", "a test", 3, i, f"127.0.0.1:{port}") for i in range(3)]
    raised = {}

    def one(cluster):
        try:
            meet(cluster, {"jax": "1"}, 20.0, TOKEN)
        except SettingError as error:
            raised[cluster.host_id] = error

    threads = [threading.Thread(target=one, args=(cluster,)) for cluster in hosts]
    with attacked(name, port, "roll call", lambda: TOKEN) as done:
        threads[0].start()
        until = time.monotonic() + 15
        while not done and name != "says nothing" and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
        began = time.monotonic()
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join(25)
            assert not thread.is_alive()
    assert raised == {}
    assert time.monotonic() - began < 15
    assert capfd.readouterr().err.count("hosts: refused") <= 2, "once an address"


@pytest.fixture(scope="module")
def forkserver():
    before = os.environ.get("PYTHONPATH")
    paths = filter(None, [str(HERE), str(HERE.parents[1]), before])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    multiprocessing.set_forkserver_preload(["watched"])
    yield
    if before is None:
        os.environ.pop("PYTHONPATH")
    else:
        os.environ["PYTHONPATH"] = before
    for each in Watched.started:
        each.process.kill()
        each.process.join()


def status(folder):
    return json.loads((folder / "hosts.json").read_text())


@pytest.mark.parametrize("name", ATTACKS)
def test_a_run_meets_trains_and_ends_well_whoever_calls(forkserver, tmp_path, name):
    port = free_port()
    more = {
        "hosts": 2,
        "plan": {"until": 60, "every": 20},
        "rules": PATIENT,
        "limit": 30,
    }

    def token():
        try:
            return (tmp_path / "token").read_text().strip()
        except OSError as error:
            raise OSError("not yet") from error

    with attacked(name, port, "supervisors", token) as done:
        runs = [Watched(tmp_path, host=0, port=port, **more)]
        until = time.monotonic() + 20
        while not done and name != "says nothing" and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
        runs.append(Watched(tmp_path, host=1, port=port, **more))
        results = [each.done(60.0)[0] for each in runs]
    said = runs[0].said()
    assert results == [FINISHED] * 2, said

    found = status(tmp_path)
    assert (found["restarts"], found["recoveries"], found["generation"]) == (0, [], 1)
    assert found["refused_connections"] >= 1
    assert said.count("hosts: refused") <= 2, "one address, once, and once a minute"
    assert not (tmp_path / "token").exists(), "the run is over"


def test_a_head_that_is_none_does_not_stop_a_host(forkserver, tmp_path):
    """It learns nothing, and the host goes on looking for the true one."""
    port = free_port()
    heard = []
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    with socket.create_server(("127.0.0.1", port)) as false:
        runs = [Watched(tmp_path, hosts=2, host=1, port=port, limit=30.0)]
        for _ in range(2):
            connection, _ = false.accept()
            with connection:
                connection.settimeout(5.0)
                heard.append(connection.recv(1000))
                connection.sendall(secrets.token_hex(32).encode() + b"\n")
                heard.append(connection.recv(1000))
                connection.sendall(b"0" * 64 + b"\n" + b'{"do": "over", "code": 0}\n')
                with contextlib.suppress(OSError):
                    heard.append(connection.recv(1000))
    runs.append(Watched(tmp_path, hosts=2, host=0, port=port, limit=30.0))
    assert [each.done()[0] for each in runs] == [FINISHED] * 2, runs[0].said()
    assert (
        runs[0].said().count("host 0 is not met yet: it did not prove that it has") == 1
    )
    assert not any(b"facts" in text or TOKEN.encode() in text for text in heard)


def test_a_head_that_drips_letters_does_not_hold_a_host(forkserver, tmp_path):
    port = free_port()
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", port)) as false:
        false.settimeout(0.2)
        held = []

        def drip():
            while not over.wait(0.2):
                with contextlib.suppress(OSError):
                    held.append(false.accept()[0])
                for connection in held:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"0")

        thread = threading.Thread(target=drip)
        thread.start()
        rules = {"lost": 1.0}
        run = Watched(tmp_path, hosts=2, host=1, port=port, limit=3.0, rules=rules)
        result = run.done(20.0)[0]
        over.set()
        thread.join()
        for connection in held:
            connection.close()
    assert "host 0 can't be met" in result["what"]
    assert result["exit_code"] == 2


@pytest.mark.parametrize(
    "message",
    [
        {"at": "signal"},
        {"at": "signal", "count": "2"},
        {"at": "where", "generation": 0, "place": 7},
        {"at": "stack", "generation": 0},
        {"at": "ended", "generation": 0},
    ],
    ids=lambda message: " ".join(map(str, message.values())),
)
def test_a_host_that_talks_nonsense_loses_its_seat_and_ends_nobody(message):
    port = free_port()
    cluster = Cluster("options", "a test", 2, 0, f"127.0.0.1:{port}")
    head = Head(cluster, Rules(), {}, token=TOKEN)
    near = socket.create_connection(("127.0.0.1", port))
    line = Line(near, TOKEN, "supervisors", head=False)
    hello = {"at": "hello", "run": "", "host": 1, "hosts": 2, "facts": {}}
    line.send(**hello, generation=0)
    heard = []
    for _ in range(4):
        head.gate.serve(0.2)
        heard += line.receive()
    assert heard == [{"do": "welcome"}]

    head.seats[1].generation = 0
    line.send(**message)
    head.gate.serve(0.5)
    [seat] = head.gate.lost(time.monotonic(), 10.0)
    assert seat.line.fault == "it speaks another language"
    assert head.seats == {}

    line.close()
    head.gate.close(0, None)


def test_hosts_of_two_tokens_say_so_on_both_sides(forkserver, tmp_path, monkeypatch):
    port = free_port()
    runs = []
    for host, token in ((0, TOKEN), (1, OTHER)):
        (tmp_path / str(host)).mkdir()
        (tmp_path / str(host) / "token").write_text(token)
        (tmp_path / str(host) / "token").chmod(0o600)
        runs.append(
            Watched(tmp_path / str(host), hosts=2, host=host, port=port, limit=3.0)
        )
    first, second = (each.done()[0] for each in runs)
    assert (first["exit_code"], second["exit_code"]) == (2, 2)
    assert "of 2 hosts 1 did not come within 3 s: 1; " in first["what"]
    assert "connections were refused without proof of the run's token" in first["what"]
    assert "it did not take this host's proof of the run's token" in second["what"]

    for each, run in ((first, runs[0]), (second, runs[1])):
        assert "LEPTON_TOKEN to the same value on all hosts" in each["remedy"]
        assert TOKEN not in run.said()
        assert OTHER not in run.said()
    assert "refused a connection from 127.0.0.1" in runs[0].said()


def test_refusals_are_counted_and_cannot_fill_a_disk(capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(door.time, "monotonic", lambda: now[0])
    refused = door.Refused()
    for number in range(50_000):
        now[0] += 0.01
        refused.add(f"10.0.{number % 200}.{number % 7}", "no proof within 5 s")
    lines = capfd.readouterr().err.splitlines()
    assert refused.count == 50_000
    assert len(lines) <= door.MOST_NAMED + 500 / door.SELDOM + 1
    assert lines[0] == "hosts: refused a connection from 10.0.0.0: no proof within 5 s"
    assert "connections so far, the last from 10.0." in lines[-1]


def test_who_floods_from_one_address_does_not_push_out_others(monkeypatch):
    monkeypatch.setattr(door, "MOST_UNPROVEN", 8)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with contextlib.closing(door.Door(listener, TOKEN, "a")) as gate:
        callers = []
        for source in ["127.0.0.2"] + ["127.0.0.3"] * 30:
            near = socket.create_connection(
                ("127.0.0.1", port), source_address=(source, 0)
            )
            callers.append(near)
            gate.serve(0.1)
        there = list(gate._address.values())
        assert there.count("127.0.0.2") == 1
        assert there.count("127.0.0.3") == 7
        assert gate.refused.count == 23
        for near in callers:
            near.close()
