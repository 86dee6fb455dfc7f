"""Sources of the run's token, and who else gets to see it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_jax.errors import SettingError
from lepton_jax.launch import children, tokens
from lepton_jax.launch.cluster import Cluster

GIVEN = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


def by_hand(host, hosts=2):
    return Cluster("options", "a test", hosts, host, "first:8476")


def secret(path, text=GIVEN, mode=0o600):
    path.write_text(text + "\n")
    path.chmod(mode)
    return path


def test_the_file_goes_before_the_variable_and_that_before_the_run_folder(tmp_path):
    file = secret(tmp_path / "mine")
    environ = {"LEPTON_TOKEN": f" {OTHER}\n"}
    for host in range(2):
        given = tokens.of_run(by_hand(host), tmp_path, file, environ)
        assert given() == GIVEN
        assert tokens.of_run(by_hand(host), tmp_path, None, environ)() == OTHER
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize(
    "cluster",
    [Cluster("local", "a test", 4), Cluster("alone", ""), Cluster("slurm", "one", 1)],
    ids=lambda cluster: cluster.source,
)
def test_hosts_of_one_process_have_a_token_that_nobody_else_has(tmp_path, cluster):
    first, second = (tokens.of_run(cluster, tmp_path, None, {}) for _ in range(2))
    assert first() == first() != second()
    assert len(first()) == 64
    assert not list(tmp_path.iterdir())


def test_host_0_leaves_one_in_the_run_folder_and_takes_it_away_again(tmp_path):
    folder = tmp_path / "runs" / "new"
    head, host = (tokens.of_run(by_hand(host), folder, None, {}) for host in (0, 1))
    with pytest.raises(tokens.NotThereError, match="host 0 has left no token"):
        host()
    mask = os.umask(0)
    try:
        token = head()
    finally:
        os.umask(mask)
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    assert token == head() == host()
    assert len(token) == 64

    again = tokens.of_run(by_hand(0), folder, None, {})
    assert again() == token, "host 0 was started again, and the others wait for it"

    host.forget()
    assert (folder / "token").exists(), "it is host 0's"

    head.forget()
    assert not (folder / "token").exists()

    head.forget()
    assert again() != token


def test_a_file_that_was_cut_off_is_made_anew_by_host_0_alone(tmp_path):
    secret(tmp_path / "token", "").write_text("")
    head, host = (tokens.of_run(by_hand(host), tmp_path, None, {}) for host in (0, 1))
    with pytest.raises(tokens.NotThereError, match="still empty"):
        host()
    assert head() == host()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: secret(path, mode=0o640), "has mode 0640: others know"),
        (lambda path: secret(path, mode=0o604), "has mode 0604: others know"),
        (lambda path: secret(path, "short"), "has 5 characters"),
        (lambda path: secret(path, "x" * 513), "has 513 characters"),
        (lambda path: secret(path, "two words " * 5), "holds spaces"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: os.mkfifo(path, 0o600), "is no file"),
    ],
    ids=["group", "others", "short", "long", "words", "folder", "pipe"],
)
@pytest.mark.parametrize("host", [0, 1])
def test_what_is_no_secret_is_refused(tmp_path, change, what, host):
    change(tmp_path / "token")
    with pytest.raises(SettingError, match=what):
        tokens.of_run(by_hand(host), tmp_path, None, {})()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(tmp_path):
    os.chown(secret(tmp_path / "token"), 12345, 12345)
    with pytest.raises(SettingError, match="user 12345's"):
        tokens.of_run(by_hand(1), tmp_path, None, {})()


@pytest.mark.parametrize("folder", ["/proc/lepton", "/dev/null/run"])
def test_a_folder_in_which_no_token_can_be_left(folder):
    with pytest.raises(tokens.NotThereError, match="host 0 can leave no token"):
        tokens.of_run(by_hand(0), Path(folder), None, {})()


def test_without_any_of_them_nothing_begins():
    for host in range(2):
        with pytest.raises(SettingError, match="have no token") as caught:
            tokens.of_run(by_hand(host), None, None, {"LEPTON_TOKEN": ""})
        assert "set LEPTON_TOKEN to the same value on all" in caught.value.remedy


def test_the_command_of_the_remedies_makes_a_token():
    made = subprocess.run(
        ["sh", "-c", tokens.MAKE], capture_output=True, text=True, check=True
    )
    assert tokens.GOOD.fullmatch(made.stdout.strip())


def test_workers_do_not_get_it(monkeypatch):
    monkeypatch.setenv("LEPTON_TOKEN", GIVEN)
    code = "import os, json; print(json.dumps([*os.environ.values()]))"
    seen = subprocess.run(
        [sys.executable, "-c", code],
        env=children.variables({"A": "b"}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "b" in json.loads(seen.stdout)
    assert GIVEN not in seen.stdout


def test_it_is_not_printed():
    token = tokens.Token(GIVEN)
    assert GIVEN not in f"{token} {token!r}"
