#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Loads directories that peft::write wrote into PEFT, and compares the outputs with those of PEFT's own files.

    LORA_WRITTEN=FOLDER build/.../test_golden_peft_files "[write]"     # writes every case of golden/peft-0.21 there
    python3 tests/golden/peft_reload.py GOLDEN FOLDER                  # torch, peft, safetensors, as examples/data/requirements.txt

Prints one line a case; the last line is recorded in docs/peft-agreement.md. Only cases whose model is a graph of linear,
embedding and convolution layers are rebuilt; the other directories are compared as state dicts, which PEFT reads itself.
"""
import json
import pathlib
import sys

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

golden, written = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])


def put(root, path, module):
    for name in path.split(".")[:-1]:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(path.split(".")[-1], module)


class Graph(nn.Module):
    def __init__(self, ops):
        super().__init__()
        self.ops = ops
        for op in ops:
            kind = op["op"]
            extra = {k: tuple(v) if isinstance(v, list) else v for k, v in op.items() if k in ("stride", "padding", "dilation", "groups")}
            kernel = op.get("kernel")
            kernel = tuple(kernel) if isinstance(kernel, list) else kernel
            if kind == "linear":
                put(self, op["module"], nn.Linear(op["in"], op["out"], bias=op.get("bias", True)))
            elif kind == "embedding":
                put(self, op["module"], nn.Embedding(op["num"], op["dim"]))
            elif kind.startswith("conv") and kind != "conv1d_t":
                put(self, op["module"], getattr(nn, "Conv" + kind[4:])(op["in"], op["out"], kernel, **extra))
            elif kind not in ("relu", "tanh", "flatten", "add", "mul", "swap"):
                raise NotImplementedError(kind)

    def forward(self, x):
        v = {"h": x}
        for op in self.ops:
            src = op.get("src", "h")
            args = [v[s] for s in (src if isinstance(src, list) else [src])]
            kind = op["op"]
            if "module" in op:
                out = self.get_submodule(op["module"])(args[0])
            elif kind == "flatten":
                out = args[0].flatten(1)
            else:
                out = {"relu": torch.relu, "tanh": torch.tanh, "add": torch.add, "mul": torch.mul}[kind](*args)
            v[op.get("dst", "h")] = out
        return v["h"]


def output(case, text, directory, x):
    model = Graph(text["graph"])
    base = load_file(golden / case / "base.safetensors")
    model.load_state_dict(base)
    model.to(next(iter(base.values())).dtype)
    model = PeftModel.from_pretrained(model, directory).eval()
    with torch.no_grad():
        return model(x if not x.is_floating_point() else x.to(next(iter(base.values())).dtype))


same = compared = states = 0
for case in sorted(p.name for p in written.iterdir()):
    text = json.loads((golden / case / "case.json").read_text())
    for adapter in sorted(p.name for p in (written / case).iterdir()):
        ours, theirs = written / case / adapter, golden / case / adapter
        a, b = load_file(ours / "adapter_model.safetensors"), load_file(theirs / "adapter_model.safetensors")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), (case, adapter)
        config = PeftConfig.from_pretrained(ours)
        assert isinstance(config, LoraConfig) and config.use_rslora == PeftConfig.from_pretrained(theirs).use_rslora
        states += 1
        try:
            x = load_file(golden / case / "io.safetensors")["x"]
            y, z = output(case, text, ours, x), output(case, text, theirs, x)
        except (NotImplementedError, KeyError, FileNotFoundError):
            continue
        except RuntimeError as failure:  # PEFT's own: a dilated convolution fails in its forward
            try:
                output(case, text, theirs, x)
                raise
            except RuntimeError:
                print(case, adapter, "PEFT fails with its own file too:", str(failure).splitlines()[0])
                continue
        compared += 1
        equal = torch.equal(y, z)
        same += equal
        if not equal:
            print(case, adapter, "differs by", (y - z).abs().max().item())
print(f"{states} directories loaded, tensors equal; {compared} models run, outputs bit for bit equal in {same}")
