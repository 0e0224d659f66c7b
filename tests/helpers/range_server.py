"""A file server with byte ranges, as object stores have them: ``python range_server.py FOLDER`` prints its port.

Of files in ``whole/`` it sends the whole, as simple servers do.

A process of its own, because GDAL opens files while it holds Python's lock, and would wait for a thread for good.
"""

from __future__ import annotations

import http.server
import sys
from pathlib import Path
from typing import Any


class Handler(http.server.SimpleHTTPRequestHandler):
    def answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content, first, status = path.read_bytes(), 0, 200
        last = len(content) - 1
        ranges = not self.path.startswith("/whole/")
        if (wanted := self.headers.get("Range")) and ranges:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last, status = int(begin), min(int(end or last), last), 206
        self.send_response(status)
        if ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if body:
            self.wfile.write(content[first : last + 1])

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, *_: Any) -> None:
        print(self.command, self.headers.get("Range"), file=sys.stderr, flush=True)


def serve(folder: str) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=folder)) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1])
