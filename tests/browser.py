"""A Chromium without a window, driven over WebDriver's HTTP."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
from machine import needs

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
ENTER = "\ue007"


class Browser:
    """One browser; `end` closes it. Skips the test where Chromium or its driver is missing."""

    def __init__(self, profile: Path, language: str = "en") -> None:
        needs("chromium", "chromedriver")
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True
        )
        assert self._driver.stdout
        for line in self._driver.stdout:
            if started := re.search(r"started successfully on port (\d+)", line):
                break
        self._http = requests.Session()
        self._root = f"http://127.0.0.1:{started[1]}"
        flags = [*FLAGS, "--window-size=1280,860", f"--user-data-dir={profile}"]
        chosen = {
            "args": [*flags, f"--lang={language}"],
            "prefs": {"intl.accept_languages": language},
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": chosen}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        told = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._root += f"/session/{told['sessionId']}"

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        response = self._http.request(method, self._root + path, json=body, timeout=60)
        value = response.json()["value"]
        assert response.ok, value
        return value

    def end(self) -> None:
        self._send("DELETE", "")
        self._http.close()
        self._driver.terminate()
        self._driver.wait()
        assert self._driver.stdout
        self._driver.stdout.close()

    def go(self, url: str) -> None:
        self._send("POST", "/url", {"url": url})

    def reload(self) -> None:
        self._send("POST", "/refresh", {})

    def js(self, script: str, *arguments: Any) -> Any:
        body = {"script": script, "args": list(arguments)}
        return self._send("POST", "/execute/sync", body)

    def _find(self, css: str) -> str:
        """The element, once it is there."""
        self.wait(lambda: self.js("return document.querySelector(arguments[0]) !== null", css))
        body = {"using": "css selector", "value": css}
        return str(self._send("POST", "/element", body)[ELEMENT])

    def click(self, css: str) -> None:
        self._send("POST", f"/element/{self._find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        self._send("POST", f"/element/{self._find(css)}/value", {"text": text})

    def text(self, css: str) -> str:
        return str(self.js("return document.querySelector(arguments[0])?.innerText ?? ''", css))

    def texts(self, css: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(x => x.innerText)"
        return list(self.js(script, css))

    def wait(self, condition: Callable[[], Any], seconds: float = 40) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"not within {seconds} s; {self.log()}"
            time.sleep(0.03)
        return found

    def log(self) -> list[str]:
        """What the page said to the console, refusals of its policy among it, since last asked."""
        return [line["message"] for line in self._send("POST", "/se/log", {"type": "browser"})]

    def tab(self) -> str:
        """A new tab, in which all goes on."""
        handle = str(self._send("POST", "/window/new", {"type": "tab"})["handle"])
        self.to(handle)
        return handle

    def to(self, handle: str) -> None:
        self._send("POST", "/window", {"handle": handle})

    @property
    def handle(self) -> str:
        return str(self._send("GET", "/window"))

    def chrome(self, command: str, **settings: Any) -> Any:
        """A command of Chrome's own protocol."""
        return self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": settings})

    def look(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": phone}
        self.chrome("Emulation.setDeviceMetricsOverride", **size)
        self.chrome("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.chrome("Emulation.setEmulatedMedia", features=[scheme])
