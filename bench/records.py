# SPDX-License-Identifier: Apache-2.0
"""The benches' JSON files as rows; for table.py, plot.py and rivals/torch_peft.py."""

import json
import pathlib
from dataclasses import dataclass, field


@dataclass
class Row:
    """One row of one program: `fields` from its name (layer, tokens, rank ...), `counters` as the program wrote them."""

    kind: str
    fields: dict
    counters: dict
    us: float
    threads: int

    def __getitem__(self, name):
        """A counter, or a field of the name as a number where it is one."""
        if name in self.fields:
            value = self.fields[name]
            return int(value) if value.isdigit() else value
        return self.counters[name]

    def get(self, name, otherwise=None):
        return self[name] if name in self.fields or name in self.counters else otherwise

    def matches(self, **wanted):
        return all(self.get(name) in (value if isinstance(value, (tuple, list, set)) else (value,))
                   for name, value in wanted.items())


@dataclass
class Records:
    rows: list = field(default_factory=list)
    contexts: list = field(default_factory=list)  # of each file

    def select(self, kind, **wanted):
        return [row for row in self.rows if row.kind == kind and row.matches(**wanted)]

    def threads(self):
        return sorted({row.threads for row in self.rows})


# What Google Benchmark writes for every row; the rest are counters.
STANDARD = {"name", "family_index", "per_family_instance_index", "run_name", "run_type", "repetitions", "repetition_index",
            "threads", "iterations", "real_time", "cpu_time", "time_unit", "label", "aggregate_name", "aggregate_unit",
            "error_occurred", "error_message"}
UNIT = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}


def read_file(path, records):
    content = json.loads(pathlib.Path(path).read_text())
    context = content["context"]
    records.contexts.append(context)
    for entry in content["benchmarks"]:
        if entry["run_type"] != "iteration":
            continue
        if entry.get("error_occurred"):
            raise SystemExit(f"{path}: {entry['name']}: {entry['error_message']}")
        kind, *parts = entry["run_name"].split("/")
        fields = dict(part.split(":") for part in parts if ":" in part and not part.startswith("iterations:"))
        counters = {name: value for name, value in entry.items() if name not in STANDARD}
        records.rows.append(Row(kind, fields, counters, entry["real_time"] * UNIT[entry["time_unit"]],
                                int(context["threads"])))


def read_folder(folder):
    """All PROGRAM.THREADS.json of a folder."""
    records = Records()
    for path in sorted(pathlib.Path(folder).glob("*.[0-9]*.json")):
        read_file(path, records)
    if not records.rows:
        raise SystemExit(f"{folder}: no PROGRAM.THREADS.json with rows; run scripts/bench --record")
    return records
