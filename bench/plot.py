#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pictures (SVG) from the benches' JSON: plot.py FOLDER OUTPUT_FOLDER

latency.svg     time of a call against its tokens, with the adapter merged and mixed
overhead.svg    mixed over merged against the rank, with the floor

4096 x 4096, packed, one adapter, the most threads that were measured. Below each picture stand the machine and the words.
"""

import math
import pathlib
import re
import sys
from dataclasses import dataclass

from records import read_folder

WAYS = "merged: the adapter is inside W. mixed: it is computed beside W in the same call (PEFT: unmerged)."
COLORS = {"float": "#2a6fb0", "bfloat16": "#c2571a", "floor": "#777777"}
PANEL = dict(stored="panels", layer="4096x4096", adapters=1)
# Factors of the base's format; bfloat16 with bfloat16 activations.
FORMATS = ("float", "bfloat16")


@dataclass
class Line:
    label: str
    points: list  # (x, y), with (x, y, low, high) where there is an interval
    color: str
    dashed: bool = False


class Chart:
    """One pair of axes: x logarithmic with a tick at every value measured, y logarithmic or from zero."""

    WIDTH, HEIGHT = 460, 320
    LEFT, RIGHT, TOP, BOTTOM = 56, 14, 34, 42

    def __init__(self, title, x_title, y_title, lines, log_y):
        self.title, self.x_title, self.y_title, self.lines, self.log_y = title, x_title, y_title, lines, log_y
        self.xs = sorted({point[0] for line in lines for point in line.points})
        ys = [point[1] for line in lines for point in line.points]
        self.tick_step = None if log_y else self.step(max(ys) - min(0, min(ys)))
        if log_y:
            self.low, self.high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
        else:
            self.low = self.tick_step * math.floor(min(0, min(ys)) / self.tick_step)
            self.high = self.tick_step * (1 + math.floor(max(ys) / self.tick_step))

    @staticmethod
    def step(span):
        """A round number that divides the span into about five."""
        power = 10 ** math.floor(math.log10(span / 5))
        return min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs(span / s - 5))

    def ticks(self):
        if self.log_y:
            return [10.0 ** e for e in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]
        return [self.low + self.tick_step * k for k in range(round((self.high - self.low) / self.tick_step) + 1)]

    def x(self, value):
        first, last = math.log(self.xs[0]), math.log(self.xs[-1])
        return self.LEFT + (math.log(value) - first) / (last - first or 1) * (self.WIDTH - self.LEFT - self.RIGHT)

    def y(self, value):
        scale = (lambda v: math.log(v)) if self.log_y else (lambda v: v)
        part = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.HEIGHT - self.BOTTOM - part * (self.HEIGHT - self.TOP - self.BOTTOM)

    def svg(self):
        bottom, right = self.HEIGHT - self.BOTTOM, self.WIDTH - self.RIGHT
        out = [text(self.WIDTH / 2, 16, self.title, "middle", bold=True),
               text((self.LEFT + right) / 2, self.HEIGHT - 8, self.x_title, "middle"),
               f'<g transform="rotate(-90 12 {(self.TOP + bottom) / 2})">'
               f'{text(12, (self.TOP + bottom) / 2, self.y_title, "middle")}</g>']
        for tick in self.ticks():
            out.append(stroke([(self.LEFT, self.y(tick)), (right, self.y(tick))], "#dddddd", 1))
            out.append(text(self.LEFT - 5, self.y(tick) + 4, f"{tick:g}", "end"))
        for tick in self.xs:
            out.append(stroke([(self.x(tick), bottom), (self.x(tick), bottom + 4)], "#555555", 1))
            out.append(text(self.x(tick), bottom + 17, f"{tick:g}", "middle"))
        for k, line in enumerate(self.lines):
            out += self.draw(line)
            y = self.TOP + 8 + 16 * k
            out.append(stroke([(self.LEFT + 10, y), (self.LEFT + 34, y)], line.color, 2, line.dashed))
            out.append(text(self.LEFT + 40, y + 4, line.label, "start"))
        return "\n".join(out)

    def draw(self, line):
        points = [(self.x(point[0]), self.y(point[1])) for point in line.points]
        out = [stroke(points, line.color, 2, line.dashed)]
        if line.color != COLORS["floor"]:
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.color}"/>' for x, y in points]
        for point in line.points:
            if len(point) == 4:
                # The interval, as far as it stays in the picture.
                ends = [min(max(y, self.low), self.high) for y in point[2:]]
                out.append(stroke([(self.x(point[0]), self.y(y)) for y in ends], line.color, 1))
        return out


def text(x, y, content, anchor, bold=False):
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{content}</text>'


def stroke(points, color, width, dashed=False):
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dashes}/>'


def machine(records):
    """What was measured on and when, and the build: two sentences from the programs' context."""
    first = records.contexts[0]
    build = re.sub(r" -.*?,", ",", first["build"].replace(", OpenMP", ""), count=1)  # without flags
    return f"Measured on {first['cpu']}, {first['num_cpus']} cores, {first['date'][:10]}. Build: {build}."


def picture(charts, caption):
    """Charts side by side, on white because the page may be dark, and the lines of the caption below them."""
    width, height = Chart.WIDTH * len(charts), Chart.HEIGHT + 16 * len(caption) + 8
    inner = "\n".join([f'<g transform="translate({Chart.WIDTH * k} 0)">\n{chart.svg()}\n</g>' for k, chart in enumerate(charts)] +
                      [text(12, Chart.HEIGHT + 14 + 16 * k, line, "start") for k, line in enumerate(caption)])
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="12" fill="#222222">\n<rect width="{width}" height="{height}" fill="white"/>\n'
            f"{inner}\n</svg>\n")


def rows_of(records, threads, base, **wanted):
    rows = records.select("two_ways", **PANEL, base=base, activations=base, factors=base, **wanted)
    rows = [row for row in rows if row.threads == threads]
    if len(rows) < 2:
        raise SystemExit(f"plot.py: too few rows for a picture of {base} with {wanted}")
    return rows


def latency(records, threads):
    lines = []
    for base in FORMATS:
        rows = sorted(rows_of(records, threads, base, rank=16), key=lambda row: row["tokens"])
        lines.append(Line(f"{base}, merged", [(row["tokens"], row["merged_us"] / 1e3) for row in rows], COLORS[base]))
        lines.append(Line(f"{base}, mixed, r = 16", [(row["tokens"], row.us / 1e3) for row in rows], COLORS[base], True))
    return Chart(f"4096 x 4096, {threads_text(threads)}", "tokens", "ms a call", lines, log_y=True)


def overhead(records, threads, tokens):
    lines = []
    for base in FORMATS:
        rows = sorted(rows_of(records, threads, base, tokens=tokens), key=lambda row: row["rank"])
        points = [(row["rank"], *(100 * row[name] for name in ("overhead", "overhead_lo", "overhead_hi"))) for row in rows]
        lines.append(Line(base, points, COLORS[base]))
    lines.append(Line("floor", [(row["rank"], 100 * row["floor"]) for row in rows], COLORS["floor"], True))
    return Chart(f"{tokens} token{'s' if tokens > 1 else ''}, 4096 x 4096, {threads_text(threads)}", "rank",
                 "mixed over merged, %", lines, log_y=False)


def halves(sentences):
    """Two lines of two sentences, for a picture of one chart."""
    first, rest = sentences.split(". ", 1)
    return [first + ".", rest]


def threads_text(threads):
    return f"{threads} thread{'s' if threads > 1 else ''}"


def main():
    records = read_folder(sys.argv[1])
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    threads = records.threads()[-1]
    (folder / "latency.svg").write_text(picture(
        [latency(records, threads)],
        [*halves(machine(records)), *halves(WAYS), "r is the adapter's rank. W comes from memory, not from a cache."]))
    (folder / "overhead.svg").write_text(picture(
        [overhead(records, threads, tokens) for tokens in (1, 64)],
        [machine(records), WAYS,
         "floor: what the adapter's FLOPs or bytes, whichever take longer, cost at least: here r (in + out) / (in out). "
         "Bars: 95 % intervals."]))


if __name__ == "__main__":
    main()
