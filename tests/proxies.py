"""A reverse proxy as clusters stand behind: TLS, a path of its own, and a connection that can be cut."""

import asyncio
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import aiohttp
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PATH = "/team/ray"


class Proxy:
    """What stands between a client and a head; `address` is what the client is given.

    Args:
        target: address of the head.
        folder: gets the certificate.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self.target, self.certificate = target, folder / "certificate.pem"
        self._key = folder / "key.pem"
        self._loop = asyncio.new_event_loop()
        self._open: set[web.WebSocketResponse] = set()
        self._is_cut = False
        write_certificate(self.certificate, self._key)

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self._port}{PATH}/"

    def start(self) -> None:
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def cut(self) -> None:
        """End all connections, and take none until `mend`."""
        self._is_cut = True
        asyncio.run_coroutine_threadsafe(self._abort(), self._loop).result()

    def mend(self) -> None:
        self._is_cut = False

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession()
        application = web.Application(client_max_size=2**26)
        application.router.add_route("*", PATH + "/{rest:.*}", self._pass)
        self._runner = web.AppRunner(application, shutdown_timeout=0)
        await self._runner.setup()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self._key)
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _abort(self) -> None:
        for each in self._open:
            transport = each._req.transport if each._req else None
            if transport:
                transport.abort()

    async def _stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        if self._is_cut:
            assert request.transport
            request.transport.abort()
        url = f"{self.target}/{request.match_info['rest']}"
        headers = {"Authorization": request.headers.get("Authorization", "")}
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._pass_log(request, url, headers)
        headers |= {"Content-Type": request.headers.get("Content-Type", "application/octet-stream")}
        body = await request.read()
        async with self._session.request(request.method, url, headers=headers, data=body) as answer:
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

    async def _pass_log(self, request: web.Request, url: str, headers: dict[str, str]) -> web.WebSocketResponse:
        near = web.WebSocketResponse()
        await near.prepare(request)
        self._open.add(near)
        with suppress(aiohttp.ClientError, ConnectionError):
            async with self._session.ws_connect(url, headers=headers) as far:
                async for message in far:
                    await near.send_str(message.data)
            await near.close()
        self._open.discard(near)
        return near


@contextmanager
def proxy_of(target: str, folder: Path) -> Iterator[Proxy]:
    proxy = Proxy(target, folder)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def write_certificate(certificate: Path, key: Path) -> None:
    """A certificate for 127.0.0.1 that is signed by itself."""
    made = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "raydetr test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(made.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(made, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
