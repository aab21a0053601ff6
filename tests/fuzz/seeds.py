#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""First inputs for the PEFT target: seeds.py FOLDER. A config, a NUL byte, a safetensors file; one for each kind."""
import json
import pathlib
import struct
import sys


def tensors(shapes, metadata):
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += struct.pack(f"<{size // 4}f", *(0.5 * (k + 1) for k in range(size // 4)))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    p = "base_model.model."
    pair = {p + "m.lora_A.weight": [2, 2], p + "m.lora_B.weight": [2, 2]}
    emb = {p + "e.lora_embedding_A": [2, 3], p + "e.lora_embedding_B": [2, 2]}
    conv = {p + "c.lora_A.weight": [2, 1, 2], p + "c.lora_B.weight": [2, 1, 1]}
    cases = [({}, pair), ({"use_rslora": True, "rank_pattern": {"m": 2}, "alpha_pattern": {"^m": 3.5}}, pair), ({}, emb), ({}, conv),
             ({"use_dora": True}, {**pair, p + "m.lora_magnitude_vector": [2]}), ({"lora_bias": True}, {**pair, p + "m.lora_B.bias": [2]}),
             ({"modules_to_save": ["s"]}, {**pair, p + "s.weight": [1]}), ({"bias": "all"}, {**pair, p + "m.base_layer.bias": [2]}),
             ({"trainable_token_indices": {"e": [1]}}, {**pair, p + "e.token_adapter.trainable_tokens_delta": [1, 2]}),
             ({"kasa_config": {}}, {**pair, p + "m.lora_diag": [2]}), ({"init_lora_weights": "pissa"}, pair),
             ({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["m"]}}, pair), ({"layer_replication": [[0, 1], [0, 1]]}, pair),
             ({"target_parameters": ["m.a", "m.b"]}, {**pair, p + "m.base_layer.lora_A.weight": [2, 2], p + "m.base_layer.lora_B.weight": [2, 2]}),
             ({}, {**pair, p + "m.base_layer.out_proj.lora_A.weight": [2, 2], p + "m.base_layer.out_proj.lora_B.weight": [2, 2]}),
             ({"target_modules": "m|n", "exclude_modules": ["x"], "layers_to_transform": None}, pair),
             ({"target_parameters": ["m.a"], "peft_version": "0.18.1"}, {p + "m.lora_A.weight": [4, 2], p + "m.lora_B.weight": [2, 4]}),
             ({"target_parameters": ["m.a"], "peft_version": "0.21.2", "lora_B_layout": "grouped_by_expert", "unsloth_fused_expert_lora":
               {"lora_A_layout": "grouped_by_expert", "parameters": {"a": {"lora_B_layout": "grouped_by_expert", "num_experts": 2}}}},
              {p + "m.lora_A.weight": [4, 3], p + "m.lora_B.weight": [2, 4]}),
             ({}, {"_orig_mod." + name: shape for name, shape in pair.items()}),
             ({"task_type": "SEQ_CLS"}, {**pair, p + "score.weight": [1], p + "norm.weight": [1]}),
             ({"trainable_token_indices": [1]}, {**pair, p + "e.token_adapter.trainable_tokens_delta": [1, 2],
                                                 p + "e.token_adapter.base_layer.weight": [3, 2]})]
    metadata = {"lora_alpha": "64", "x": json.dumps({"t.peft_type": "LORA", "t.r": 2, "t.lora_alpha": 1})}
    cases = [(config, shapes, {}) for config, shapes in cases] + [({}, pair, metadata)]
    for k, (config, shapes, text_pairs) in enumerate(cases):
        text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}).encode()
        (folder / f"seed{k:02d}").write_bytes(text + b"\0" + tensors(shapes, text_pairs))


main(pathlib.Path(sys.argv[1]))
