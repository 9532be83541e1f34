"""An atlas on this machine's own web server: 127.0.0.1 only, files below one folder only."""

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ADDRESS = "127.0.0.1"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".gz": "application/octet-stream",  # not as a content encoding: the pages unpack it themselves
}
HEADERS = {
    "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class AtlasServer(ThreadingHTTPServer):
    """Serves the files below `folder` on 127.0.0.1 at `port` (0: any free one; see `url`).

    A request by another host name is refused: a foreign page whose name was pointed at this machine (DNS rebinding)
    cannot read the atlas. So is a path that leaves the folder, by `..` or by a link.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = 0):
        self.folder = Path(folder).resolve()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"port: expected a free one, got {port} ({error.strerror}); choose another, or 0"
            ) from error

    @property
    def url(self) -> str:
        """Where the overview is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, str]:
        """The names that it answers to."""
        return f"{ADDRESS}:{self.server_port}", f"localhost:{self.server_port}"

    def file(self, target: str) -> Path | None:
        """The file that the target of a request names, or None."""
        try:
            path = (self.folder / unquote(urlsplit(target).path, errors="strict").lstrip("/")).resolve(strict=True)
        except (OSError, ValueError):
            return None
        if path.is_dir():
            path = path / "index.html"
        return path if path.is_file() and path.is_relative_to(self.folder) else None


class _Handler(BaseHTTPRequestHandler):
    server: AtlasServer
    server_version, sys_version = "sparseclt", ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            self.close_connection = True
            return self.send_error(HTTPStatus.FORBIDDEN, "This server answers to its own address only")
        file = self.server.file(self.path)
        if file is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        content = file.read_bytes()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", TYPES.get(file.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal shows the address only."""
