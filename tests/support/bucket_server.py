"""A stand-in for Google Cloud Storage: whole objects over HTTP, on this machine.

It speaks as much of the JSON API as gcsfs, TensorStore and ArrayRecord's reader use. As in the real
one, objects are replaced whole, each write makes a new generation, and a write can be made to
depend on the one it replaces. Nothing can be appended, composed or renamed.
"""

import contextlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


class BucketServer:
    """The server, in a thread of this process until `close`."""

    def __init__(self, *buckets: str):
        """`buckets`: the names of those that are there."""
        self.buckets = set(buckets)
        self.objects: dict[str, tuple[bytes, int]] = {}  # bucket/name: content, generation
        self.writes: list[str] = []  # "put bucket/name" and "delete bucket/name", in order
        self.refused = ""  # a pattern: writes to objects that it finds are forbidden
        self.unavailable = ""  # a pattern: requests whose paths it finds are answered with 503
        self.requests: list[str] = []  # method and path, in order
        self.answer_lost = ""  # of the next write to an object that this pattern finds
        self.not_understood: list[str] = []
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        self.uploads: dict[str, tuple[str, Mapping, bytearray]] = {}  # resumable, unfinished

        class Answer(Handler):
            server_state = self

        self._http = Quiet(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What makes those that ask for a bucket turn to this server, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # ArrayRecord's reader
            "TENSORSTORE_GCS_HTTP_URL": self.url, "NO_GCE_CHECK": "true",
        }

    def close(self) -> None:
        """Ends the server."""
        self._http.shutdown()
        self._http.server_close()

    def names(self, prefix: str) -> list[str]:
        """The objects (bucket/name) whose names begin so, without that beginning."""
        with self.lock:
            return sorted(name[len(prefix):] for name in self.objects if name.startswith(prefix))

    def content(self, name: str) -> bytes:
        """What the object bucket/name holds."""
        with self.lock:
            return self.objects[name][0]

    def put(self, name: str, content: bytes) -> None:
        """Writes an object, as any other client might."""
        with self.lock:
            self.objects[name] = content, next(self.generations)


@contextlib.contextmanager
def serving(bucket: str, patch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """A server of one bucket, for this process and those that it starts."""
    server = BucketServer(bucket)
    for key, value in server.environment().items():
        patch.setenv(key, value)
    yield server
    server.close()
    assert server.not_understood == []


class Quiet(ThreadingHTTPServer):
    """Says nothing of clients that go in the middle of a request, as killed ones do."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Refused(Exception):
    """An answer that is an error: status and reason."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; `server_state` is the BucketServer."""

    server_state: BucketServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the client's delayed ACK
    wbufsize = -1  # head and body in one packet

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._post)

    def do_PUT(self):
        self._answer(self._post)

    def do_DELETE(self):
        self._answer(self._delete)

    def log_message(self, *arguments):
        pass

    def _answer(self, method) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server_state.requests.append(f"{self.command} {unquote(self.path)}")
        try:
            down = self.server_state.unavailable
            if down and re.search(down, self.server_state.requests[-1]):
                raise Refused(503, "the service is not available")
            with self.server_state.lock:
                status, headers, content = method()
        except Refused as refused:
            status, reason = refused.args
            headers = {}
            content = json.dumps({"error": {"code": status, "message": reason}}).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _get(self):
        match [part for part in self.parts if part not in ("download", "storage", "v1")]:
            case ["b", bucket]:
                self._bucket(bucket)
                return _json({"kind": "storage#bucket", "name": bucket})
            case ["b", bucket, "o"]:
                return self._list(self._bucket(bucket))
            case ["b", bucket, "o", *name]:
                return self._read(self._bucket(bucket) + "/".join(name))
        return self._unknown()

    def _list(self, bucket: str):
        prefix, delimiter = (self.query.get(key, "") for key in ("prefix", "delimiter"))
        items, prefixes = [], set()
        for full in sorted(self.server_state.objects):
            name = full.removeprefix(bucket)
            if not full.startswith(bucket + prefix):
                continue
            below, found, _ = name[len(prefix):].partition(delimiter) if delimiter else ("", "", "")
            if found:
                prefixes.add(prefix + below + delimiter)
            else:
                items.append(self._describe(full))
        return _json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _read(self, full: str):
        if full not in self.server_state.objects:
            raise Refused(404, f"No such object: {full}")
        if self.query.get("alt") != "media":
            return _json(self._describe(full))
        content, generation = self.server_state.objects[full]
        headers = {"X-Goog-Generation": str(generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return 200, headers, content
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= stop:
            raise Refused(416, "Range not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, headers, content[start:stop]

    def _post(self):
        match [part for part in self.parts if part not in ("upload", "storage", "v1")]:
            case ["b", bucket, "o"]:
                self._bucket(bucket)
                kind = self.query.get("uploadType")
                if kind == "media":
                    return self._write(f"{bucket}/{self.query['name']}", self.body, self.query)
                if kind == "multipart":
                    boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1]
                    return self._multipart(bucket, boundary.encode())
                if kind == "resumable":
                    number = str(next(self.server_state.generations))
                    full = f"{bucket}/{self.query['name']}"
                    self._check(full, self.query)
                    self.server_state.uploads[number] = full, self.query, bytearray()
                    return 200, {"Location": f"{self.server_state.url}/resume/{number}"}, b""
            case ["resume", number]:
                return self._resume(number)
        return self._unknown()

    def _multipart(self, bucket: str, boundary: bytes):
        _, described, data = self.body.split(b"--" + boundary, 2)
        name = json.loads(described.split(b"\n\n", 1)[1])["name"]
        data = data.split(b"\n\n", 1)[1]
        content = data[: data.rindex(b"\n--" + boundary + b"--")]
        return self._write(f"{bucket}/{name}", content, self.query)

    def _resume(self, number: str):
        full, query, received = self.server_state.uploads[number]
        start, stop, total = re.fullmatch(
            r"bytes (\d+)-(\d+)/(\d+)", self.headers["Content-Range"]).groups()
        assert int(start) == len(received), "a piece that does not follow the last one"
        received += self.body
        if len(received) < int(total):
            return 308, {"Range": f"bytes=0-{stop}"}, b""
        del self.server_state.uploads[number]
        return self._write(full, bytes(received), query)

    def _delete(self):
        match self.parts:
            case ["storage", "v1", "b", bucket, "o", *name]:
                full = self._bucket(bucket) + "/".join(name)
                if full not in self.server_state.objects:
                    raise Refused(404, f"No such object: {full}")
                self._check(full, self.query)
                del self.server_state.objects[full]
                self.server_state.writes.append(f"delete {full}")
                return 204, {}, b""
        return self._unknown()

    def _write(self, full: str, content: bytes, query: Mapping):
        self._check(full, query)
        self.server_state.objects[full] = content, next(self.server_state.generations)
        self.server_state.writes.append(f"put {full}")
        if self.server_state.answer_lost and re.search(self.server_state.answer_lost, full):
            self.server_state.answer_lost = ""
            raise Refused(503, "the write was made, but who asked for it does not hear so")
        return _json(self._describe(full))

    def _check(self, full: str, query: Mapping) -> None:
        """Refuses what is to be refused, or a write whose precondition does not hold."""
        if self.server_state.refused and re.search(self.server_state.refused, full):
            raise Refused(403, "writing there is not allowed")
        wanted = query.get("ifGenerationMatch")
        _, generation = self.server_state.objects.get(full, (b"", 0))
        if wanted is not None and int(wanted) != generation:
            raise Refused(412, "conditionNotMet")

    def _bucket(self, bucket: str) -> str:
        if bucket not in self.server_state.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return bucket + "/"

    def _describe(self, full: str) -> dict[str, str]:
        content, generation = self.server_state.objects[full]
        bucket, _, name = full.partition("/")
        return {"kind": "storage#object", "bucket": bucket, "name": name,
                "size": str(len(content)), "generation": str(generation)}

    def _unknown(self):
        self.server_state.not_understood.append(f"{self.command} {self.path}")
        raise Refused(400, f"not understood: {self.command} {self.path}")


def _json(content: Mapping):
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
