#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""torch + PEFT on the shapes of the benches, beside our figures:  torch_peft.py FOLDER [--seconds=1]

FOLDER holds the JSON of scripts/bench --record. For every thread count in it, times PEFT's Linear layer in turns: merge, the
forward with the adapter merged, and with it mixed (PEFT: unmerged). Weights rotate over more than twice the last-level cache.
Prints one Markdown table.
Needs torch and peft, which nothing else here does:

    python3 -m venv build/python && build/python/bin/pip install -r bench/rivals/requirements.txt
    build/python/bin/python bench/rivals/torch_peft.py build/bench

It is another process than ours, so unlike the other rivals it is not measured in turns with us: run both on an idle machine.
PEFT's factors have the base's format, as have ours. Takes about ten minutes.
"""

import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from records import read_folder  # noqa: E402

import torch  # noqa: E402
from peft.tuners.lora import LoraConfig  # noqa: E402
from peft.tuners.lora.layer import Linear  # noqa: E402

DTYPES = {"float": torch.float32, "bfloat16": torch.bfloat16}
LAYERS, RANKS, TOKENS = ("4096x4096",), (16, 64, 256), (1, 8, 64, 512)


def make_layer(inputs, outputs, rank, dtype):
    base = torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    layer = Linear(base, "style", config=LoraConfig(r=rank, lora_alpha=2 * rank), r=rank, lora_alpha=2 * rank)
    layer = layer.to(dtype).eval()
    torch.nn.init.normal_(layer.lora_B["style"].weight, std=0.5 / rank**0.5)
    return layer


def pool(inputs, outputs, rank, dtype, cache):
    """Layers that together are more than twice the cache, at least two."""
    size = inputs * outputs * torch.tensor([], dtype=dtype).element_size()
    return [make_layer(inputs, outputs, rank, dtype) for _ in range(max(2, 1 + 2 * cache // size))]


def time_of(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def turns(seconds, layers, x):
    """Median seconds of merge, merged forward and mixed forward; each round takes the next layer through all three."""
    times = {"merge": [], "merged": [], "mixed": []}
    spent = rounds = 0
    while rounds < 5 or (spent < seconds and rounds < 500):
        layer, other = layers[rounds % len(layers)], layers[(rounds + 1) % len(layers)]
        once = {"mixed": time_of(lambda: layer(x)), "merge": time_of(layer.merge)}
        time_of(lambda: other(x))  # passes another weight through the cache
        once["merged"] = time_of(lambda: layer(x))
        layer.unmerge()
        if rounds > 0:  # the first warms up
            for name, value in once.items():
                times[name].append(value)
        spent += sum(once.values())
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def ours_of(records, threads, dtype, layer, rank, tokens):
    """Our merge, merged and mixed calls in seconds, where they were measured."""
    ways = [row for row in records.select("two_ways", stored="panels", base=dtype, activations=dtype, factors=dtype, layer=layer,
                                          rank=rank, tokens=tokens, adapters=1) if row.threads == threads]
    merges = [row for row in records.select("merge", base=dtype, factors=dtype, layer=layer, rank=rank) if row.threads == threads]
    found = {"merge": merges[0].us * 1e-6} if merges else {}
    if ways:
        found |= {"merged": ways[0]["merged_us"] * 1e-6, "mixed": ways[0].us * 1e-6}
    return found


def cells(theirs, ours, name):
    own = ours.get(name)
    return [f"{theirs[name] * 1e3:.2f}", f"{own * 1e3:.2f}" if own else "", f"{theirs[name] / own:.1f}" if own else ""]


def main():
    records = read_folder(sys.argv[1])
    seconds = next((float(a.partition("=")[2]) for a in sys.argv[2:] if a.startswith("--seconds=")), 1.0)
    cache = int(records.contexts[0]["last_level_cache_bytes"])
    print(f"torch {torch.__version__}, {records.contexts[0]['cpu']}\n")
    heading = ["threads", "dtype", "layer", "rank", "tokens"]
    heading += [f"{what}{unit}" for what in ("merge", "merged", "mixed") for unit in (", PEFT ms", ", ours ms", ", x")]
    heading += ["mixed over merged, PEFT %", "ours %"]
    print(f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    with torch.inference_mode():
        for threads in records.threads():
            torch.set_num_threads(threads)
            for dtype, layer, rank in ((d, l, r) for d in DTYPES for l in LAYERS for r in RANKS):
                inputs, outputs = map(int, layer.split("x"))
                layers = pool(inputs, outputs, rank, DTYPES[dtype], cache)
                for tokens in TOKENS:
                    theirs = turns(seconds, layers, torch.randn(tokens, inputs, dtype=DTYPES[dtype]))
                    ours = ours_of(records, threads, dtype, layer, rank, tokens)
                    over = [f"{100 * (way['mixed'] / way['merged'] - 1):.1f}" if "merged" in way else ""
                            for way in (theirs, ours)]
                    row = [str(threads), dtype, layer, str(rank), str(tokens)]
                    for name in ("merge", "merged", "mixed"):
                        row += cells(theirs, ours, name)
                    print(f"| {' | '.join(row + over)} |", flush=True)


if __name__ == "__main__":
    main()
