"""The server as a process of its own: hostile clients, TLS, renewed certificates."""

import contextlib
import datetime
import http.client
import json
import re
import resource
import select
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from creatify_exporter.server import parse_listen_address
from tests.support.commands import run
from tests.support.webhost import ROOT, Host, answer_of, hosting, hosting_command, read_all
from tests.test_webauth import HASHES, basic

pytestmark = pytest.mark.process

BUSY = 0.25  # seconds; an answer takes milliseconds, but a machine may have other things to do
MEMORY = 150 * 1024 * 1024


class Authority:
    """A certificate authority, and the files a server needs from it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(directory / "ca.pem")
        self.settings = {"cert_file": str(directory / "cert.pem"), "key_file": str(directory / "key.pem")}
        self.renew()

    def renew(self) -> int:
        """Write a new certificate over the old one, and return its serial number."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        issued.private_key_pem.write_to_path(self.directory / "key.pem")
        issued.cert_chain_pems[0].write_to_path(self.directory / "cert.pem")
        return x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes()).serial_number

    def client(self, certificate: "trustme.LeafCert | None" = None) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if certificate:
            certificate.configure_cert(context)
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Run two servers for all tests that leave them as they are, one of them for users alone."""
    limits = {"header_timeout": 2}
    with hosting(limits=limits, lines=1) as plain, hosting(limits=limits, lines=1, users=HASHES) as closed:
        yield [plain, closed]


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Authority, Host]]:
    """Run one server with TLS for all tests that leave it as it is."""
    authority = Authority(tmp_path_factory.mktemp("tls"))
    with hosting(tls=authority.settings) as host:
        yield authority, host


def serial_of(host: Host, context: ssl.SSLContext) -> int:
    with host.connect(context) as one:
        assert isinstance(one, ssl.SSLSocket)
        der = one.getpeercert(binary_form=True)
        assert der
        return x509.load_der_x509_certificate(der).serial_number


def until_served(host: Host, context: ssl.SSLContext, serial: int) -> None:
    """Wait until new connections meet the certificate `serial`; one that met the former server may be cut off."""

    def is_served() -> bool:
        with contextlib.suppress(OSError):
            return all(serial_of(host, context) == serial for _ in range(5))
        return False

    until(is_served, 3)


def until(true: Callable[[], bool], deadline: float) -> None:
    """Wait until `true()` is; fail after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not true():
        assert time.monotonic() < end, "not in time"
        select.select([], [], [], 0.05)


class TestListening:
    @pytest.mark.parametrize(
        ("text", "address"),
        [
            (":9877", ("", 9877)),
            (":0", ("", 0)),
            ("localhost:80", ("localhost", 80)),
            ("10.0.0.1:65535", ("10.0.0.1", 65535)),
            ("my-host_1.example:1", ("my-host_1.example", 1)),
            ("[::1]:9877", ("::1", 9877)),
            ("[::ffff:10.0.0.1]:1", ("::ffff:10.0.0.1", 1)),
        ],
    )
    def test_an_address_has_three_forms(self, text: str, address: tuple[str, int]) -> None:
        assert parse_listen_address(text) == address

    @pytest.mark.parametrize(
        "text",
        [
            *("", ":", "9877", "host", "host:", ":65536", ":-1", ":+1", ": 1", ":http", ":٣", ":1\n"),
            *("::1:80", "[::1]", "[a]:1", "[]:1", "[::1:1", "[::1]:1\n", "a b:1", "a/b:1", "http://a:1", "user@host:1"),
        ],
    )
    def test_any_other_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="must be :PORT, HOST:PORT or"):
            parse_listen_address(text)

    def test_all_interfaces_are_ipv6_and_ipv4(self) -> None:
        with hosting(listen=":0") as host:
            assert host.url == f"http://localhost:{host.port}/"
            for address in ["127.0.0.1", *(["::1"] if host.host == "::" else [])]:
                with socket.create_connection((address, host.port), 10) as one:
                    one.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
                    assert answer_of(read_all(one)) == (200, b"healthy\n")
            assert host.end() == 0

    @pytest.mark.parametrize("listen", ["127.0.0.1", "", "localhost"])
    def test_an_address_in_use_is_an_error_of_one_line(self, hosts: list[Host], listen: str) -> None:
        address = f"{listen}:{hosts[0].port}"
        second = run(*hosting_command(listen=address), cwd=ROOT)
        assert second.returncode == 1
        assert second.stderr == f"--web.listen-address: cannot listen on {address}: address already in use\n"

    @pytest.mark.parametrize("listen", ["192.0.2.1:0", "no-such-host.invalid:0"])
    def test_an_address_that_is_not_ours_is_an_error_of_one_line(self, listen: str) -> None:
        ended = run(*hosting_command(listen=listen), cwd=ROOT)
        assert ended.returncode == 1
        assert re.fullmatch(r"--web\.listen-address: cannot listen on .*: [a-z -]+\n", ended.stderr)


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def usual_time(host: Host, context: ssl.SSLContext | None, count: int = 30) -> float:
    """Return the median time of `count` good answers, in seconds."""
    times = []
    for _ in range(count):
        begin = time.monotonic()
        assert host.get("/metrics", context)[0] == 200
        times.append(time.monotonic() - begin)
    return statistics.median(times)


def clients_of(host: Host) -> int:
    """Return how many connections the process holds."""
    return sum(bool(one.raddr) for one in psutil.Process(host.process.pid).net_connections("tcp"))


@contextlib.contextmanager
def reading_a_byte_a_second(readers: Sequence[socket.socket]) -> Iterator[None]:
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(1):
            for one in readers:
                with contextlib.suppress(OSError):
                    one.recv(1)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class TestHostileClients:
    @pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
    def test_idle_half_open_and_slow_clients_neither_delay_an_answer_nor_stay(
        self, encrypted: bool, authority: Authority
    ) -> None:
        context = authority.client() if encrypted else None
        limits = {"header_timeout": 5, "write_timeout": 5}
        with (
            many_files(),
            hosting(tls=authority.settings if encrypted else None, limits=limits, lines=16_000) as host,
            contextlib.ExitStack() as stack,
        ):
            process = psutil.Process(host.process.pid)
            alone = usual_time(host, context)
            # Each answer under way is held once, and each of the 650 clients costs little beside it.
            memory = process.memory_info().rss + 50 * 16_000 * 64 + 650 * 32 * 1024
            for _ in range(300):  # not a byte, for TLS not even of the handshake
                stack.enter_context(host.connect())
            for number in range(300):  # half a request, for TLS half of them half a handshake
                one = stack.enter_context(host.connect(context if number % 2 else None))
                one.sendall(
                    b"GET /metrics HTTP/1.1\r\nHost: a\r\nX-Half" if number % 2 or not encrypted else b"\x16\x03\x01"
                )
            readers = []
            for _ in range(50):
                readers.append(stack.enter_context(host.connect(context, slow=True)))
                readers[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            with reading_a_byte_a_second(readers):
                assert usual_time(host, context) < max(5 * alone, BUSY)
                assert clients_of(host) >= 600
                assert process.memory_info().rss < memory
                until(lambda: clients_of(host) == 0, 30)
                assert process.memory_info().rss < memory
            assert usual_time(host, context) < max(5 * alone, BUSY)

    def test_a_client_that_stops_reading_does_not_hold_up_the_end(self) -> None:
        with hosting(lines=16_000, limits={"write_timeout": 600}, grace=0.5) as host, host.connect(slow=True) as one:
            one.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            assert one.recv(4) == b"HTTP"
            begin = time.monotonic()
            assert host.end() == 0
            assert time.monotonic() - begin < 5

    def test_a_head_that_is_too_large_is_refused(self, hosts: list[Host]) -> None:
        host = hosts[0]
        for request in (
            b"GET /%s HTTP/1.1\r\n\r\n" % (b"a" * 200_000),
            b"GET / HTTP/1.1\r\nA: %s\r\n\r\n" % (b"a" * 200_000),
        ):
            with host.connect() as one:
                with contextlib.suppress(OSError):  # refused before all of it was sent
                    one.sendall(request)
                with contextlib.suppress(ConnectionResetError):
                    assert answer_of(read_all(one))[0] in {400, 414, 431}
        assert psutil.Process(host.process.pid).memory_info().rss < MEMORY

    def test_a_body_is_not_waited_for(self, hosts: list[Host]) -> None:
        with hosts[0].connect() as one:
            one.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\nabc")
            assert answer_of(read_all(one)) == (200, b"healthy\n")


ENDPOINTS = ["/", "/metrics", "/sd", "/-/healthy", "/-/ready", "/-/reload", "/nowhere"]
BYTES = st.binary(max_size=30)
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30).map(lambda text: text.encode("latin-1"))
NAMES = ["Host", "Accept", "Accept-Encoding", "Authorization", "X-Prometheus-Scrape-Timeout-Seconds", "Content-Length"]
NAMES += ["Transfer-Encoding", "Connection", "Upgrade", "Expect", "Range", "Content-Type", "Cookie", "X"]


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Draw a request that is sane in most parts and odd in some."""
    method = draw(st.sampled_from([b"GET", b"HEAD", b"POST", b"PUT", b"OPTIONS", b"CONNECT", b"TRACE"]) | BYTES)
    path = draw(st.sampled_from(ENDPOINTS)).encode()
    escapes = st.sampled_from(
        [b"%", b"%00", b"%ff", b"%zz", b"/..", b"//", b"\xff", b"*", b";", b"#", b"%0d%0aX:1", b"\\"]
    )
    path += b"".join(draw(st.lists(escapes, max_size=2)))
    fields = st.sampled_from([b"workspace=", b"workspace=sales", b"workspace=%ff%00", b"&", b"=", b"a" * 2_000]) | TEXT
    query = b"&".join(draw(st.lists(fields, max_size=3)))
    version = draw(st.sampled_from([b"HTTP/1.1"] * 5 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9"]) | BYTES)
    values = (
        TEXT
        | BYTES
        | st.sampled_from([b"chunked", b"close", b"websocket", b"gzip;q=", b"100-continue", b"-1", b"Basic"])
    )
    headers = draw(st.lists(st.tuples(st.sampled_from(NAMES).map(str.encode) | TEXT, values), max_size=6))
    lines = [
        b"%s %s%s %s" % (method, path, b"?" + query if query else b"", version),
        b"Host: localhost",
        b"Connection: close",
    ]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + draw(BYTES)


class TestOddRequests:
    @settings(deadline=None, max_examples=150)
    @given(requests() | st.binary(max_size=200))
    def test_no_request_is_answered_with_a_500_or_a_trace(self, hosts: list[Host], request: bytes) -> None:
        for host in hosts:
            with host.connect() as one:
                try:
                    one.sendall(request)
                    one.shutdown(socket.SHUT_WR)
                    data = read_all(one)
                except OSError as error:  # it hung up before it had read all that nonsense
                    if isinstance(error, TimeoutError):
                        raise
                    continue
            assert b"Traceback" not in data
            assert not re.match(rb"HTTP/1.. 5", data)
            assert data == b"" or re.match(rb"HTTP/1\.[01] (200|4\d\d) ", data)

    def test_after_all_that_the_answer_is_the_usual_one(self, hosts: list[Host]) -> None:
        assert hosts[0].get("/-/healthy") == (200, b"healthy\n")
        assert hosts[1].get("/-/healthy", headers={"Authorization": basic("ann", "pw")}) == (200, b"healthy\n")


class TestTls:
    def test_only_tls_1_2_and_later_is_spoken(self, secure: tuple[Authority, Host]) -> None:
        authority, host = secure
        for version, wanted in [("TLSv1.2", "TLSv1_2"), ("TLSv1.3", "TLSv1_3")]:
            context = authority.client()
            context.minimum_version = context.maximum_version = ssl.TLSVersion[wanted]
            with host.connect(context) as one:
                assert isinstance(one, ssl.SSLSocket)
                assert one.version() == version
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises(ssl.SSLError, match="alert"):
            host.connect(context)

    def test_the_minimum_can_be_tls_1_3(self, authority: Authority) -> None:
        with hosting(tls=authority.settings | {"min_version": "TLS13"}) as host:
            assert host.get("/-/healthy", authority.client())[0] == 200
            context = authority.client()
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(ssl.SSLError, match="protocol version"):
                host.connect(context)

    def test_a_plain_request_to_a_tls_server_gets_no_answer(self, secure: tuple[Authority, Host]) -> None:
        with secure[1].connect() as one:
            one.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in read_all(one)

    def test_client_certificates_are_required_when_set(self, authority: Authority, tmp_path: Path) -> None:
        clients = trustme.CA()
        clients.cert_pem.write_to_path(tmp_path / "clients.pem")
        required = {"client_ca_file": str(tmp_path / "clients.pem"), "client_auth_type": "RequireAndVerifyClientCert"}
        with hosting(tls=authority.settings | required) as host:
            with_one = authority.client(clients.issue_cert("prometheus"))
            assert host.get("/-/healthy", with_one) == (200, b"healthy\n")
            for context in (authority.client(), authority.client(authority.authority.issue_cert("prometheus"))):
                with pytest.raises(
                    (ssl.SSLError, ConnectionResetError, AssertionError), match=r"(?i)alert|certificate|no answer|reset"
                ):
                    host.get("/-/healthy", context)

    def test_users_are_asked_for_behind_tls(self, authority: Authority) -> None:
        context = authority.client()
        with hosting(tls=authority.settings, users=HASHES) as host:
            assert host.get("/metrics", context)[0] == 401
            assert host.get("/metrics", context, {"Authorization": basic("ann", "wrong")})[0] == 401
            assert host.get("/metrics", context, {"Authorization": basic("ann", "pw")})[0] == 200

    def test_discovery_tells_the_scheme(self, secure: tuple[Authority, Host]) -> None:
        authority, host = secure
        assert host.url.startswith("https://")
        assert json.loads(host.get("/sd", authority.client())[1])[0]["labels"]["__scheme__"] == "https"

    def test_files_that_the_tls_library_refuses_stop_the_start_and_change_nothing_later(
        self, authority: Authority, tmp_path: Path
    ) -> None:
        odd = odd_certificate(tmp_path)
        message = "tls_server_config: the server cannot use these files: it needs a key of type RSA"
        with hosting(tls=authority.settings) as host:
            serial = serial_of(host, authority.client())
            assert host.replace(odd).startswith(message)
            assert serial_of(host, authority.client()) == serial
            assert host.end() == 0
        ended = run(*hosting_command(tls=odd), cwd=ROOT)
        assert ended.returncode == 1
        assert ended.stderr.startswith(message)
        assert ended.stderr.count("\n") == 1


def odd_certificate(directory: Path) -> dict[str, str]:
    """Write a certificate that OpenSSL knows and rustls does not, and return the settings for it."""
    key = ec.generate_private_key(ec.SECP256K1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    (directory / "odd.pem").write_bytes(certificate)
    (directory / "odd-key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return {"cert_file": str(directory / "odd.pem"), "key_file": str(directory / "odd-key.pem")}


class Scraper(threading.Thread):
    """Scrape without a pause, on new connections or on kept ones, and note what fails."""

    def __init__(self, host: Host, context: ssl.SSLContext, keep: bool) -> None:
        super().__init__()
        self.host, self.context, self.keep = host, context, keep
        self.ended = threading.Event()
        self.scrapes = 0
        self.failures: list[str] = []

    def do(self, more: int) -> None:
        """Wait until so many more scrapes were made."""
        enough = self.scrapes + more
        until(lambda: self.scrapes >= enough, 60)

    def run(self) -> None:
        # It connects anew, by itself, after an answer that says `Connection: close`, and only then.
        connection = http.client.HTTPSConnection(self.host.host, self.host.port, context=self.context, timeout=10)
        while not self.ended.wait(0.01):
            try:
                connection.request("GET", "/metrics", headers={} if self.keep else {"Connection": "close"})
                answer = connection.getresponse()
                assert (answer.status, len(answer.read())) == (200, 64_000)
                self.scrapes += 1
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.failures.append(repr(error))
                connection.close()
        connection.close()


class TestRenewedCertificates:
    def test_they_are_served_at_once_and_cost_at_most_one_scrape_each(self, authority: Authority) -> None:
        context = authority.client()
        with hosting(tls=authority.settings, limits={"header_timeout": 2, "write_timeout": 2}) as host:
            process = psutil.Process(host.process.pid)
            usual_time(host, context)
            until(lambda: clients_of(host) == 0, 10)
            files, threads = process.num_fds(), process.num_threads()
            scrapers = [Scraper(host, context, keep) for keep in (True, False, False)]
            for scraper in scrapers:
                scraper.start()
            renewals = 3
            for _ in range(renewals):
                serial = authority.renew()
                assert host.replace(authority.settings) == "replaced"
                until_served(host, context, serial)
                for scraper in scrapers:
                    scraper.do(20)
            for scraper in scrapers:
                scraper.ended.set()
                scraper.join()
            assert all(len(scraper.failures) <= renewals for scraper in scrapers), [one.failures for one in scrapers]
            until(lambda: process.num_fds() <= files and process.num_threads() <= threads, 20)
            assert process.memory_info().rss < MEMORY
            assert host.end() == 0

    def test_unchanged_files_change_nothing(self, secure: tuple[Authority, Host]) -> None:
        authority, host = secure
        with host.connect(authority.client()) as one:
            for _ in range(3):
                assert host.replace(authority.settings) == "replaced"
                one.sendall(b"HEAD /-/healthy HTTP/1.1\r\nHost: a\r\n\r\n")
                head = one.recv(4096)
                assert head.startswith(b"HTTP/1.1 200 OK")
                assert b"connection: close" not in head

    def test_tls_can_be_turned_on_and_off(self, authority: Authority) -> None:
        with hosting() as host:
            assert host.replace(authority.settings) == "replaced"
            until(lambda: healthy(host, authority.client()), 3)
            assert host.replace(None) == "replaced"
            until(lambda: healthy(host, None), 3)

    def test_a_client_that_does_not_read_does_not_hold_up_the_next_renewal(self, authority: Authority) -> None:
        context = authority.client()
        with hosting(tls=authority.settings, lines=16_000, limits={"write_timeout": 600}) as host:
            with host.connect(context, slow=True) as one:
                one.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
                assert one.recv(4) == b"HTTP"
                for _ in range(3):
                    serial = authority.renew()
                    assert host.replace(authority.settings) == "replaced"
                    until_served(host, context, serial)
            assert host.end() == 0


def healthy(host: Host, context: ssl.SSLContext | None) -> bool:
    with contextlib.suppress(OSError, AssertionError):  # it met the former server
        return host.get("/-/healthy", context) == (200, b"healthy\n")
    return False
