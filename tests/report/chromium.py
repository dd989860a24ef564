"""A headless Chromium of the system, driven by Playwright."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import TracebackType

from playwright.sync_api import (  # pyrefly: ignore [missing-import]
    ConsoleMessage,
    Dialog,
    sync_playwright,
)

_DEADLINE_S = 60.0  # for one answer; generous, since the machine may be busy


class Chromium:
    """One page of a browser. Everything it says, asks the network for or throws is kept in lists."""

    def __init__(self) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        if program is None:
            raise RuntimeError("chromium is not installed (Debian: apt-get install chromium)")
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        self.page = self._browser.new_page()
        self.page.set_default_timeout(1e3 * _DEADLINE_S)
        self._session = self.page.context.new_cdp_session(self.page)
        self.console: list[str] = []  # errors and warnings of the page
        self.requests: list[str] = []  # addresses the page asked for
        self.dialogs = 0
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", self._asked)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._browser.close()
        self._playwright.stop()

    def open(self, address: str) -> None:
        self.page.goto(address, wait_until="commit")

    def evaluate(self, expression: str) -> object:
        """The JSON value of a JavaScript expression; a promise is waited for.

        Asked of the browser itself: the page's own policy forbids it to evaluate text.
        """
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self._session.send("Runtime.evaluate", {"expression": expression, **options})
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until a JavaScript expression holds."""
        deadline = time.monotonic() + _DEADLINE_S
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never came true: {expression}; console: {self.console}"
            self.page.wait_for_timeout(50)

    def click(self, selector: str) -> None:
        """Click the middle of an element with a real pointer event."""
        place = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        assert isinstance(place, list)
        self.page.mouse.click(place[0], place[1])

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def resize(self, width: int, height: int) -> None:
        self.page.set_viewport_size({"width": width, "height": height})

    def screenshot(self, path: Path) -> None:
        self.page.screenshot(path=path)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.console.append(message.text)

    def _asked(self, dialog: Dialog) -> None:
        self.dialogs += 1
        dialog.accept()
