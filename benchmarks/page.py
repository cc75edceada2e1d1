"""One HTML page that holds everything: tables, gates, frames side by side. No other file is needed to read it."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..engine.errors import MediaError
from ..runtime.image import part_of, reason
from .quality import Panel, Report
from .quality_text import ABLATION_HEADER, HEADER, ablation_cells, metric_cells

WIDEST = 512  # pixels of a frame on the page
CROP = (160, 120)  # of the 1:1 crop, width and height
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1700px;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .8rem;text-align:left;border-bottom:1px solid #ddd}
td:nth-child(n+2){font-variant-numeric:tabular-nums}.PASS{color:#0a7a2f;font-weight:600}.miss{color:#b00020;
font-weight:600}.frames td{padding:2px 6px;border:0;vertical-align:top;font-size:13px}img{display:block;max-width:100%}
img.crop{image-rendering:pixelated;margin-top:4px}.scroll{overflow-x:auto}
"""


def write_page(path: Path, title: str, facts: Sequence[str], report: Report) -> None:
    """Write the page whole or not at all. Raises MediaError where that fails."""
    part = part_of(path)
    try:
        part.write_text(render(title, facts, report), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise MediaError(f"page {path}: got '{reason(error)}', want a writable file; check the folder") from error
    finally:
        part.unlink(missing_ok=True)


def render(title: str, facts: Sequence[str], report: Report) -> str:
    """The page as HTML; every text is escaped."""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
        "".join(f"<p>{escape(fact)}</p>" for fact in facts),
        _table(HEADER, [metric_cells(result) for result in report.results]),
    ]
    if report.footage:
        parts += ["<h2>Footage</h2>", _table(HEADER, [metric_cells(result) for result in report.footage])]
    if report.ablations:
        parts += ["<h2>Ablations</h2>", _table(ABLATION_HEADER, [ablation_cells(item) for item in report.ablations])]
    parts.append("<h2>Frames</h2><p>Below each frame, its centre at 1:1.</p>")
    parts += [_panel(panel) for panel in report.panels]
    parts.append("<h2>How it is measured</h2>" + "".join(f"<p>{escape(note)}</p>" for note in report.notes))
    return "\n".join([*parts, "</body></html>\n"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    mark = next((word for word in ("PASS", "miss") if text.startswith(word)), "")
    return f'<td class="{mark}">{escape(text)}</td>' if mark else f"<td>{escape(text)}</td>"


def _panel(panel: Panel) -> str:
    rows = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in panel.columns)}</tr>"]
    for frames in zip(*panel.columns.values(), strict=True):
        cells = (f"<td>frame {t}{_picture(frame)}</td>" for t, frame in frames)
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<h3>{escape(panel.title)}</h3><div class="scroll"><table class="frames">{"".join(rows)}</table></div>'


def _picture(frame: np.ndarray) -> str:
    """The frame as JPEG, at most WIDEST wide, and its centre as PNG, pixel by pixel."""
    image = Image.fromarray(frame)
    width, height = min(CROP[0], image.width), min(CROP[1], image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    crop = image.crop((left, top, left + width, top + height))
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    crop_tag = f'<img class="crop" alt="centre" width="{width}" height="{height}" src="{_data_uri(crop, "PNG")}">'
    return f'<img alt="frame" src="{_data_uri(image, "JPEG")}">{crop_tag}'


def _data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
