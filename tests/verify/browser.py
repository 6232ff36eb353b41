"""A page in a browser without a window (Qt WebEngine, which is Chromium), in a process of its own.

``python browser.py PAGE PICTURE WIDTH HEIGHT SCRIPT`` prints, as JSON, what the script comes to, the seconds until the
page was loaded and laid out, addresses that it asked for besides its own, and what it said on the console; PICTURE is a
PNG of its top.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

HERE = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}


def missing() -> str | None:
    """Why there is no browser here; None if there is one."""
    if not find_spec("PySide6") or not find_spec("PySide6.QtWebEngineCore"):
        return "needs PySide6-WebEngine"
    return None


def main(page: str, picture: str, width: str, height: str, script: str) -> None:
    """Open, ask, paint."""
    os.environ.update(HERE)
    from PySide6.QtCore import QEventLoop, QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    asked: list[str] = []
    said: list[str] = []

    class Watch(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):
            asked.append(info.requestUrl().toString())

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            said.append(message)

    app = QApplication(["browser"])
    watch, view = Watch(), QWebEngineView()
    shown = Page(view)
    shown.profile().setUrlRequestInterceptor(watch)
    view.setPage(shown)
    view.resize(int(width), int(height))
    view.show()

    def wait_for(start) -> object:
        """What a call with a callback is told."""
        loop, told = QEventLoop(), []
        start(lambda value=None: (told.append(value), loop.quit()))
        QTimer.singleShot(60_000, loop.quit)
        if not told:
            loop.exec()
        return told[0] if told else None

    begin = time.perf_counter()
    url = QUrl.fromLocalFile(str(Path(page).resolve()))

    def load(done) -> None:
        view.loadFinished.connect(done)
        view.load(url)

    loaded = wait_for(load)
    wait_for(lambda done: shown.runJavaScript("document.body.getBoundingClientRect().height", 0, done))
    seconds = time.perf_counter() - begin
    found = wait_for(lambda done: shown.runJavaScript(f"JSON.stringify(({script})())", 0, done))
    wait_for(lambda done: QTimer.singleShot(300, done))
    view.grab().save(picture)
    others = [address for address in asked if address != url.toString()]
    print(json.dumps({"loaded": loaded, "seconds": seconds, "asked": others, "said": said, "found": json.loads(found)}))
    app.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
