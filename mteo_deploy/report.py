"""The report as one self-contained page: no network, no script."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mteo_deploy.verification import Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #ddd }
.ok { color: #176b34 } .failed { color: #a4161a; font-weight: 600 } img { max-width: 100%; image-rendering: pixelated }
"""


def _checks(report: Report) -> str:
    rows = "".join(
        f'<tr><td>{escape(c.name)}</td><td class="{"ok" if c.passed else "failed"}">{"ok" if c.passed else "FAILED"}</td>'
        f"<td>{escape(c.detail)}</td></tr>"
        for c in report.checks
    )
    return f"<table><tr><th>check</th><th></th><th>found</th></tr>{rows}</table>"


def page(*reports: Report, picture: Path | None = None, caption: str = "") -> str:
    """One HTML page with a picture (PNG, embedded) and the checks and latency of each report."""
    parts = []
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<p><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></p><p>{escape(caption)}</p>')
    for report in reports:
        verdict = "verified" if report.passed else "NOT verified"
        where = f"{report.bundle} in {report.engine} on {report.device}, {report.precision}"
        parts.append(f"<h2>{escape(where)}: {verdict}</h2>")
        parts.append(_checks(report))
        parts += [f"<p>{escape(line)}</p>" for line in report.latency_lines()]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mteo-deploy report</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>mteo-deploy report</h1>\n{body}\n</body></html>\n"
    )
