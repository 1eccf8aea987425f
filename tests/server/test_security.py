"""What a stranger must not be able to do: each attempt is refused, or does no harm."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
import zlib
from contextlib import suppress

import pytest

from .process import ServerProcess, start, wait_until

KEY = "a-long-secret"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
EVIL = "https://evil.example"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Return a server with a key, on all addresses, with one allowed page and small limits."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "key").write_text(f"{KEY}\n")
    (folder / "key").chmod(0o600)
    running = start(
        folder,
        *("--host", "0.0.0.0", "--api-key-file", str(folder / "key"), "--max-body", "1MB"),
        *("--allowed-origin", "app://notes", "--allowed-host", "mac.local"),
    )
    yield running
    running.stop()


@pytest.fixture
def keyed(guarded):
    with guarded.client(headers={"Authorization": f"Bearer {KEY}"}) as made:
        yield made


def raw(server: ServerProcess, data: bytes, seconds: float = 30) -> bytes:
    """Send bytes as they are; return everything that comes back until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        received = b""
        with suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
            while chunk := connection.recv(65536):
                received += chunk
        return received


# -- key --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY},
        {"Authorization": "Basic " + KEY},
        {"x-api-key": KEY[:-1]},
        {"x-api-key": b"\xc3\xa9"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json")],
)
def test_without_the_key_there_is_nothing(guarded, headers, method, path):
    with guarded.client() as client:
        reply = client.request(method, path, headers=headers, json=CHAT if method == "POST" else None)
    assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in reply.text


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
def test_the_key_opens(guarded, headers):
    with guarded.client(headers=headers) as client:
        assert client.get("/v1/models").status_code == 200


def test_health_and_page_need_no_key(guarded):
    with guarded.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
        page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]


def test_no_key_is_in_the_log(guarded):
    with guarded.client(headers={"Authorization": "Bearer wrong"}) as client:
        client.get("/v1/models")
    assert KEY not in "".join(guarded.errors) and "wrong" not in "".join(guarded.errors)
    assert KEY not in json.dumps(guarded.ready)


# -- host and origin --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:1234", "localhost.evil.example", "169.254.169.254", ""])
def test_a_foreign_host_is_refused(client, host):
    """DNS rebinding: a page's own name points at 127.0.0.1, and the browser names the page's host."""
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/"), ("GET", "/health")):
        reply = client.request(method, path, headers={"Host": host})
        assert reply.status_code == 403 and reply.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1", "127.0.0.1:1", "[::1]:80", "[::1]"])
def test_names_of_this_machine_are_fine(client, host):
    assert client.get("/health", headers={"Host": host}).status_code == 200


def test_a_name_that_was_allowed(keyed):
    assert keyed.get("/v1/models", headers={"Host": "mac.local:1234"}).status_code == 200
    assert keyed.get("/v1/models", headers={"Host": "pc.local:1234"}).status_code == 403


def test_two_hosts_are_refused(server):
    reply = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert reply.split(b"\r\n")[0].split()[1] in (b"400", b"403")


@pytest.mark.parametrize("origin", [EVIL, "null", "http://localhost:1", "file://", "https://127.0.0.1", "http://[bad"])
def test_a_foreign_page_is_refused(client, server, origin):
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("OPTIONS", "/v1/models")):
        reply = client.request(method, path, headers={"Origin": origin}, json=CHAT if method == "POST" else None)
        assert reply.status_code == 403 and reply.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in reply.headers
    reply = client.post("/v1/chat/completions", headers={"Origin": origin, "content-type": "text/plain"}, content="{}")
    assert reply.status_code == 403


def test_the_own_page_may_ask(client, server):
    assert client.get("/v1/models", headers={"Origin": server.url}).status_code == 200


def test_a_page_that_was_allowed(keyed, guarded):
    reply = keyed.get("/v1/models", headers={"Origin": "app://notes"})
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "app://notes"
    with guarded.client() as client:  # a browser asks first, without the key
        asked = client.options(
            "/v1/chat/completions", headers={"Origin": "app://notes", "Access-Control-Request-Method": "POST"}
        )
    assert asked.status_code == 200 and "authorization" in asked.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in asked.headers


def test_no_cors_without_being_asked(client):
    assert not [name for name in client.get("/v1/models").headers if name.startswith("access-control")]


# -- size and time ----------------------------------------------------------------------------------------------------


def test_a_body_that_says_it_is_too_large(client):
    reply = client.post(
        "/v1/chat/completions", content=b" " * (65 * 2**20), headers={"content-type": "application/json"}
    )
    assert reply.status_code == 413 and "67,108,864" in reply.json()["error"]["message"]


def test_a_body_that_does_not_say_how_large_it_is(keyed):
    reply = keyed.post("/v1/chat/completions", content=(b" " * 100_000 for _ in range(20)))
    assert reply.status_code == 413
    assert keyed.post("/v1/messages", content=b" " * 1_000_001).json()["type"] == "error"  # in the path's dialect


@pytest.mark.parametrize("depth", [70, 5_000, 200_000])
@pytest.mark.parametrize("place", ['{"messages": %s}', '{"messages": [], "x": %s}', '{"messages": [], "tools": [%s]}'])
def test_deep_json(client, depth, place):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        body = place % (opening * depth + "1" + closing * depth)
        reply = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400, reply.text


@pytest.mark.slow
def test_a_slow_head_is_not_waited_for(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        began = time.monotonic()
        try:
            for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"a" * 1000:
                connection.sendall(bytes([byte]))
                time.sleep(0.25)
                if time.monotonic() - began > 40:
                    break
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert 5 < time.monotonic() - began < 30


@pytest.mark.slow
def test_a_silent_connection_is_closed(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection, suppress(ConnectionResetError):
        assert connection.recv(1) == b""


def test_a_flood_of_headers(server):
    flood = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 100) for number in range(2000))
    reply = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + flood + b"\r\n", 20)
    assert reply == b"" or reply.split()[1] == b"400"
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_an_error_in_http_itself(server):
    assert raw(server, b"\x16\x03\x01 hello\r\n\r\n", 20).split()[1] == b"400"


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/web/../app.py",
        "/web/..%2fapp.py",
        "/web/%2e%2e/%2e%2e/config.py",
        "/web/..%5capp.py",
        "/../../../../etc/passwd",
        "/web//etc/passwd",
        "/web/index.html%00.js",
        "/app.py",
    ],
)
def test_no_path_leads_out_of_the_page(server, path):
    reply = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert reply.split()[1] in (b"404", b"400"), reply[:200]
    assert b"root:" not in reply and b"import" not in reply


# -- media ------------------------------------------------------------------------------------------------------------


def with_image(url):
    return {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:1/x.png",
        "http://10.0.0.1/x.png",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "~/.ssh/id_rsa",
        "ftp://example.com/x",
        "gopher://127.0.0.1:70/x",
        "",
        "data:image/png;base64,!!!",
        "data:image/png,plain",
        "data:;base64," + "QUJD",
    ],
)
def test_addresses_in_messages_open_nothing(client, url):
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": url},
        {"type": "input_image", "image_url": url},
        {"type": "video_url", "video_url": {"url": url}},
    ):
        reply = client.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": [part]}]})
        assert reply.status_code == 400 and "root:" not in reply.text, reply.text


def bomb(width: int, height: int) -> str:
    """Return a PNG that says it is huge and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_a_picture_of_100_megapixels(client):
    began = time.monotonic()
    reply = client.post("/v1/chat/completions", json=with_image(bomb(10_000, 10_000)))
    assert reply.status_code == 400 and "too large" in reply.json()["error"]["message"]
    assert time.monotonic() - began < 30


def test_no_prompt_in_the_log(server, client):
    secret = "my-very-private-words"
    body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}
    client.post("/v1/chat/completions?secret=" + secret, json=body)
    client.post("/v1/chat/completions", json={**body, "temperature": secret})
    client.get("/" + secret)
    wait_until(lambda: sum(line.get("event") == "request" for line in server.log()) >= 3)
    assert secret not in "".join(server.errors)


# -- the command ------------------------------------------------------------------------------------------------------


def test_other_machines_need_a_key(run_program):
    done = run_program("-m", "mlx_diffusiongemma.server", "--model", "tiny", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2 and done.stderr.startswith(b"error: --host 0.0.0.0: other machines could use")


def test_a_key_that_others_may_read(run_program, tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY)
    os.chmod(key, 0o644)
    done = run_program("-m", "mlx_diffusiongemma.server", "--model", "tiny", "--api-key-file", str(key))
    assert done.returncode == 2 and b"expected mode 600" in done.stderr
