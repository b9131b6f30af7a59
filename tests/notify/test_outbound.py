"""URLs and addresses that may be called or not, over real sockets."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest
import trustme

from serve_app.errors import ConfigError
from serve_app.notify.outbound import ANSWER_BYTES, Outbound, ReceiverRefused, Unreachable
from tests.support.receiver import HANG, Receiver, receiving

LOOPBACK = [ip_network("127.0.0.0/8")]


class Names:
    """A resolver with answers of our choice, each lookup taking the next one while there are several."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): given for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        given = self.answers.get(host)
        if given is None:
            raise OSError("Name or service not known")
        return given.pop(0) if len(given) > 1 else given[0]


# Every way that we know to say "call yourself" or "call your neighbour". PORT listens on loopback, on IPv4 and IPv6.
SPELLED = [
    # IPv4, as it is and in the spellings that inet_aton takes.
    "https://127.0.0.1:PORT/",
    "https://127.0.0.1/",
    "https://127.1.2.3:PORT/",
    "https://127.1:PORT/",
    "https://127.0.1:PORT/",
    "https://0177.0.0.1:PORT/",
    "https://0177.1:PORT/",
    "https://0x7f.0.0.1:PORT/",
    "https://0x7f.1:PORT/",
    "https://0x7F000001:PORT/",
    "https://2130706433:PORT/",
    "https://017700000001:PORT/",
    "https://127.0.0.1.:PORT/",
    "https://127.000.000.001:PORT/",
    "https://0:PORT/",
    "https://0.0.0.0:PORT/",
    "https://0x0:PORT/",
    "https://127.0.0.0x1:PORT/",
    "https://4294967297:PORT/",
    "https://１２７.０.０.１:PORT/",
    "https://①②⑦.⓪.⓪.①:PORT/",
    "https://127。0。0。1:PORT/",
    "https://127%2e0%2e0%2e1:PORT/",
    # Networks of others.
    "https://10.0.0.1/",
    "https://172.16.5.4/",
    "https://192.168.0.1/",
    "https://100.64.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://198.18.0.1/",
    # IPv6.
    "https://[::1]:PORT/",
    "https://[::]:PORT/",
    "https://[0:0:0:0:0:0:0:1]:PORT/",
    "https://[::ffff:127.0.0.1]:PORT/",
    "https://[::ffff:7f00:1]:PORT/",
    "https://[::127.0.0.1]:PORT/",
    "https://[64:ff9b::127.0.0.1]:PORT/",
    "https://[64:ff9b::a9fe:a9fe]/",
    "https://[2002:7f00:1::]:PORT/",
    "https://[2001:0:53aa:64c:0:0:80ff:fffe]/",
    "https://[fe80::1%25lo]:PORT/",
    "https://[fe80::1]:PORT/",
    "https://[fc00::1]/",
    "https://[fd00:ec2::254]/",
    "https://[ff02::1]/",
    "https://[fec0::1]/",
    "https://[::1%2525lo]:PORT/",
    # Schemes, users, ports and texts that parsers disagree on.
    "http://127.0.0.1:PORT/",
    "http://public.test/",
    "ftp://public.test/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:PORT/_x",
    "//127.0.0.1:PORT/",
    "127.0.0.1:PORT",
    "",
    "https://",
    "https:127.0.0.1:PORT",
    "https:///127.0.0.1:PORT/",
    "https://user@127.0.0.1:PORT/",
    "https://public.test@127.0.0.1:PORT/",
    "https://public.test:password@public.test/",
    "https://@public.test/",
    "https://public.test#@127.0.0.1:PORT/",
    "https://public.test\\@127.0.0.1:PORT/",
    "https://127.0.0.1:PORT\\@public.test/",
    "https://public.test:22/",
    "https://public.test:25/",
    "https://public.test:80/",
    "https://public.test:0/",
    "https://public.test:99999/",
    "https://public.test:-1/",
    "https://127.0.0.1:PORT /",
    "https://127.0.0.1\t:PORT/",
    "https://127.0.0.1:PORT/\r\nX-Injected: 1",
    "https://pub\0lic.test/",
    "https://[::1/",
    "https://a..b/",
    "https://" + "a" * 64 + ".test/",
    "https://public.test/" + "a" * 2048,
    # Names.
    "https://localhost:PORT/",
    "https://LOCALHOST:PORT/",
    "https://localhost.:PORT/",
    "https://loopback.test:PORT/",
    "https://both.test:PORT/",
    "https://metadata.test/",
    "https://link-local.test:PORT/",
    "https://mapped.test:PORT/",
    "https://six.test:PORT/",
]


def names() -> Names:
    resolver = Names(
        public_test=[["93.184.216.34"]],
        localhost=[["127.0.0.1", "::1"]],
        loopback_test=[["127.0.0.1"]],
        both_test=[["93.184.216.34", "127.0.0.1"]],
        metadata_test=[["169.254.169.254"]],
        mapped_test=[["::ffff:127.0.0.1"]],
        six_test=[["::1"]],
    )
    resolver.answers["localhost."] = [["127.0.0.1"]]
    resolver.answers["link-local.test"] = [["fe80::1%lo"]]
    return resolver


async def test_hostile_urls_are_refused_and_nothing_is_called() -> None:
    assert len(SPELLED) == len(set(SPELLED)) >= 40
    refused = 0
    async with receiving() as four, receiving("::1", four.port) as six:
        outbound = Outbound(resolve=names(), timeout_s=5)
        for url in SPELLED:
            url = url.replace("PORT", str(four.port))
            with pytest.raises(ReceiverRefused) as error:
                await outbound.post(url, b"{}", {})
            assert "\n" not in str(error.value) and len(str(error.value)) < 250, url
            refused += 1
        assert (four.connections, six.connections) == (0, 0)
    assert refused == len(SPELLED)


async def test_the_systems_own_resolver_leads_nowhere_else() -> None:
    """Whatever getaddrinfo makes of a spelling, nobody on loopback is called."""
    async with receiving() as four, receiving("::1", four.port) as six:
        outbound = Outbound(allow_http=True, timeout_s=5)
        for url in SPELLED:
            if "public.test" in url or ".test" in url:
                continue  # needs a name server
            url = url.replace("PORT", str(four.port)).replace("https://", "http://", 1)
            with pytest.raises((ReceiverRefused, Unreachable)):
                await outbound.post(url, b"{}", {})
        assert (four.connections, six.connections) == (0, 0)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "0177.0.0.1", "0x7f.1", "2130706433", "0", "127.000.000.001", "localhost"),
        *("::1", "::", "::ffff:127.0.0.1", "::ffff:7f00:1"),
    ],
)
async def test_the_second_line_holds_alone(host: str) -> None:
    """Had the text of a URL deceived us, its address would not."""
    async with receiving() as four, receiving("::1", four.port) as six:
        backend = Outbound(timeout_s=5)._backend
        with pytest.raises((ReceiverRefused, Unreachable)):
            await backend.connect_tcp(host, four.port)
        assert (four.connections, six.connections) == (0, 0)


async def test_a_redirect_is_an_answer_and_is_not_followed() -> None:
    async with receiving() as target, receiving() as receiver:
        outbound = Outbound(allow_http=True, networks=LOOPBACK, timeout_s=5)
        for status in (301, 302, 303, 307, 308):
            receiver.answers, receiver.headers = [status], f"Location: {target.url}"
            assert (await outbound.post(receiver.url, b"{}", {})).status == status
        assert (len(receiver.requests), target.connections) == (5, 0)


async def test_a_name_that_changes_its_address_is_called_where_it_was_checked() -> None:
    """Looked up once: the second answer, which must not be called, is only seen by the second request."""
    async with receiving("127.0.0.2") as allowed, receiving("127.0.0.1", allowed.port) as forbidden:
        resolver = Names(rebinding_test=[["127.0.0.2"], ["127.0.0.1"]])
        networks = [ip_network("127.0.0.2/32")]
        outbound = Outbound(allow_http=True, networks=networks, resolve=resolver, timeout_s=5)
        url = f"http://rebinding.test:{allowed.port}/hook?a=1"
        assert (await outbound.post(url, b"{}", {})).status == 204
        assert resolver.asked == ["rebinding.test"]
        with pytest.raises(ReceiverRefused, match=r"address 127\.0\.0\.1"):
            await outbound.post(url, b"{}", {})
        assert (len(allowed.requests), forbidden.connections) == (1, 0)
        assert allowed.requests[0].headers["host"] == f"rebinding.test:{allowed.port}"
        assert allowed.requests[0].target == "/hook?a=1"


async def test_no_proxy_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as proxy, receiving() as receiver:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        outbound = Outbound(allow_http=True, networks=LOOPBACK, timeout_s=5)
        assert (await outbound.post(receiver.url, b"{}", {})).status == 204
        assert proxy.connections == 0


async def test_the_next_address_is_tried() -> None:
    async with receiving("127.0.0.1") as receiver:
        resolver = Names(two_test=[["127.0.0.3", "127.0.0.1"]])
        outbound = Outbound(allow_http=True, networks=LOOPBACK, resolve=resolver, timeout_s=5)
        assert (await outbound.post(f"http://two.test:{receiver.port}/", b"{}", {})).status == 204


async def test_an_answer_is_read_no_further_than_needed() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        try:
            while True:
                writer.write(b"\0a\xff" * 10_000)
                await writer.drain()
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        outbound = Outbound(allow_http=True, networks=LOOPBACK, timeout_s=10)
        answer = await outbound.post(f"http://127.0.0.1:{port}/", b"{}", {})
        assert answer.status == 200 and 0 < len(answer.text) <= ANSWER_BYTES and "\0" not in answer.text


async def test_no_answer() -> None:
    async with receiving() as receiver:
        receiver.answers = [HANG]
        outbound = Outbound(allow_http=True, networks=LOOPBACK, timeout_s=0.2)
        with pytest.raises(Unreachable, match=r"no answer within 0\.2 s"):
            await outbound.post(receiver.url, b"{}", {})
    with pytest.raises(Unreachable):  # nobody listens any more
        await outbound.post(receiver.url, b"{}", {})
    with pytest.raises(Unreachable, match="has no address"):
        await Outbound(resolve=Names()).post("https://unknown.test/", b"{}", {})


async def test_an_answer_in_drips_ends_with_its_time() -> None:
    """A byte now and then satisfies the timeout of each read, but not that of the whole."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(b"H")
                await writer.drain()
                await asyncio.sleep(0.02)
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        outbound = Outbound(allow_http=True, networks=LOOPBACK, timeout_s=0.3)
        with pytest.raises(Unreachable):
            await outbound.post(f"http://127.0.0.1:{port}/", b"{}", {})


async def test_no_http_comes_back() -> None:
    async def smtp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.test ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(smtp, "127.0.0.1", 0)
    async with server:
        outbound = Outbound(allow_http=True, networks=LOOPBACK, timeout_s=5)
        with pytest.raises(Unreachable):
            await outbound.post(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", b"{}", {})


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[trustme.CA, str]]:
    authority = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    yield authority, str(path)


def served(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


async def call(receiver: Receiver, ca_file: str = "") -> int:
    resolver = Names(hook_test=[["127.0.0.1"]])
    outbound = Outbound(networks=LOOPBACK, resolve=resolver, timeout_s=5, ca_file=ca_file)
    return (await outbound.post(f"https://hook.test:{receiver.port}/", b"{}", {})).status


async def test_certificates_are_verified_for_the_name(authority: tuple[trustme.CA, str]) -> None:
    ca, ca_file = authority
    context = served(ca, "hook.test")
    seen: list[str | None] = []
    context.sni_callback = lambda _, name, __: seen.append(name)
    async with receiving(tls=context) as receiver:
        assert await call(receiver, ca_file) == 204
        assert seen == ["hook.test"]
        with pytest.raises(Unreachable, match="certificate verify failed"):
            await call(receiver)  # signed by nobody that the world knows
        assert len(receiver.requests) == 1
    async with receiving(tls=served(ca, "other.test")) as receiver:
        with pytest.raises(Unreachable, match="certificate verify failed"):
            await call(receiver, ca_file)
        assert receiver.requests == []


def test_a_file_of_authorities_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("missing.pem", "empty.pem"):
        with pytest.raises(ConfigError, match=r"webhooks\.ca_file has value"):
            Outbound(ca_file=str(tmp_path / name))
