"""Byte ranges by the light client: one connection a thread, and fsspec where a plain GET is not enough."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator

import pytest

from dualenc.data.shards.remote import NoRanges, ReadFailed, fetch_bytes

CONTENT = bytes(range(256)) * 8


class Server(http.server.BaseHTTPRequestHandler):
    """/plain answers ranges, /moved leads there, /whole ignores the range, /short breaks off, /no is refused."""

    protocol_version = "HTTP/1.1"
    connections: set[tuple[str, int]]
    asked: list[str]

    def do_GET(self) -> None:
        self.connections.add(self.client_address)
        self.asked.append(self.path)
        first, last = map(int, re.findall(r"\d+", self.headers.get("Range", "bytes=0-2047")))
        body = {"/whole": CONTENT, "/short": CONTENT[first:last]}.get(self.path, CONTENT[first : last + 1])
        status = {"/moved": 302, "/whole": 200, "/no": 503, "/gone": 404}.get(self.path, 206)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/plain")
        body = body if status in (200, 206) else b""
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    Server.connections, Server.asked = set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_ranges_over_one_connection(url: str) -> None:
    assert [fetch_bytes(f"{url}/plain", 0, i, i + 99) for i in range(20)] == [CONTENT[i : i + 99] for i in range(20)]
    assert len(Server.connections) == 1


@pytest.mark.parametrize(
    ("path", "error"),
    [("/whole", NoRanges), ("/gone", FileNotFoundError), ("/no", ReadFailed), ("/short", ReadFailed)],
)
def test_what_is_no_range(url: str, path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        fetch_bytes(url + path, 0, 5, 50)
    assert fetch_bytes(f"{url}/plain", 0, 5, 50) == CONTENT[5:50]


def test_a_redirect_is_followed_and_remembered(url: str) -> None:
    assert [fetch_bytes(f"{url}/moved", 0, 5, 50) for _ in range(2)] == [CONTENT[5:50]] * 2
    assert Server.asked == ["/moved", *["/moved", "/plain"] * 2]
