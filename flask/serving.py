"""What serving a Flask app takes beyond Flask: uploads of slow clients, and a granian whose stops lose no request."""

import io
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from contextlib import suppress

from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, RequestTimeout, ServiceUnavailable
from werkzeug.wsgi import get_content_length

MAX_UPLOAD = 20 * 2**20  # Bytes: photos have 3 to 20 MB.
MAX_DROPPED = 8 * MAX_UPLOAD
MAX_HELD = 8 * MAX_UPLOAD  # By all uploads that a worker holds in memory.
CHUNK = 2**18
UPLOAD_SECONDS = 60  # For a whole upload: 20 MB at 3 Mbit/s.
HEADER_SECONDS = 10  # For the headers of a request, and between two requests of a connection.
LATE_AT_ONCE = 50
CONNECTIONS = 2048  # At most, in each worker; the kernel lets further ones wait.
OTHER_FILES = 256  # At most, beside the connections.
ESTABLISHED, CLOSE_WAIT = 1, 8  # States of a connection, in struct tcp_info of linux/tcp.h.
DRAIN_SECONDS = 0.5  # How long a stopping worker still accepts connections.
CLOSE_SECONDS = 0.2  # How long granian may then take to close its listener.
STOP_SECONDS = 6  # How long it then waits for uploads that are under way.
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

draining, closed = threading.Event(), threading.Event()  # In a worker that stops: it does, and its listener is closed.


def receive_upload(environ):
    """Put the whole upload, in memory, in the place of a request's stream; HTTPException for a late or cut one."""
    stream, length = environ["wsgi.input"], get_content_length(environ)
    upload = environ["wsgi.input"] = Upload()
    if length or "HTTP_TRANSFER_ENCODING" in environ:
        began = time.monotonic()
        size = upload.receive(stream, length)
        if time.monotonic() - began > UPLOAD_SECONDS:
            raise RequestTimeout(f"the upload took more than {UPLOAD_SECONDS} seconds: send it again")
        if size < (length or 0) or (length is None and client_stopped_sending(environ)):
            raise BadRequest("the upload was cut short: send it again")


class Upload(io.BytesIO):
    """An upload in memory, until it is closed. Together they may hold MAX_HELD bytes."""

    held_by_all, lock = 0, threading.Lock()

    def receive(self, stream, length):
        """Read `length` bytes, or all there is for None, and return how many; HTTPException when they are too many.

        What is too much is read on and dropped, up to MAX_DROPPED: most clients hear no answer before they have sent
        all.
        """
        size, most, fits = 0, MAX_DROPPED if length is None else min(length, MAX_DROPPED), True
        while size < most and (chunk := stream.read(min(CHUNK, most - size))):
            size += len(chunk)
            fits = fits and size <= MAX_UPLOAD and self.hold(len(chunk))
            if fits:
                self.write(chunk)
            else:
                self.close()
        if size > MAX_UPLOAD or (length or 0) > MAX_UPLOAD:
            raise RequestEntityTooLarge
        if not fits:
            raise ServiceUnavailable("too many uploads come at once: send it again in a moment")
        self.seek(0)
        return size

    def hold(self, more):
        """Count so many bytes more, and return True, unless they are too many."""
        with Upload.lock:
            fits = Upload.held_by_all + more <= MAX_HELD
            Upload.held_by_all += more if fits else 0
        return fits

    def close(self):
        if not self.closed:
            self.hold(-self.seek(0, io.SEEK_END))
        super().close()


def finish(environ, response):
    """Let the upload leave memory, and close the connection where a part of it was left unread, or the worker stops.

    A stopping worker answers after it has closed its listener: a client that waits begins no connection, nor a request
    on an idle one, that would be lost then.
    """
    environ["wsgi.input"].close()
    if draining.is_set():
        closed.wait()
    if draining.is_set() or response.status_code in (408, 413, 503):
        response.headers["Connection"] = "close"


def free_address(host, port):
    """Return the IP address of `host`; OSError or UnicodeError where there is none, or its port is taken.

    Workers share the port, so granian would also share it with a server that is there already.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # A server that has just stopped is no obstacle.
        listener.bind(address)
    return address[0]


def serve(load_app, refresh, address, port, workers):
    """Serve what load_app() returns in each worker, until SIGTERM or Ctrl-C; SIGHUP renews the workers.

    refresh() is called once a second in each worker.
    """
    # A signal that comes between a worker's birth and its own handlers would be lost. Blocked, it waits for sigwait().
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = min(CONNECTIONS, most_files - OTHER_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (connections + OTHER_FILES, most_files))  # The usual limit is 1024.
    server = Granian(
        __name__,
        address,
        port,
        interface=Interfaces.WSGI,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_SECONDS * 1000),
        workers=workers,
        backpressure=connections,
        blocking_threads=connections,  # granian makes them when it needs them: no request waits for another's upload.
        websockets=False,
        respawn_failed_workers=True,
        workers_kill_timeout=STOP_SECONDS + 2,
    )
    logging.getLogger("_granian").addFilter(lambda record: "Python threads" not in record.msg)  # It warns of so many.
    server.on_startup(threading.Thread(target=pass_signals_on, daemon=True).start)
    # The workers' metrics; in memory where the system has a folder for that, as a read-only container does, too.
    with tempfile.TemporaryDirectory(
        prefix=f"flask-{os.getpid()}-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as shared:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
        server.serve(target_loader=lambda: load_worker(server, load_app, refresh), wrap_loader=False)


def pass_signals_on():
    """In the main process, call granian's handlers."""
    while number := signal.sigwait(SIGNALS):
        signal.getsignal(number)(number, None)


def load_worker(server, load_app, refresh):
    cpus = sorted(os.sched_getaffinity(0))
    if server.workers == len(cpus):
        # On one CPU, threads that hand Python's lock to each other answer up to 1.5 times as many requests as on two.
        # granian tells a worker no number, but forks it while its list lacks this one.
        number = min(set(range(server.workers)) - {worker.idx for worker in server.wrks})
        os.sched_setaffinity(0, {cpus[number]})
    app = load_app()
    inherited = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=watch, args=[refresh, server.bind_port, inherited], daemon=True).start()
    return app


def watch(refresh, port, inherited):
    """In a worker, end late uploads; at SIGTERM or the main process's death drain, have granian stop, and leave."""
    parent = multiprocessing.parent_process().pid
    while os.getppid() == parent:
        received = signal.sigtimedwait([signal.SIGTERM], 1)
        # After a pause, as of a laptop or a container, CPython gives what is no signal: memory that nobody has set.
        if received and received.si_signo == signal.SIGTERM:
            break
        end_late_uploads(port)
        refresh()
    if os.getppid() != parent:
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
    draining.set()
    time.sleep(DRAIN_SECONDS)
    while (handler := signal.getsignal(signal.SIGTERM)) is inherited:  # granian is not that far yet.
        time.sleep(0.1)
    handler(signal.SIGTERM, None)
    time.sleep(CLOSE_SECONDS)
    closed.set()
    time.sleep(STOP_SECONDS)
    os._exit(0)  # A stalled upload would keep granian waiting, and the port taken.


def end_late_uploads(port):
    """Shut the incoming side of connections on which no answer went out for too long; what reads there finds the end.

    granian itself waits for an upload as long as its client does, and tells nobody which connection is whose. One pass
    ends LATE_AT_ONCE of them: each is answered, and others wait meanwhile.
    """
    ended = 0
    for connection, _, state, milliseconds_since_sent in open_connections(port):
        late = milliseconds_since_sent > 1000 * (HEADER_SECONDS + UPLOAD_SECONDS)
        if state == ESTABLISHED and late and ended < LATE_AT_ONCE:
            with suppress(OSError):  # Its client may have left.
                connection.shutdown(socket.SHUT_RD)
                ended += 1


def client_stopped_sending(environ):
    """Tell whether a request's client, or another of its address, has shut the side on which it sends.

    granian's stream ends alike after the last chunk and where a client stops before it.
    """
    return any(
        client == environ["REMOTE_ADDR"] and state == CLOSE_WAIT
        for _, client, state, _ in open_connections(int(environ["SERVER_PORT"]))
    )


def open_connections(port):
    """Yield this worker's connections with their client's address, state, and milliseconds since they last sent."""
    for number in os.listdir("/proc/self/fd"):
        # It may have been closed since it was listed.
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as connection:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 48)
                if connection.getsockname()[1] == port:
                    yield connection, connection.getpeername()[0], *struct.unpack("=B43xI", information)
