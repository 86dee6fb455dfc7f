"""The end of a listening socket."""

import socket
import sys

import pytest

from lepton_jax.ship.serve.gate import hold_back


@pytest.mark.skipif(sys.platform != "linux", reason="a filter of Linux")
def test_nobody_new_gets_in_and_nobody_who_is_in_is_lost():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
        early = socket.create_connection(place)
        early.sendall(b"early")
        assert hold_back(listener)
        late = socket.socket()
        late.settimeout(0.2)
        with pytest.raises(TimeoutError):
            late.connect(place)
        late.close()

        taken, _ = listener.accept()
        assert taken.recv(5) == b"early"
        taken.sendall(b"answer")
        listener.close()
        early.sendall(b"more")
        assert taken.recv(4) == b"more"
        assert early.recv(6) == b"answer"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(place)
        taken.close()
        early.close()
