"""The page: HTML, style, script and packed data in one file that needs no server and no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from mosaic_fast.report.collect import RunData, pack

_SCRIPTS = ("dom", "data", "charts", "overview", "list", "trajectory", "group", "main")


def render_page(runs: Sequence[RunData]) -> str:
    """One HTML file of one or two runs.

    Nothing of a run is written as HTML: all of it is packed (see `pack`), and the script puts it into the
    document as text. The policy of the page allows this very script and style, and nothing from anywhere.
    """
    assets = files("mosaic_fast.report").joinpath("assets")
    style = assets.joinpath("page.css").read_text(encoding="utf-8")
    pieces = [assets.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(pieces) + "\n})();\n"
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    blocks = [_block("index", pack([run.index for run in runs]))]
    for number, run in enumerate(runs):
        blocks += [_block(f"chunk-{number}-{i}", chunk) for i, chunk in enumerate(run.chunks)]
    html = assets.joinpath("page.html").read_text(encoding="utf-8")
    for name, text in {"POLICY": policy, "STYLE": style, "DATA": "\n".join(blocks), "SCRIPT": script}.items():
        html = html.replace(f"{{{{{name}}}}}", text)
    return html


def _block(name: str, packed: str) -> str:
    return f'<script type="application/octet-stream" id="{name}">{packed}</script>'


def _hash(text: str) -> str:
    """The source expression by which a content security policy knows an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
