#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Markdown tables from the benches' JSON, between two marks of a page whose other text stays.

table.py FOLDER             prints them
table.py FOLDER PAGE.md     replaces what stands between the marks of the page
"""

import math
import pathlib
import sys

from records import read_folder

BEGIN, END = "<!-- begin: written by bench/table.py -->", "<!-- end: written by bench/table.py -->"
SHORT = {"float": "float", "bfloat16": "bf16", "float16": "f16"}


def markdown(heading, rows):
    if not rows:
        return "Not measured."
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def number(value, decimals):
    if value is None:
        return ""
    if math.isinf(value):
        return "inf"
    return f"{value:.{decimals}f}"


def at_each(threads, rows, text):
    """text(row) for each thread count, "a / b"; a count without the row is a dash."""
    found = {row.threads: row for row in rows}
    cells = [text(found[t]) if t in found else "-" for t in threads]
    return " / ".join(cells) if any(cell not in ("", "-") for cell in cells) else ""


def counter(name, scale=1.0, decimals=1):
    return lambda row: number(None if row.get(name) is None else row[name] * scale, decimals)


def grouped(rows, *names):
    """Rows with the same fields together, in the order of the files."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return groups


def format_text(base, activations, factors=None):
    text = SHORT[base] if base == activations else f"{SHORT[base]}, x {SHORT[activations]}"
    return text if factors in (None, base) else f"{text}, factors {SHORT[factors]}"


def machine(records):
    first = records.contexts[0]
    caches = ", ".join(f"L{c['level']} {c['size'] // 1024} KiB" for c in first["caches"] if c["type"] != "Instruction")
    rows = [("processor", f"{first['cpu']}, {first['num_cpus']} cores, {caches}"),
            ("date", first["date"][:10]),
            ("build", first["build"]),
            ("rivals", "; ".join(f"{title} {first['rival_' + key]}".strip() for key, title in
                                 (("eigen", "Eigen"), ("openblas", "OpenBLAS:"), ("onednn", "oneDNN"))))]
    for threads in records.threads():
        # The best of the rows' medians: what the machine did at its quietest.
        mine = [row for row in records.rows if row.threads == threads]
        best = [max(row[name] for row in mine) / 1e9 for name in ("limit_flops", "limit_dot_flops", "limit_read", "limit_read_write")]
        rows.append((f"limits, {threads} thread{'s' if threads > 1 else ''}",
                     f"{best[0]:.0f} GFLOP/s float multiply-add, "
                     + (f"{best[1]:.0f} GFLOP/s dot products of bfloat16, " if best[1] > best[0] else "")
                     + f"{best[2]:.1f} GB/s read, {best[3]:.1f} GB/s read and "
                     "written in place"))
    return markdown(("", ""), rows)


def base_products(records, threads):
    groups = grouped(records.select("base"), "stored", "base", "activations", "layer", "tokens")
    rows = []
    for (stored, base, activations, layer, tokens), same in groups.items():
        onednn = "speedup_vs_onednn" if stored == "panels" else "speedup_vs_onednn_plain"
        rows.append([stored, format_text(base, activations), layer, str(tokens),
                     at_each(threads, same, lambda row: number(row.us, 0)),
                     at_each(threads, same, counter("share", 100, 0)),
                     at_each(threads, same, counter(onednn, 1, 2)),
                     at_each(threads, same, counter("speedup_vs_openblas", 1, 2)),
                     at_each(threads, same, counter("speedup_vs_eigen", 1, 2))])
    return markdown(("stored", "format", "layer", "tokens", "call us", "% of limit", "x oneDNN", "x OpenBLAS", "x Eigen"),
                    rows)


def overhead_text(row):
    return f"{100 * row['overhead']:.1f} ({row['points_above_floor']:+.1f}){'~' if row['inconclusive'] else ''}"


def two_ways(records, threads, kind="two_ways"):
    selected = records.select(kind)
    ranks = sorted({row["rank"] for row in selected})
    rows = []
    groups = grouped(selected, "stored", "base", "activations", "factors", "layer", "adapters", "tokens")
    order = list(grouped(selected, "stored", "base", "activations", "factors", "layer", "adapters"))
    for key, same in sorted(groups.items(), key=lambda group: (order.index(group[0][:-1]), group[0][-1])):
        stored, base, activations, factors, layer, adapters, tokens = key
        by_rank = grouped(same, "rank")
        rows.append([stored, format_text(base, activations, factors), layer, str(adapters), str(tokens)] +
                    [at_each(threads, by_rank.get((rank,), []), overhead_text) for rank in ranks])
    return markdown(["stored", "format", "layer", "adapters", "tokens"] + [f"r = {rank}" for rank in ranks], rows)


def stacked(records, threads):
    rows = [[format_text(*key[:3]), key[3], str(key[4]), f"{key[5]} x {key[6]}",
             at_each(threads, same, counter("over_stacked", 100, 1))]
            for key, same in grouped([row for row in records.select("two_ways") if row["adapters"] > 1], "base", "activations",
                                     "factors", "layer", "tokens", "adapters", "rank").items()]
    return markdown(("format", "layer", "tokens", "adapters x rank", "over one adapter of all ranks, %"), rows)


def merges(records, threads):
    rows = [[SHORT[base], SHORT[factors], layer, str(rank),
             at_each(threads, same, lambda row: number(row.us / 1e3, 2)),
             at_each(threads, same, counter("share", 100, 0)), at_each(threads, same, counter("share_panels", 100, 0)),
             at_each(threads, same, counter("speedup_vs_eigen", 1, 2)),
             at_each(threads, same, counter("speedup_vs_openblas", 1, 2))]
            for (base, factors, layer, rank), same in
            grouped(records.select("merge"), "base", "factors", "layer", "rank").items()]
    return markdown(("base", "factors", "layer", "rank", "merge ms", "% of limit", "panels, %", "x Eigen", "x OpenBLAS"), rows)


def mixed_batches(records, threads):
    rows = [[format_text(base, activations), layer, str(tokens), str(adapters), str(rank),
             at_each(threads, same, lambda row: number(row.us, 0)), at_each(threads, same, overhead_text),
             at_each(threads, same, counter("floor", 100, 1)), at_each(threads, same[:1], counter("floor_bytes", 100, 1))
             if len(threads) == 1 else number(100 * same[0]["floor_bytes"], 1)]
            for (base, activations, layer, tokens, adapters, rank), same in
            grouped(records.select("mixed_batch"), "base", "activations", "layer", "tokens", "adapters", "rank").items()]
    return markdown(("format", "layer", "tokens", "adapters", "rank", "mixed call us", "over base, % (points above floor)", "floor %",
                     "bytes of the adapters, %"), rows)


def break_evens(records, threads):
    def tokens(row):
        return (f"{number(row['tokens'], 0)} ({number(row['tokens_lo'], 0)}...{number(row['tokens_hi'], 0)})")

    rows = [[SHORT[base], layer, str(rank), str(calls),
             at_each(threads, same, lambda row: f"{row['merge_us'] / 1e3:.2f}"),
             at_each(threads, same, lambda row: f"{row['merge_us'] / row['predicted_merge_us']:.2f}"),
             at_each(threads, same, tokens), at_each(threads, same, counter("tokens_predicted", 1, 0)),
             at_each(threads, same, counter("regret", 100, 1))]
            for (base, layer, rank, calls), same in
            grouped(records.select("break_even"), "base", "layer", "rank", "tokens_per_call").items()]
    return markdown(("base", "layer", "rank", "tokens a call", "merge ms", "times predicted", "break-even tokens (95 %)",
                     "predicted", "regret %"), rows)


def rho(row):
    inputs, outputs = map(int, row["layer"].split("x"))
    return row["rank"] * row["adapters"] * (inputs + outputs) / (inputs * outputs)


def is_same_format(row):
    return row["factors"] == row["base"]


# What is promised, which rows it is about, the value of a row, and what it may be: at least (+1) or at most (-1) the bar.
LARGE, SMALL = ("4096x4096", "4096x11008", "11008x4096"), ("768x768", "1024x1024")


def bars(records):
    base, ways, merge = (records.select(kind) for kind in ("base", "two_ways", "merge"))
    panels = [row for row in base if row["stored"] == "panels"]
    one = [row for row in ways if row["stored"] == "panels" and row["adapters"] == 1 and is_same_format(row)]
    mixed = [row for row in records.select("mixed_batch") if row["layer"] == "4096x4096" and row["rank"] == 16]
    large, small = ([row for row in one if row["layer"] in layers] for layers in (LARGE, SMALL))
    rounded = [row for row in records.select("rounded_U") if row["layer"] in LARGE]

    def share(row):
        return 100 * row["share"]

    def share_panels(row):
        return 100 * row["share_panels"]

    def over(row):
        return 100 * row["overhead"]

    def speedup(name, rows):
        return [row for row in rows if row.get(name) is not None], lambda row: row[name]

    def merged(bases, ranks, factors="float"):
        return [row for row in merge if row["base"] in bases and row["rank"] in ranks and row["factors"] == factors]

    def of_tokens(rows, *tokens):
        return [row for row in rows if row["tokens"] in tokens]

    full = [row for row in panels if row["base"] != "float16"]
    yield "merge: % of limit, float, r <= 16", merged(("float",), (8, 16)), share, 75, 1
    yield "merge: % of limit, 16 bits, r = 8", merged(("bfloat16", "float16"), (8,)), share, 70, 1
    yield "merge: % of limit, 16 bits, r = 16", merged(("bfloat16", "float16"), (16,)), share, 80, 1
    yield "merge: % of limit, r >= 64", merged(SHORT, (64, 256)), share, 90, 1
    yield "merge of panels: % of limit, float, r <= 16", merged(("float",), (8, 16)), share_panels, 75, 1
    yield "merge of panels: % of limit, 16 bits, r = 8", merged(("bfloat16", "float16"), (8,)), share_panels, 70, 1
    yield "merge of panels: % of limit, 16 bits, r = 16", merged(("bfloat16", "float16"), (16,)), share_panels, 80, 1
    yield "merge of panels: % of limit, r >= 64", merged(SHORT, (64, 256)), share_panels, 90, 1
    for ranks, bar in (((8,), 70), ((16,), 80), ((64, 256), 90)):
        yield (f"merge, bfloat16 factors: % of limit, r = {' and '.join(map(str, ranks))}",
               merged(("bfloat16",), ranks, "bfloat16"), share, bar, 1)
    for rival in ("eigen", "openblas"):
        yield f"merge: x {rival}", *speedup(f"speedup_vs_{rival}", merge), 1, 1
    yield "merged way, 512 tokens: x oneDNN", *speedup("speedup_vs_onednn", of_tokens(panels, 512)), 0.98, 1
    yield "merged way, 512 tokens: % of limit, float and bfloat16", of_tokens(full, 512), share, 92, 1
    yield ("merged way, 512 tokens: % of limit, float16",
           [row for row in of_tokens(panels, 512) if row["base"] == "float16"], share, 90, 1)
    yield "merged way, 64 tokens: x oneDNN", *speedup("speedup_vs_onednn", of_tokens(panels, 64)), 1.05, 1
    yield "merged way, 64 tokens: % of limit", of_tokens(panels, 64), share, 90, 1
    yield "merged way, 1 to 8 tokens: % of limit", of_tokens(panels, 1, 2, 4, 8), share, 90, 1
    for what, rows in (("mixed, large layers", large), ("mixed, large layers, U in bfloat16", rounded)):
        yield (f"{what}, 1, 64, 512 tokens: points over 1.1 rho", of_tokens(rows, 1, 64, 512),
               lambda row: over(row) - 110 * rho(row), 1, -1)
        yield (f"{what}, 2 to 16 tokens: points over 1.2 rho", of_tokens(rows, 2, 4, 8, 16),
               lambda row: over(row) - 120 * rho(row), 2, -1)
    yield "mixed, 768 and 1024: points over rho", small, lambda row: over(row) - 100 * rho(row), 3, -1
    yield ("two and four adapters over one of all ranks, %", [row for row in ways if row["adapters"] > 1],
           lambda row: 100 * row["over_stacked"], 1, -1)
    for tokens, adapters, most in ((64, 8, 3.5), (64, 64, 12), (64, 0, 0.5), (8, 0, 0.5)):
        yield (f"mixed batch, {tokens} tokens over {adapters} adapters: % over base",
               [row for row in mixed if (row["tokens"], row["adapters"]) == (tokens, adapters)], over, most, -1)
    yield ("mixed batch, 8 tokens over 8 adapters: points over its bytes",
           [row for row in mixed if (row["tokens"], row["adapters"]) == (8, 8)],
           lambda row: over(row) - 100 * row["floor_bytes"], 2, -1)
    yield "advise: regret, %", records.select("break_even"), lambda row: 100 * row["regret"], 10, -1


def name_of(row):
    skipped = ("stored",)
    return " ".join(SHORT.get(v, v) if k in ("base", "activations", "factors", "layer") else f"{k} {v}"
                    for k, v in row.fields.items() if k not in skipped)


def bar_table(records):
    table = []
    for what, rows, value, bar, sign in bars(records):
        if not rows:
            table.append([what, f"{'>=' if sign > 0 else '<='} {bar:g}", "not measured", "", ""])
            continue
        worst = min(rows, key=lambda row: sign * value(row))
        met = sum(sign * value(row) >= sign * bar for row in rows)
        table.append([what, f"{'>=' if sign > 0 else '<='} {bar:g}", f"{met} of {len(rows)}", f"{value(worst):.2f}",
                      f"{name_of(worst)}, {worst.threads} thread{'s' if worst.threads > 1 else ''}"])
    return markdown(("what", "bar", "met by", "worst", "where"), table)


def page(records):
    threads = records.threads()
    of_threads = " / ".join(str(t) for t in threads)
    return "\n\n".join([
        machine(records),
        f"A cell with several figures has them for {of_threads} threads.",
        "## Bars", bar_table(records),
        "## The merged way: base products", base_products(records, threads),
        "## Mixed over merged", "Overhead in %, in brackets the points above the floor; ~ where the 95 % interval is wider "
        "than one point.", two_ways(records, threads),
        "The same with U = s lora_A x rounded to bfloat16 before lora_B multiplies it (`lora::intermediate_format::factors`).",
        two_ways(records, threads, "rounded_U"),
        "## Several adapters against one", stacked(records, threads),
        "## Merging in place", merges(records, threads),
        "## Mixed batches", mixed_batches(records, threads),
        "## Break-even", break_evens(records, threads)])


def main():
    records = read_folder(sys.argv[1])
    text = page(records)
    if len(sys.argv) == 2:
        print(text)
        return
    target = pathlib.Path(sys.argv[2])
    old = target.read_text()
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{target}: no lines '{BEGIN}' and '{END}'")
    target.write_text(old[:old.index(BEGIN) + len(BEGIN)] + "\n\n" + text + "\n\n" + old[old.index(END):])


if __name__ == "__main__":
    main()
