"""The one address before the proxies of docker-compose.yml."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

PATH = Path(__file__).parents[3] / "deploy/compose/door.py"
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


@pytest.fixture(scope="module")
def door():
    spec = importlib.util.spec_from_file_location("sentinel_compose_door", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def named(monkeypatch):
    """The addresses that the name `proxies` has, as the engine's DNS would tell them."""
    addresses: list[str] = []
    real = asyncio.BaseEventLoop.getaddrinfo

    async def getaddrinfo(loop, host, port, **options):
        if host != "proxies":
            return await real(loop, host, port, **options)
        if not addresses:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return addresses


@asynccontextmanager
async def backend(host, port=0):
    """A server that says who it is and then repeats what it hears until the other side has ended."""

    async def serve(reader, writer):
        writer.write(f"{host}\n".encode())
        while chunk := await reader.read(1024):
            writer.write(chunk)
        writer.write(b"bye")
        writer.close()

    server = await asyncio.start_server(serve, host, port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def open_door(door, port):
    opened = door.Door("proxies", port)
    server = await asyncio.start_server(opened.welcome, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], opened
    finally:
        server.close()
        await opened.drain(5)


async def ask(port, said=b""):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return answer


async def test_connections_go_to_all_proxies_in_turn(door, named):
    async with backend(HOSTS[0]) as port, backend(HOSTS[1], port), backend(HOSTS[2], port):
        named += HOSTS
        async with open_door(door, port) as (at, _):
            heard = [(await ask(at)).split(b"\n")[0].decode() for _ in range(6)]
    assert heard == [*HOSTS, *HOSTS]


async def test_bytes_pass_as_they_are_and_each_side_may_end_first(door, named):
    async with backend(HOSTS[0]) as port:
        named += HOSTS[:1]
        async with open_door(door, port) as (at, _):
            said = bytes(range(256)) * 2000
            assert await ask(at, said) == b"127.0.0.1\n" + said + b"bye"


async def test_a_proxy_that_does_not_listen_is_passed_over(door, named):
    async with backend(HOSTS[1]) as port:
        named += HOSTS
        async with open_door(door, port) as (at, _):
            heard = {(await ask(at)).split(b"\n")[0] for _ in range(4)}
    assert heard == {b"127.0.0.2"}


async def test_a_proxy_that_comes_later_is_found(door, named):
    async with backend(HOSTS[0]) as port, open_door(door, port) as (at, _):
        assert await ask(at) == b""
        named += HOSTS[:1]
        assert await ask(at) == b"127.0.0.1\nbye"


async def test_draining_waits_for_what_is_open(door, named):
    async with backend(HOSTS[0]) as port:
        named += HOSTS[:1]
        async with open_door(door, port) as (at, opened):
            reader, writer = await asyncio.open_connection("127.0.0.1", at)
            assert await reader.readline() == b"127.0.0.1\n"
            draining = asyncio.create_task(opened.drain(10))
            writer.write(b"still here")
            assert await reader.readexactly(10) == b"still here"
            assert not draining.done()
            writer.write_eof()
            assert await reader.read() == b"bye"
            writer.close()
            await asyncio.wait_for(draining, 5)
