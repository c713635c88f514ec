"""A workload: it does what its orders say, one JSON object a line, and answers each with one.

It is a foreign program on purpose: it forks without executing, executes with its connection open, and passes its
connection on, as servers do.
"""
import json
import os
import signal
import socket
import sys

TIMEOUT = 20  # seconds, of whatever it waits for


def exactly(n):
    data = b""
    while len(data) < n:
        more = held.recv(n - len(data))
        if not more:
            raise EOFError("the connection has ended")
        data += more
    return data


def connect(o):
    global held
    held = socket.create_connection((o["host"], o["port"]), TIMEOUT)
    return {"port": held.getsockname()[1]}


def ask(o):
    held.settimeout(TIMEOUT)
    held.sendall(bytes.fromhex(o["frame"]))
    return {"frame": exactly(int.from_bytes(exactly(4), "big")).hex()}


def ended(o):
    """Waits for the end of the connection."""
    held.settimeout(o["seconds"])
    try:
        while held.recv(4096):
            pass
    except ConnectionError:
        pass
    return {}


def fork(_):
    """The child goes on, in a process group of its own; the parent waits to be killed."""
    if os.fork():
        signal.pause()
    os.setpgid(0, 0)
    return {"pid": os.getpid()}


def execute(_):
    """Another program image of the same program goes on with the connection."""
    held.setblocking(True)
    os.set_inheritable(held.fileno(), True)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, os.path.abspath(sys.argv[0]), str(held.detach())])


def listen(o):
    global waiting
    waiting = socket.socket(socket.AF_UNIX)
    waiting.bind(o["path"])
    os.chmod(o["path"], 0o777)
    waiting.listen()
    return {}


def receive(_):
    global held
    waiting.settimeout(TIMEOUT)
    peer, _ = waiting.accept()
    _, fds, _, _ = socket.recv_fds(peer, 1, 1)
    held = socket.socket(fileno=fds[0])
    return {}


def give(o):
    """Passes the connection on (SCM_RIGHTS), and keeps it."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(o["path"])
        socket.send_fds(peer, [b"x"], [held.fileno()])
    return {}


def close(_):
    held.close()
    return {}


orders = {f.__name__: f for f in (connect, ask, ended, fork, execute, listen, receive, give, close)}
held = socket.socket(fileno=int(sys.argv[1])) if len(sys.argv) > 1 else None
waiting = None
if held:
    print("{}", flush=True)  # the answer to the order execute
for order in sys.stdin:
    order = json.loads(order)
    try:
        answer = orders[order["do"]](order)
    except Exception as e:
        answer = {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(answer), flush=True)
