"""A listening socket that lets nobody new knock, before it is closed.

Closing a socket resets the connections that the system has made and the program has
not taken yet, and their clients may have sent a request already. So new connections
are held back first: a filter of Linux drops the packets that open one. Their clients
try again after a second, and are told then that nobody listens. Those that are through
already are taken meanwhile.

    time      new connection         connection made before
    filter    waits                  is taken, and answered
    close     refused after 1 s      goes on

https://docs.kernel.org/networking/filter.html
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import sys

ATTACH_FILTER = 26  # SO_ATTACH_FILTER, which Python has no name for
FLAGS = 13  # offset of the flags in a TCP header
SYN = 0x02
SYN_OR_ACK = 0x12
ALL = 0xFFFFFFFF

# Instructions of classic BPF: code, jump if true, jump if false, operand.
INSTRUCTION = struct.Struct("=HBBI")
LOAD_BYTE = 0x30
AND = 0x54
JUMP_IF_EQUAL = 0x15
RETURN = 0x06
DROP_NEW = (
    (LOAD_BYTE, 0, 0, FLAGS),
    (AND, 0, 0, SYN_OR_ACK),
    (JUMP_IF_EQUAL, 0, 1, SYN),
    (RETURN, 0, 0, 0),
    (RETURN, 0, 0, ALL),
)


def hold_back(listener: socket.socket) -> bool:
    """Let a listening socket make no new connections.

    Returns:
      Whether it is so; only Linux can do it.
    """
    if sys.platform != "linux":
        return False
    code = b"".join(INSTRUCTION.pack(*each) for each in DROP_NEW)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(DROP_NEW), ctypes.addressof(buffer))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, program)
        return True
    return False
