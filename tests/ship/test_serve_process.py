"""The server as a process: signals, slow clients, TLS, a browser."""

import contextlib
import json
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request

import browser
import pytest
from server_process import Process, read_answer, request, server

pytest.importorskip("uvicorn", reason="the extra 'serve'")
pytest.importorskip("orjson", reason="the extra 'serve'")


@pytest.fixture(scope="module")
def running():
    names = ("linear", "people", "digits")
    with server(*names, "--most-mib", "0.01") as process:
        yield process


def test_it_says_what_it_serves_and_where(running):
    assert "listening on http://127.0.0.1:" in running.text
    assert "linear 1 in batches of 1 to" in running.text


def test_one_connection_answers_request_after_request(running):
    with running.connect() as connection:
        for value in range(20):
            connection.sendall(request(value=value))
            status, headers, body = read_answer(connection)
            assert status == 200 and "connection" not in headers
            assert json.loads(body)["outputs"][0]["data"] == [2 * value] * 3


def test_requests_on_one_connection_that_do_not_wait_are_answered_in_order(running):
    with running.connect() as connection:
        connection.sendall(b"".join(request(value=value) for value in range(5)))
        content = b""
        while content.count(b"model_name") < 5:
            content += connection.recv(1 << 16)
        places = [content.find(b"[%.1f," % (2 * v)) for v in range(5)]
        assert places == sorted(places) and places[0] > 0


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v2/models/linear/infer HTTP/1.1\r\nContent-Length: 1\r\n"
        b"Content-Length: 2\r\n\r\n12",
        b"POST /v2/models/linear/infer HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v2/models/linear/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"zz\r\n",
    ],
    ids=["a version", "TLS", "two lengths", "no length", "no chunk"],
)
def test_what_is_no_http_is_refused_in_json_and_the_server_goes_on(running, sent):
    with running.connect() as connection:
        connection.sendall(sent)
        status, headers, body = read_answer(connection)
        assert status == 400 and json.loads(body)["error"]
        assert headers["connection"] == "close"
    assert running.ask("GET", "/v2/health/live")[0] == 200


def test_headers_without_end_are_cut_off(running):
    with running.connect() as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\n" + b"X: " + b"y" * 200_000)
        status, _, _ = read_answer(connection)
        assert status == 431


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(running):
    with running.connect() as connection:
        connection.sendall(
            b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 99999999\r\n\r\n"
        )
        status, headers, _ = read_answer(connection)
        assert (status, headers["connection"]) == (413, "close")


def test_a_client_that_goes_away_harms_nobody(running):
    for cut in (30, 150, len(request()) - 1, len(request())):
        with running.connect() as connection:
            connection.sendall(request()[:cut])
    assert running.ask("GET", "/v2/health/ready")[0] == 200
    assert "Traceback" not in running.text


def test_the_head_of_a_method_that_is_not_for_it(running):
    assert running.ask("PUT", "/v2")[0] == 405
    assert running.ask("GET", "/v2/models/%6Cinear")[0] == 200
    assert running.ask("GET", "/docs")[0] == 200


def keep_asking(process, outcomes, stop):
    """Ask in closed loop, as a client with keep-alive does; note what came of it."""
    value = 0
    while not stop.is_set():
        try:
            connection = process.connect()
        except ConnectionRefusedError:
            outcomes.append("refused")
            return
        with connection:
            is_open = True
            while is_open and not stop.is_set():
                value += 1
                try:
                    connection.sendall(request(value=value, name="slow"))
                    answer = read_answer(connection)
                except OSError as error:
                    outcomes.append(f"lost: {error!r}")
                    return
                if answer is None:
                    outcomes.append("lost: hung up")
                    return
                status, headers, body = answer
                if status == 200:
                    got = json.loads(body)["outputs"][0]["data"]
                    outcomes.append("right" if got == [2 * value] * 3 else "wrong")
                else:
                    outcomes.append(str(status))
                is_open = headers.get("connection") != "close"


def test_sigterm_under_load_loses_no_request():
    words = ("slow:0.004", "--batch", "1,2,4", "--unready", "0.3")
    with server(*words) as process:
        outcomes = []
        stop = threading.Event()
        clients = [
            threading.Thread(target=keep_asking, args=(process, outcomes, stop))
            for _ in range(6)
        ]
        for client in clients:
            client.start()
        time.sleep(0.4)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
        assert process.ask("GET", "/v2/health/ready")[0] == 503
        assert process.ask("GET", "/v2/health/live")[0] == 200
        for client in clients:
            client.join(20)
        assert process.process.wait(20) == 0
        assert set(outcomes) == {"right", "refused"}
        assert outcomes.count("right") > 50


def test_sigterm_while_a_batch_runs_waits_for_its_answer():
    with server("slow:0.7", "--batch", "1", "--unready", "0") as process:
        with process.connect() as connection:
            connection.sendall(request(name="slow"))
            time.sleep(0.1)
            process.process.send_signal(signal.SIGTERM)
            status, headers, _ = read_answer(connection)
            assert (status, headers["connection"]) == (200, "close")
        assert process.process.wait(10) == 0


def test_sigterm_while_it_loads_ends_it_at_once():
    with server("slow:1.5", "--batch", "1,2,4", is_awaited=False) as process:
        assert process.ask("GET", "/v2/health/live")[0] == 200
        assert process.ask("GET", "/v2/health/ready")[0] == 503
        began = time.monotonic()
        assert process.end() == 0
        assert time.monotonic() - began < 2.5


def test_sigkill_is_heard_of_by_the_client():
    words = ("slow:1", "--batch", "1")
    with server(*words) as process, process.connect() as connection:
        connection.sendall(request(name="slow"))
        time.sleep(0.1)
        process.process.kill()
        with contextlib.suppress(ConnectionError):
            assert read_answer(connection) is None


@pytest.mark.parametrize(
    "words, told",
    [
        (["--tls-cert", "nowhere.pem"], "give both"),
        (["--batch", "0"], "no batch sizes"),
        (["--canary", "linear"], "names no canary"),
        (["--token-file", "nowhere"], "a token can't be read"),
        (["--timeout", "0"], "--timeout is 0"),
    ],
)
def test_mistakes_on_the_command_line_are_told(tmp_path, words, told, capsys):
    from lepton_jax.cli import serve

    # a thread of another server in this process is none of this one's business
    is_told = threading.Event()
    loads = threading.Thread(target=is_told.wait, name=f"{serve.LOADER}-other")
    loads.start()

    assert serve.main([str(tmp_path), *words]) == 2
    assert told in capsys.readouterr().err
    is_told.set()
    loads.join()


def test_what_is_no_artifact_ends_it_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lepton_jax", "serve", tmp_path, "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and "remedy" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the files")
def test_tls_by_files(tmp_path):
    files = [tmp_path / "chain.pem", tmp_path / "key.pem"]
    options = (
        "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(
        [
            *("openssl", "req", "-x509", *options.split()),
            *("-out", files[0], "-keyout", files[1]),
        ],
        check=True,
        capture_output=True,
    )
    with server("linear", "--tls-cert", files[0], "--tls-key", files[1]) as process:
        context = ssl.create_default_context(cafile=str(files[0]))
        url = f"https://localhost:{process.port}/v2/health/ready"
        with urllib.request.urlopen(url, context=context) as answer:
            assert answer.status == 200
        assert process.end() == 0


ZERO = [
    (0.5, 0.12),
    (0.3, 0.25),
    (0.25, 0.5),
    (0.3, 0.75),
    (0.5, 0.88),
    (0.7, 0.75),
    (0.75, 0.5),
    (0.7, 0.25),
    (0.5, 0.12),
]
ONE = [(0.5, 0.1), (0.5, 0.9)]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium")
def test_a_drawn_digit_is_answered_in_a_browser(running):
    pytest.importorskip("websockets", reason="the extra 'serve'")
    with browser.browser() as page:
        page.open(f"http://127.0.0.1:{running.port}/")
        page.until("document.querySelector('#pad') !== null")
        for digit, stroke in (("0", ZERO), ("1", ONE)):
            page.click("#clear")
            page.draw("#pad", stroke)
            page.until("document.querySelector('.bar') !== null")
            assert page.value("document.querySelector('#answer').textContent") == digit
        assert page.value("document.querySelectorAll('.bar').length") == 10

        page.value("show('people')")
        page.until("document.querySelector('#field-age') !== null")
        page.value("document.querySelector('#field-age').value = 61")
        page.click("#ask")
        page.until("document.querySelector('#answer').textContent === 'old'")
        assert page.value("document.querySelector('#error').textContent") == ""


def test_a_process_that_is_told_twice_by_ctrl_c_ends_at_once():
    process = Process("slow:3", "--batch", "1", is_awaited=False)
    process.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    assert process.end(signal.SIGINT) in (0, 130)
