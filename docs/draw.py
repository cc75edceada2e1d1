"""Draws docs/pipeline.svg: the two stages, and the windows of an 81-frame clip as the planner cuts them.

Run `python docs/draw.py`; a test checks that the committed picture is what this draws.
"""

from pathlib import Path

from swifti2v import plan_segments

TARGET = Path(__file__).with_name("pipeline.svg")
INK, SOFT, PAPER = "#1f2328", "#59636e", "#ffffff"
KINDS = {"anchor": "#f2b84b", "context": "#7fb8e6", "noisy": "#e2725b", "rest": "#eceff2"}
CELL, GAP, LEFT, TOP = 30, 4, 150, 210
BOXES = (
    ("image", "+ prompt", "#f2b84b"),
    ("Stage I", "14B, 640x352", "#c9d7c3"),
    ("reference", "upsampled x4", "#dfe5ea"),
    ("Stage II", "5B, 2560x1408", "#c9d7c3"),
    ("decode", "12 frames each", "#dfe5ea"),
)


def text(
    x: float, y: float, words: str, size: int = 13, fill: str = INK, anchor: str = "middle", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{words}</text>'


def flow(width: float) -> list[str]:
    """The boxes of the pipeline with arrows between them."""
    parts, box, space = [], 146, (width - 40 - 146 * len(BOXES)) / (len(BOXES) - 1)
    for index, (title, note, colour) in enumerate(BOXES):
        x = 20 + index * (box + space)
        parts.append(f'<rect x="{x:g}" y="56" width="{box}" height="64" rx="8" fill="{colour}"/>')
        parts += [text(x + box / 2, 84, title, 15, bold=True), text(x + box / 2, 105, note, 12, SOFT)]
        if index:
            parts.append(
                f'<path d="M{x - space + 3:g} 88 H{x - 7:g}" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
    return parts


def windows(blocks: int) -> list[str]:
    """One row per segment; every cell is a latent block."""
    parts = []
    for row, segment in enumerate(plan_segments(blocks)):
        y = TOP + row * (CELL + GAP)
        parts.append(text(LEFT - 14, y + CELL / 2 + 4, f"segment {row + 1}", 13, SOFT, "end"))
        for block in range(blocks):
            kind = "noisy" if block in segment.noisy else "context" if block in segment.context else "rest"
            kind = "anchor" if block == segment.anchor else kind
            x = LEFT + block * (CELL + GAP)
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="4" fill="{KINDS[kind]}"/>')
            if kind != "rest":
                parts.append(text(x + CELL / 2, y + CELL / 2 + 4, str(block), 12, PAPER if kind == "noisy" else INK))
    return parts


def legend(y: float) -> list[str]:
    notes = {"anchor": "the image", "context": "clean neighbour", "noisy": "made in this window"}
    parts, x = [], LEFT
    for kind, note in notes.items():
        parts.append(f'<rect x="{x}" y="{y}" width="16" height="16" rx="3" fill="{KINDS[kind]}"/>')
        parts.append(text(x + 24, y + 13, note, 13, SOFT, "start"))
        x += 150
    return parts


def draw(blocks: int = 21) -> str:
    width = LEFT + blocks * (CELL + GAP) + 20
    rows = len(plan_segments(blocks))
    bottom = TOP + rows * (CELL + GAP) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 34}" '
        'font-family="system-ui, sans-serif">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="5" refY="4" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="100%" height="100%" rx="10" fill="{PAPER}"/>',
        text(20, 34, "One image becomes a 2K clip in two stages", 17, anchor="start", bold=True),
        *flow(width),
        text(
            20, 170, f"Stage II, segment by segment: {blocks} latent blocks, 81 frames", 17, anchor="start", bold=True
        ),
        text(20, 192, "All blocks of a window see each other; memory does not grow with the clip.", 13, SOFT, "start"),
        *windows(blocks),
        *legend(bottom),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
