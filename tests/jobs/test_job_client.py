"""jobs/job_client.py: one line for whatever answers in place of a Ray head."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs.job_client import JobClient, LostError, TakenError, address_of
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("https://host/team/ray/", {"RAY_ADDRESS": "http://other:8265"}, "https://host/team/ray"),
        (None, {"RAY_ADDRESS": "head:6379"}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://b:2"),
    ],
)
def test_addresses(given: str | None, environment: dict[str, str], address: str) -> None:
    assert address_of(given, environment) == address


@pytest.mark.parametrize("given", ["head:8265", "ray://head:10001", "http://", "http://head:port", "http://[head"])
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(UserError, match=r"--address .*: must be .* such as http://head:8265"):
        address_of(given, {})


class Server(ThreadingHTTPServer):
    """What a head, or something else, says."""

    answer = (200, "")
    spoils_version = False


class Answers(BaseHTTPRequestHandler):
    """Answers with what the server says; a question for the version rightly, unless that is to be spoiled, too."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        status, text = self.server.answer
        if self.path == "/api/version" and not self.server.spoils_version:
            status, text = 200, json.dumps({"ray_version": "2.60.0"})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_PUT = do_GET  # noqa: N815, the base's names

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def client_of(server: Server) -> JobClient:
    return JobClient(f"http://127.0.0.1:{server.server_port}")


@pytest.mark.parametrize(
    ("status", "text", "kind", "told"),
    [
        (200, "<html>sign in</html>", UserError, "no Ray head"),
        (404, "nothing here", UserError, "no Ray head"),
        (503, "no upstream", LostError, "does not answer"),
        (401, "no token", UserError, "RAY_AUTH_TOKEN_PATH"),
        (403, "wrong token", UserError, "RAY_AUTH_TOKEN_PATH"),
    ],
)
def test_what_answers_is_no_head_for_us(
    server: Server, status: int, text: str, kind: type[UserError], told: str
) -> None:
    server.answer, server.spoils_version = (status, text), True
    with pytest.raises(kind, match=rf"^http://127\.0\.0\.1:\d+: .*{told}"):
        client_of(server)


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("ValueError: Job with submission_id raydetr-a-1 already exists.", TakenError, "raydetr-a-1 already"),
        ("No available agent to submit job, please try again later.", LostError, "no agent for jobs yet"),
        ("Traceback\n  file\nOSError: no space left", UserError, "does not do as asked .*no space left"),
    ],
)
def test_what_a_head_refuses(server: Server, text: str, kind: type[UserError], told: str) -> None:
    client = client_of(server)
    server.answer = (500, text)
    with pytest.raises(kind, match=told):
        client.submit("true", "raydetr-a-1", "gcs://package.zip", {}, {})


def test_the_given_address_is_used_whatever_ray_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    server.answer = (200, "[]")
    assert client_of(server).all() == []
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


def test_nothing_answers() -> None:
    with pytest.raises(LostError, match=r"no Ray answers \(\[Errno 111\] Connection refused\); start a head"):
        JobClient("http://127.0.0.1:1")
