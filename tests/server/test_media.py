"""Images from web addresses, where the operator allows them: public addresses only, within bounds."""

from __future__ import annotations

import asyncio
import http.server
import socket
import threading
import time

import pytest

from mlx_diffusiongemma.api import media
from mlx_diffusiongemma.api.errors import ApiError
from mlx_diffusiongemma.api.media import RemoteError, fetch, is_public, resolve_media
from mlx_diffusiongemma.api.settings import Settings

REMOTE = Settings(remote_media=True, remote_bytes=1000, remote_seconds=1.0)


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 255.255.255.255 224.0.0.1 240.0.0.1
    198.18.0.1 192.0.2.1 ::1 :: fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
    64:ff9b::7f00:1 2002:7f00:1:: 2001:0:4136:e378:8000:63bf:3fff:fdd2""".split(),
)
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "http or https"),
        ("ftp://example.com/x", "http or https"),
        ("https://", "http or https"),
        ("http://[bad/", "http or https"),
        ("http://example.com:99999/", "http or https"),
        ("http://user:password@example.com/", "without a user name"),
        ("http://127.0.0.1/", "public"),
        ("http://localhost/", "public"),
        ("http://2130706433/", "public"),
        ("http://0x7f.1/", "public"),
        ("http://[::1]/", "public"),
        ("http://[::ffff:169.254.169.254]/", "public"),
        ("http://8.8.8.8:22/", "port 22"),
    ],
)
def test_addresses_that_are_not_fetched(url, message):
    with pytest.raises(RemoteError, match=message):
        fetch(url, 1000, 1.0)


def test_a_name_with_one_private_address(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(RemoteError, match="public"):
        fetch("http://two-faced.example/", 1000, 1.0)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name.startswith("to:"):
            self.send_response(302)
            self.send_header("Location", name.removeprefix("to:"))
            self.end_headers()
            return
        self.send_response(200 if name != "missing" else 404)
        self.end_headers()
        try:
            for _ in range(50 if name == "slow" else 1):
                self.wfile.write(b"x" * {"large": 2000}.get(name, 10))
                time.sleep(0.1 if name == "slow" else 0)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch):
    """Return the address of a site on this machine that counts as public, by the name of public.example."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        real = media.public_address
        monkeypatch.setattr(
            media, "public_address", lambda host, port: "127.0.0.1" if host == "public.example" else real(host, port)
        )
        yield f"http://public.example:{server.server_port}"
        server.shutdown()


def test_content_comes_back(site):
    assert fetch(f"{site}/fine", 1000, 5.0) == b"x" * 10
    assert fetch(f"{site}/to:/fine", 1000, 5.0) == b"x" * 10


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "404"),
        ("large", "at most 1,000 bytes"),
        ("slow", "too long|cannot be fetched"),
        ("to:http://127.0.0.1/", "public|port"),
        ("to:file:///etc/passwd", "http or https"),
        ("to:http://169.254.169.254/", "public"),
    ],
)
def test_content_that_is_refused(site, path, message):
    began = time.monotonic()
    with pytest.raises(RemoteError, match=message):
        fetch(f"{site}/{path}", 1000, 1.0)
    assert time.monotonic() - began < 4


def test_redirections_have_an_end(site):
    with pytest.raises(RemoteError, match="redirections"):
        fetch(f"{site}/to:/to:/to:/to:/to:/fine", 1000, 5.0)


def message(url):
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]}
    ]


def test_messages_get_the_bytes(site):
    [resolved] = asyncio.run(resolve_media(message(f"{site}/fine"), REMOTE))
    assert resolved["content"] == [{"type": "image", "image": b"x" * 10}, {"type": "text", "text": "?"}]


def test_nothing_is_fetched_unless_allowed(site):
    with pytest.raises(ApiError, match="--remote-media") as caught:
        asyncio.run(resolve_media(message(f"{site}/fine"), Settings()))
    assert caught.value.status == 400 and caught.value.param == "messages[0].content[0].image_url"


def test_too_many_addresses(site):
    many = [{"role": "user", "content": message(f"{site}/fine")[0]["content"] * 17}]
    with pytest.raises(ApiError, match="more than 16"):
        asyncio.run(resolve_media(many, REMOTE))


def test_data_urls_stay_as_they_are():
    messages = message("data:image/png;base64,QUJD")
    assert asyncio.run(resolve_media(messages, Settings())) == messages
