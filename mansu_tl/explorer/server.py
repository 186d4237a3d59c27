"""The explorer in a browser, with its model behind it: a server on this machine alone, for whoever has its token."""

from __future__ import annotations

import hmac
import json
import os
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mansu_tl.errors import MansuError
from mansu_tl.explorer.explorer import Explorer
from mansu_tl.explorer.page_file import render
from mansu_tl.explorer.requests import answered

HOST = "127.0.0.1"
_MOST_BYTES = 100_000  # of a request


class ExplorerServer(ThreadingHTTPServer):
    """Serves one explorer's page and answers what it asks, one request after another.

    Only this machine reaches it (127.0.0.1), and only requests with its random token are answered.

    Args:
        explorer: what is shown.
        port: 0 = any that is free.

    Attributes:
        address: of the page, its token in it.

    Raises:
        MansuError: a port that is taken, or is none.
    """

    daemon_threads = True
    # On Windows it would let two programs listen.
    allow_reuse_address = os.name == "posix"

    def __init__(self, explorer: Explorer, port: int = 0) -> None:
        self.explorer, self.token, self.turn = explorer, secrets.token_urlsafe(24), Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise MansuError(f"explore: port {port} cannot be used ({why}); choose another, or leave it out") from None
        self.address = f"http://{HOST}:{self.server_address[1]}/?token={self.token}"

    def page(self) -> bytes:
        """The page as it is sent."""
        e = self.explorer
        return render(e.results, e.selection, e.depth, {"kind": "http", "token": self.token}).encode()

    def answer(self, body: bytes) -> dict[str, Any]:
        """The answer to a request."""
        try:
            request = json.loads(body)
        except ValueError:
            return {"error": "explorer: the request is no JSON"}
        with self.turn:
            return answered(self.explorer.results, request)


class _Handler(BaseHTTPRequestHandler):
    server: ExplorerServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND)
        elif self._known(parse_qs(parts.query).get("token", [""])[0]):
            self._send(self.server.page(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if self.path != "/answer":
            self._refuse(HTTPStatus.NOT_FOUND)
        elif self._known(self.headers.get("X-Explorer-Token", "")):
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > _MOST_BYTES:
                self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                return
            found = self.server.answer(self.rfile.read(int(length)))
            self._send(json.dumps(found, allow_nan=False).encode(), "application/json")

    def _known(self, token: str) -> bool:
        """Whether the request comes from the page; another site's, under whatever name it reaches this one, does not."""
        port = self.server.server_address[1]
        at_home = self.headers.get("Host", "") in (f"{HOST}:{port}", f"localhost:{port}")
        if at_home and hmac.compare_digest(token.encode(), self.server.token.encode()):
            return True
        self._refuse(HTTPStatus.FORBIDDEN)
        return False

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True
        self.send_error(status)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address holds the token."""
