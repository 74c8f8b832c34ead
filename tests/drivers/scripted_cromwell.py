"""Servers on loopback that answer as a test tells them to: real sockets, HTTP and TLS, and scripted
answers, because Cromwell itself can't be had here.

The bodies of answers follow its REST API and its source (CromwellApiService,
PartialWorkflowSources, WorkflowStoreSubmitActor).
"""

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import parse_qsl, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VERSION = "/engine/v1/version"
WORKFLOWS = "/api/workflows/v1"
QUERY = f"{WORKFLOWS}/query"
DESCRIBE = "/api/womtool/v1/describe"


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> list[tuple[str, str]]:
        return parse_qsl(urlsplit(self.target).query)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def parts(self) -> dict[str, bytes]:
        """The parts of a form by their names."""
        head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
        form = message_from_bytes(head + self.body)
        found = {}
        for part in form.walk():
            name = part.get_param("name", header="content-disposition")
            if name is not None:
                assert part.get_filename() is None  # Cromwell takes no files
                found[str(name)] = cast(bytes, part.get_payload(decode=True))
        return found


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: Any = field(default_factory=dict)
    """Bytes and strings are sent as they are, anything else as JSON."""
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


def fail(status: int, message: str, word: str = "fail") -> Reply:
    """An error in Cromwell's own shape."""
    return Reply(status, {"status": word, "message": message})


def rejection(status: int, message: str) -> Reply:
    """An error of the HTTP library below Cromwell."""
    return Reply(status, message, "text/plain; charset=UTF-8")


def html(status: int, words: str = "<html><h1>It works!</h1></html>") -> Reply:
    return Reply(status, words, "text/html")


Answers = Callable[[Request], Reply]


class Scripted:
    """An HTTP server that gives the ``answers`` and keeps the ``requests``."""

    def __init__(self, answers: Answers, tls: ssl.SSLContext | None = None) -> None:
        self.answers = answers
        self.requests: list[Request] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                size = int(self.headers.get("Content-Length", 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, self.rfile.read(size))
                scripted.requests.append(request)
                reply = scripted.answers(request)
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.kind)
                self.send_header("Content-Length", str(len(reply.data)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.data)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self.close()

    def close(self) -> None:
        """For one that never began to answer."""
        self._server.server_close()

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]


Behaviour = Callable[[socket.socket], None]


@contextlib.contextmanager
def raw(*behaviours: Behaviour, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL of a server whose first connection is treated by the first of ``behaviours``, and so
    on; by the last one the others are."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def one(connection: socket.socket, behaviour: Behaviour) -> None:
        connection.settimeout(20)
        with contextlib.suppress(OSError), connection:
            if tls:
                connection = tls.wrap_socket(connection, server_side=True)
            with connection:
                behaviour(connection)

    def serve() -> None:
        for number in range(100):
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            behaviour = behaviours[min(number, len(behaviours) - 1)]
            threads.append(threading.Thread(target=one, args=(connection, behaviour)))
            threads[-1].start()

    server = threading.Thread(target=serve)
    server.start()
    scheme = "https" if tls else "http"
    try:
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        server.join()
        for thread in threads:
            thread.join()


def read_request(connection: socket.socket) -> bytes:
    """The whole of a request: its body ends by Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    size = 0
    for line in head.lower().splitlines():
        if line.startswith(b"content-length:"):
            size = int(line.split(b":")[1])
    while len(body) < size:
        body += _more(connection)
    return head + body


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    if not data:
        raise ConnectionError("the client has gone")
    return data


def until_gone(connection: socket.socket) -> None:
    """Wait for the client to hang up."""
    while connection.recv(1 << 16):
        pass


def answer(connection: socket.socket, body: bytes, status: str = "200 OK") -> None:
    read_request(connection)
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


LOOPBACK = x509.IPAddress(ip_address("127.0.0.1"))


def certificate(folder: Path, name: x509.GeneralName = LOOPBACK) -> tuple[Path, ssl.SSLContext]:
    """A self-made certificate for ``name``, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cromwell")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, private)
    return cert, context
