"""A bar for each takeover, drawn as SVG by hand: no library is needed to look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_COLOURS = ("#b0413e", "#d98e04", "#e3c565", "#8fb339", "#2e8b77", "#3a6ea5", "#7a5c99")
_LEFT, _WIDTH, _BAR, _GAP = 60, 760, 18, 8


def draw(splits: Sequence[Mapping[str, float]], phases: Sequence[str], *, round_s: float) -> str:
    """Return the picture.

    Parameters
    ----------
    splits : sequence of mapping
        Seconds from the kill to each phase.
    phases : sequence of str
        Their order.
    round_s : float
        An undisturbed round, for comparison.
    """
    longest_s = max(max(split.values()) for split in splits)
    scale = _WIDTH / longest_s
    rows: list[str] = []
    for index, split in enumerate(splits):
        y, start_s = 40 + index * (_BAR + _GAP), 0.0
        rows.append(_text(_LEFT - 8, y + 13, f"kill {index + 1}", "end"))
        for phase in sorted(phases, key=split.__getitem__):  # the ServerApp and the clients do not wait for each other
            width, colour = max(split[phase] - start_s, 0.0) * scale, _COLOURS[phases.index(phase)]
            rows.append(
                f'<rect x="{_LEFT + start_s * scale:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}">'
                f"<title>{phase}: {split[phase]:.2f} s</title></rect>"
            )
            start_s = max(start_s, split[phase])
    bottom = 40 + len(splits) * (_BAR + _GAP)
    for second in range(int(longest_s) + 1):
        x = _LEFT + second * scale
        rows.append(f'<line x1="{x:.1f}" y1="34" x2="{x:.1f}" y2="{bottom}" stroke="#999" stroke-width="0.4"/>')
        rows.append(_text(x, bottom + 14, f"{second} s", "middle"))
    for index, (phase, colour) in enumerate(zip(phases, _COLOURS, strict=True)):
        x, y = _LEFT + (index % 4) * 190, bottom + 30 + (index // 4) * 20
        rows.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        rows.append(_text(x + 18, y + 11, phase, "start"))
    title = f"From kill -9 of the leader to the next finished round; an undisturbed round takes {round_s:.1f} s"
    height = bottom + 80
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 30} {height}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        + _text(_LEFT, 20, title, "start")
        + "\n"
        + "\n".join(rows)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222">{text}</text>'
