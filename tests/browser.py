"""A page opened by Chromium, without a network, and asked by its DevTools protocol."""

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PORT_FILE = "DevToolsActivePort"
SECONDS = 60


class Seen(NamedTuple):
    """What a page did."""

    answers: list[Any]
    """Of the expressions, in their order."""
    requested: list[str]
    """Addresses that were asked for, but for those of `data:`."""
    complaints: list[str]
    """Errors of scripts, and what the page's policy has refused."""


def look_at(page: Path, expressions: Sequence[str], width: int = 1200) -> Seen:
    """Open a page and evaluate expressions of JavaScript in it."""
    with _browser(width) as port:
        return asyncio.run(asyncio.wait_for(_ask(port, page.resolve().as_uri(), expressions), SECONDS))


@contextmanager
def _browser(width: int) -> Iterator[int]:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={width},900"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "about:blank"),
        ]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + SECONDS
            file = Path(profile) / PORT_FILE
            while not (file.is_file() and file.read_text().count("\n")):
                assert browser.poll() is None, f"{CHROMIUM} ended with {browser.returncode}"
                assert time.monotonic() < until, f"{CHROMIUM} does not answer"
                time.sleep(0.05)
            yield int(file.read_text().split()[0])
        finally:
            browser.terminate()
            browser.wait(SECONDS)


async def _ask(port: int, address: str, expressions: Sequence[str]) -> Seen:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(entry for entry in await answer.json() if entry["type"] == "page")
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            events: list[dict[str, Any]] = []
            number = 0

            async def call(method: str, **params: Any) -> dict[str, Any]:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": params})
                while True:
                    message = json.loads((await socket.receive()).data)
                    if message.get("id") == number:
                        return dict(message["result"])
                    events.append(message)

            for domain in ("Network", "Page", "Runtime", "Log"):
                await call(f"{domain}.enable")
            await call("Page.navigate", url=address)
            while not any(event["method"] == "Page.loadEventFired" for event in events):
                events.append(json.loads((await socket.receive()).data))
            answers = []
            for expression in expressions:
                result = await call("Runtime.evaluate", expression=expression, returnByValue=True)
                assert "exceptionDetails" not in result, result
                answers.append(result["result"].get("value"))
    return Seen(answers, _requested(events), _complaints(events))


def _requested(events: Sequence[dict[str, Any]]) -> list[str]:
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent if not params["request"]["url"].startswith("data:")]


def _complaints(events: Sequence[dict[str, Any]]) -> list[str]:
    logged = [event["params"]["entry"]["text"] for event in events if event["method"] == "Log.entryAdded"]
    thrown = [str(event["params"]) for event in events if event["method"] == "Runtime.exceptionThrown"]
    return [*logged, *thrown]
