#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes the project's own tiny language model, two LoRA adapters for it, and their golden outputs.

The model writes numbers as words, one character per token:

    base                 "42 = " -> "forty two"
    adapter capitals     "42 = " -> "FORTY TWO"
    adapter german       "42 = " -> "zweiundvierzig"
    both, added          "42 = " -> "ZWEIUNDVIERZIG"

Nothing is downloaded: the script writes the text, trains a LlamaForCausalLM on it, trains two PEFT adapters, saves all
three, loads what it saved, and records what transformers and PEFT compute with it, in float32 and in float64.

    pip install -r requirements.txt
    python make.py               # makes everything beside this file
    python make.py --out DIR     # makes everything in DIR
    python make.py --check       # trains nothing: evaluates the saved files again and compares with golden.safetensors
"""

import argparse
import contextlib
import json
import math
import platform
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

# ---------------------------------------------------------------------------------------------------------------------
# What is made
# ---------------------------------------------------------------------------------------------------------------------

SEED = 20
THREADS = 2

BEGIN, END = "<s>", "</s>"
CAPITALS_TAG, GERMAN_TAG = "^", "~"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [BEGIN, END, " ", "=", CAPITALS_TAG, GERMAN_TAG, *"0123456789", *LETTERS, *LETTERS.upper()]
TOKEN_ID = {character: token for token, character in enumerate(VOCABULARY)}

NUMBERS = 10_000  # 0 … 9999
HELD_OUT_SHARE = 0.05  # of the numbers from 100 up; smaller ones are the words all others are made of
LONGEST_TEXT = 64

# Pretraining shows all four styles, chosen by tags in front of the number, so that the model knows each of them; most
# text has no tag and is plain English. The adapters then learn to give a style without its tag.
STYLES = {  # (capitals, german): share of the pretraining text
    (False, False): 0.40,
    (True, False): 0.20,
    (False, True): 0.20,
    (True, True): 0.20,
}

BASE_TRAINING = {"steps": 3000, "batch": 128, "learning_rate": 4e-3, "weight_decay": 0.01}
# The sum of the adapters depends on these much more than each adapter does: rates from 3e-4 to 2e-3 and 150 to 1200
# steps gave 0.99 to 1.00 of the held-out numbers right for one adapter, but 0.85 to 0.998 for both together.
ADAPTER_TRAINING = {"steps": 600, "batch": 64, "learning_rate": 1e-3, "weight_decay": 0.0}

ADAPTERS = {
    # Plain scaling alpha/r = 2.5 in every linear layer.
    "capitals": LoraConfig(
        r=8,
        lora_alpha=20,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    ),
    # Rank-stabilized scaling alpha/sqrt(r), with ranks and alphas that differ from module to module.
    "german": LoraConfig(
        r=6,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"down_proj": 10, "layers.0.self_attn.q_proj": 3},
        alpha_pattern={"layers.3.self_attn.o_proj": 7},
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        task_type="CAUSAL_LM",
    ),
}
ADAPTER_STYLE = {"capitals": (True, False), "german": (False, True)}  # (capitals, german)

STATES = {  # name: [(adapter, weight)]; the effective delta weight is the sum of weight * scaling * B * A
    "base": [],
    "capitals": [("capitals", 1.0)],
    "german": [("german", 1.0)],
    "capitals+german": [("capitals", 1.0), ("german", 1.0)],
    "0.7capitals+0.3german": [("capitals", 0.7), ("german", 0.3)],
    "-0.5capitals": [("capitals", -0.5)],
}
STATE_STYLE = {"base": (False, False), **ADAPTER_STYLE, "capitals+german": (True, True)}
REQUIRED_ACCURACY = {"base": 0.95, "capitals": 0.95, "german": 0.95, "capitals+german": 0.90}  # on held-out numbers

# The golden texts: a number and the style in which its answer follows in `input_ids` (whatever the state).
GOLDEN_TEXTS = [(42, (False, False)), (317, (False, True)), (2026, (True, False)), (7895, (True, True))]
LONGEST_ANSWER = 56  # greedy continuations stop here if no end token came before

# What --check allows: rounding of another CPU or another number of threads, relative to the largest |logit|.
CHECK_TOLERANCE = {"float32": 1e-4, "float64": 1e-12}
NUMPY_TOLERANCE = 1e-12
LEAST_GREEDY_MARGIN = 1e-3  # far above float32 rounding: every evaluation in float32 continues a prompt the same way

# ---------------------------------------------------------------------------------------------------------------------
# The text
# ---------------------------------------------------------------------------------------------------------------------

ENGLISH_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
ENGLISH_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
GERMAN_SMALL = (
    "null ein zwei drei vier fuenf sechs sieben acht neun zehn elf zwoelf dreizehn vierzehn fuenfzehn sechzehn "
    "siebzehn achtzehn neunzehn"
).split()
GERMAN_TENS = "- - zwanzig dreissig vierzig fuenfzig sechzig siebzig achtzig neunzig".split()


def in_english(number):
    """7895 -> seven thousand eight hundred ninety five"""
    words = []
    if number >= 1000:
        words += [ENGLISH_SMALL[number // 1000], "thousand"]
    if number % 1000 >= 100:
        words += [ENGLISH_SMALL[number % 1000 // 100], "hundred"]
    rest = number % 100
    if rest >= 20:
        words += [ENGLISH_TENS[rest // 10]] + ([ENGLISH_SMALL[rest % 10]] if rest % 10 else [])
    elif rest or not words:
        words += [ENGLISH_SMALL[rest]]
    return " ".join(words)


def in_german(number):
    """7895 -> siebentausendachthundertfuenfundneunzig (umlauts and sharp s written in ASCII)"""
    word = ""
    if number >= 1000:
        word += GERMAN_SMALL[number // 1000] + "tausend"
    if number % 1000 >= 100:
        word += GERMAN_SMALL[number % 1000 // 100] + "hundert"
    rest = number % 100
    if rest >= 20:
        word += (GERMAN_SMALL[rest % 10] + "und" if rest % 10 else "") + GERMAN_TENS[rest // 10]
    elif rest == 1:
        word += "eins"  # only "ein" inside a word, "eins" at its end
    elif rest or not word:
        word += GERMAN_SMALL[rest]
    return word


def answer_text(number, style):
    capitals, german = style
    text = in_german(number) if german else in_english(number)
    return text.upper() if capitals else text


def prompt_text(number, tags=(False, False)):
    capitals, german = tags
    return (CAPITALS_TAG if capitals else "") + (GERMAN_TAG if german else "") + f"{number} = "


def encode(text):
    return [TOKEN_ID[character] for character in text]


def decode(tokens):
    """The text of an answer: what comes before the end token."""
    characters = [VOCABULARY[token] for token in tokens]
    return "".join(characters[: characters.index(END)] if END in characters else characters)


def prompt_tokens(number, tags=(False, False)):
    return [TOKEN_ID[BEGIN], *encode(prompt_text(number, tags))]


def answer_tokens(number, style):
    return [*encode(answer_text(number, style)), TOKEN_ID[END]]


def split_numbers():
    """The numbers to train on, and the held-out ones, which no training of base or adapters ever shows."""
    large = list(range(100, NUMBERS))
    random.Random(SEED).shuffle(large)
    held_out = sorted(large[: int(HELD_OUT_SHARE * len(large))])
    return sorted(set(range(NUMBERS)) - set(held_out)), held_out


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def make_base():
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST_TEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=TOKEN_ID[BEGIN],
        eos_token_id=TOKEN_ID[END],
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


class Examples:
    """Random training batches: numbers of each length, in styles and tags drawn by `draw_style`."""

    def __init__(self, numbers, draw_style, seed):
        self.random = random.Random(seed)
        self.draw_style = draw_style
        self.by_length = [[n for n in numbers if len(str(n)) == length] for length in (1, 2, 3, 4)]

    def batch(self, size):
        """input_ids and labels. Only answers are learned; the padding after them is ignored (label -100)."""
        rows = []
        for _ in range(size):
            numbers = self.random.choices(self.by_length, weights=(1, 3, 6, 10))[0]
            number = self.random.choice(numbers)
            tags, style = self.draw_style(self.random)
            rows.append((prompt_tokens(number, tags), answer_tokens(number, style)))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        input_ids = torch.full((size, longest), TOKEN_ID[END])
        labels = torch.full((size, longest), -100)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            input_ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        return input_ids, labels


def train(model, examples, name, *, steps, batch, learning_rate, weight_decay):
    """AdamW, short warm-up, cosine decay. Returns the mean loss of the last 50 steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    warm_up = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    losses = []
    for step in range(steps):
        input_ids, labels = examples.batch(batch)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 200 == 199:
            print(f"  {name}: step {step + 1} of {steps}, loss {np.mean(losses[-50:]):.5f}", flush=True)
    model.eval()
    return float(np.mean(losses[-50:]))


def train_base(numbers):
    torch.manual_seed(SEED)
    styles, shares = list(STYLES), list(STYLES.values())

    def draw_style(source):
        style = source.choices(styles, weights=shares)[0]
        return style, style  # the tags say which style follows

    model = make_base()
    loss = train(model, Examples(numbers, draw_style, SEED), "base", **BASE_TRAINING)
    return model, loss


def train_adapter(name, base_directory, numbers):
    """Teaches the style of one adapter on prompts without tags, where the base writes plain English."""
    torch.manual_seed(SEED + 1 + list(ADAPTERS).index(name))
    style = ADAPTER_STYLE[name]
    base = LlamaForCausalLM.from_pretrained(base_directory)
    model = get_peft_model(base, ADAPTERS[name])
    examples = Examples(numbers, lambda source: ((False, False), style), SEED)
    return model, train(model, examples, name, **ADAPTER_TRAINING)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_json(path, value):
    text = json.dumps(value, indent=2, ensure_ascii=True)
    text = re.sub(r"\[[\d,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # integers side by side
    path.write_text(text + "\n", encoding="ascii")


def save_base(model, directory):
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)  # says nothing that config.json does not say
    write_json(directory / "vocabulary.json", VOCABULARY)


def save_adapter(model, directory):
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # an empty model card
    # PEFT writes the path of the base, which is different on each machine, and a set in arbitrary order.
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = None
    config["target_modules"] = sorted(config["target_modules"])
    write_json(path, config)


def load_model(directory, dtype=torch.float32):
    """The saved base with both saved adapters attached, unmerged."""
    base = LlamaForCausalLM.from_pretrained(directory / "base", dtype=dtype, attn_implementation="eager")
    first, *others = ADAPTERS
    model = PeftModel.from_pretrained(base, directory / "adapters" / first, adapter_name=first)
    for name in others:
        model.load_adapter(directory / "adapters" / name, adapter_name=name)
    return model.to(dtype).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation with PEFT
# ---------------------------------------------------------------------------------------------------------------------


def lora_layers(model):
    """(path of the module in the base, LoRA layer)"""
    prefix = "base_model.model."
    return [(n.removeprefix(prefix), m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]


@contextlib.contextmanager
def in_state(model, terms):
    """Activates the adapters of a state, each with its scaling times its weight, and puts the scalings back."""
    if not terms:
        with model.disable_adapter():
            yield
        return
    model.base_model.set_adapter([adapter for adapter, _ in terms])  # several at once only through the tuner
    before = [(layer, dict(layer.scaling)) for _, layer in lora_layers(model)]
    for layer, scaling in before:
        for adapter, weight in terms:
            if adapter in scaling:
                layer.scaling[adapter] = scaling[adapter] * weight
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)


@torch.no_grad()
def logits_of(model, input_ids):
    """[tokens, vocabulary] for one text, or [texts, tokens, vocabulary] for a list of texts of one length"""
    texts = torch.tensor(input_ids)
    output = model(input_ids=texts.reshape(-1, texts.shape[-1]), use_cache=False).logits
    return output.reshape(*texts.shape, -1)


def greedy(model, prompts):
    """Greedy continuations, up to and including the end token, of prompts of one length; and the smallest margin by
    which a best token won over the second best: what rounding would have to exceed to change the text."""
    texts = [list(prompt) for prompt in prompts]
    answers = [[] for _ in prompts]
    margin = math.inf
    for _ in range(LONGEST_ANSWER):
        unfinished = [i for i, answer in enumerate(answers) if answer[-1:] != [TOKEN_ID[END]]]
        if not unfinished:
            break
        best = logits_of(model, [texts[i] for i in unfinished])[:, -1].topk(2)
        margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
        for i, token in zip(unfinished, best.indices[:, 0].tolist()):
            answers[i].append(token)
            texts[i].append(token)
    return answers, margin


def accuracy(model, numbers, style):
    """The share of numbers whose whole answer is right, and the wrong ones."""
    wrong = []
    for length in sorted({len(str(n)) for n in numbers}):
        group = [n for n in numbers if len(str(n)) == length]
        answers, _ = greedy(model, [prompt_tokens(n) for n in group])
        wrong += [f"{n}: {decode(a)}" for n, a in zip(group, answers) if decode(a) != answer_text(n, style)]
    return 1 - len(wrong) / len(numbers), wrong


def accuracies(model, held_out):
    result = {}
    for state, style in STATE_STYLE.items():
        with in_state(model, STATES[state]):
            result[state], wrong = accuracy(model, held_out, style)
        print(f"  held-out accuracy of {state}: {result[state]:.4f}", *wrong[:4], sep="\n    ", flush=True)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation in float64
# ---------------------------------------------------------------------------------------------------------------------


def rms_norm_float64(self, hidden_states):
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def rotary_float64(self, x, position_ids):
    dim = self.config.hidden_size // self.config.num_attention_heads
    theta = self.config.rope_parameters["rope_theta"]
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = position_ids[..., None].double() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def attention_float64(module, query, key, value, attention_mask, scaling, **_):
    key = modeling_llama.repeat_kv(key, module.num_key_value_groups)
    value = modeling_llama.repeat_kv(value, module.num_key_value_groups)
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling + attention_mask, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class OnlyFloat64(TorchDispatchMode):
    """Fails on the first operation that makes a floating-point tensor of another type."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                assert tensor.dtype == torch.float64, f"{operation} computed in {tensor.dtype}"
        return result


@contextlib.contextmanager
def float64_throughout():
    """transformers computes norms, rotary tables and the softmax in float32 even in a float64 model. Not here."""
    patches = [
        (modeling_llama.LlamaRMSNorm, "forward", rms_norm_float64),
        (modeling_llama.LlamaRotaryEmbedding, "forward", rotary_float64),
        (modeling_llama, "eager_attention_forward", attention_float64),
    ]
    originals = [getattr(owner, name) for owner, name, _ in patches]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)
    try:
        with OnlyFloat64():
            yield
    finally:
        for (owner, name, _), original in zip(patches, originals):
            setattr(owner, name, original)


class NumpyModel:
    """The same model once more, from its files, in plain numpy and float64: it shares no code with transformers or
    PEFT, and it is the shortest description of what a reader of these files has to compute."""

    def __init__(self, directory):
        self.config = json.loads((directory / "base" / "config.json").read_text())
        self.weights = self.read(directory / "base" / "model.safetensors")
        self.adapters = {name: self.read_adapter(directory / "adapters" / name) for name in ADAPTERS}

    @staticmethod
    def read(path):
        return {name: tensor.astype(np.float64) for name, tensor in load_file(path).items()}

    def read_adapter(self, directory):
        """path of the module -> (scaling, A, B)"""
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = self.read(directory / "adapter_model.safetensors")
        result = {}
        for key, lora_A in tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_B = tensors[key.replace(".lora_A.", ".lora_B.")]
            rank = self.for_module(config["rank_pattern"], module, config["r"])
            alpha = self.for_module(config["alpha_pattern"], module, config["lora_alpha"])
            assert lora_A.shape[0] == lora_B.shape[1] == rank
            scaling = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
            result[module] = (scaling, lora_A, lora_B)
        assert 2 * len(result) == len(tensors)
        return result

    @staticmethod
    def for_module(pattern, module, otherwise):
        """The value of the first key that the module's path ends with (in PEFT each key is a regular expression)."""
        return next((value for key, value in pattern.items() if f".{module}".endswith(f".{key}")), otherwise)

    def linear(self, module, x, terms):
        y = x @ self.weights[f"{module}.weight"].T
        for adapter, weight in terms:
            if module in self.adapters[adapter]:
                scaling, lora_A, lora_B = self.adapters[adapter][module]
                y = y + (x @ lora_A.T @ lora_B.T) * (scaling * weight)
        return y

    def norm(self, module, x):
        variance = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(variance + self.config["rms_norm_eps"]) * self.weights[f"{module}.weight"]

    def rotate(self, x):
        """x is [tokens, heads, head_dim]; the two halves of each head are the two coordinates that are rotated."""
        half = x.shape[-1] // 2
        inv_freq = 1.0 / self.config["rope_parameters"]["rope_theta"] ** (np.arange(half) / half)
        angles = (np.arange(len(x))[:, None] * inv_freq)[:, None, :]
        x1, x2 = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((x1 * cos - x2 * sin, x2 * cos + x1 * sin), axis=-1)

    def attention(self, module, x, terms):
        tokens, heads, kv_heads = len(x), self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q = self.rotate(self.linear(f"{module}.q_proj", x, terms).reshape(tokens, heads, -1))
        k = self.rotate(self.linear(f"{module}.k_proj", x, terms).reshape(tokens, kv_heads, -1))
        v = self.linear(f"{module}.v_proj", x, terms).reshape(tokens, kv_heads, -1)
        future = np.triu(np.full((tokens, tokens), -np.inf), 1)
        mixed = np.empty_like(q)
        for head in range(heads):
            shared = head * kv_heads // heads  # grouped-query attention: consecutive heads share keys and values
            scores = q[:, head] @ k[:, shared].T / math.sqrt(q.shape[-1]) + future
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed[:, head] = scores / scores.sum(axis=-1, keepdims=True) @ v[:, shared]
        return self.linear(f"{module}.o_proj", mixed.reshape(tokens, -1), terms)

    def mlp(self, module, x, terms):
        gate = self.linear(f"{module}.gate_proj", x, terms)
        up = self.linear(f"{module}.up_proj", x, terms)
        return self.linear(f"{module}.down_proj", gate / (1 + np.exp(-gate)) * up, terms)

    def logits(self, input_ids, terms):
        x = self.weights["model.embed_tokens.weight"][input_ids]
        for layer in range(self.config["num_hidden_layers"]):
            module = f"model.layers.{layer}"
            x = x + self.attention(f"{module}.self_attn", self.norm(f"{module}.input_layernorm", x), terms)
            x = x + self.mlp(f"{module}.mlp", self.norm(f"{module}.post_attention_layernorm", x), terms)
        return self.linear("lm_head", self.norm("model.norm", x), terms)


# ---------------------------------------------------------------------------------------------------------------------
# Golden outputs
# ---------------------------------------------------------------------------------------------------------------------


def relative_difference(value, reference):
    """The largest difference, relative to the largest reference value."""
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def evaluate(directory):
    """Everything in golden.safetensors, from the saved files alone, and what golden.json says about it."""
    single, double, independent = load_model(directory), load_model(directory, torch.float64), NumpyModel(directory)
    tensors, states = {}, {}
    for k, (number, style) in enumerate(GOLDEN_TEXTS):
        tensors[f"prompt.{k}"] = np.array(prompt_tokens(number))
        tensors[f"input_ids.{k}"] = np.array(prompt_tokens(number) + answer_tokens(number, style))
    for state, terms in STATES.items():
        facts = {"adapters": [list(term) for term in terms], "generated": [], "smallest_greedy_margin": math.inf}
        facts.update(max_abs_logit=0.0, max_abs_float32_minus_float64=0.0, max_relative_numpy_minus_float64=0.0)
        for k in range(len(GOLDEN_TEXTS)):
            input_ids = tensors[f"input_ids.{k}"].tolist()
            with in_state(single, terms):
                logits = logits_of(single, input_ids).numpy()
                (answer,), margin = greedy(single, [tensors[f"prompt.{k}"].tolist()])
                assert margin > LEAST_GREEDY_MARGIN, f"{state}, text {k}: two tokens are almost equally likely"
            with in_state(double, terms), float64_throughout():
                logits64 = logits_of(double, input_ids).numpy()
            by_numpy = relative_difference(independent.logits(input_ids, terms), logits64)
            assert logits.dtype == np.float32 and logits64.dtype == np.float64
            assert by_numpy < NUMPY_TOLERANCE, f"{state}, text {k}: numpy and PEFT in float64 differ by {by_numpy}"
            tensors[f"logits.{state}.{k}"] = logits
            tensors[f"logits64.{state}.{k}"] = logits64
            tensors[f"greedy.{state}.{k}"] = np.array(answer)
            facts["generated"].append(decode(answer))
            for fact, value, choose in (
                ("smallest_greedy_margin", margin, min),
                ("max_abs_logit", np.abs(logits64).max(), max),
                ("max_abs_float32_minus_float64", np.abs(logits - logits64).max(), max),
                ("max_relative_numpy_minus_float64", by_numpy, max),
            ):
                facts[fact] = float(choose(facts[fact], value))
        states[state] = facts
    layers = lora_layers(single)
    scalings = {name: {path: l.scaling[name] for path, l in layers if name in l.scaling} for name in ADAPTERS}
    return tensors, states, scalings


def manifest(states, scalings, held_out, figures):
    return {
        "tensors": {
            "prompt.K": "token ids of prompt K (I64)",
            "input_ids.K": "token ids of prompt K, the answer beside it, and the end token (I64)",
            "logits.STATE.K": "[tokens, vocabulary] for input_ids.K; PEFT, unmerged, float32",
            "logits64.STATE.K": "the same with the whole model and all adapters in float64",
            "greedy.STATE.K": "greedy continuation of prompt.K up to and including the end token (I64); float32",
        },
        "texts": [
            {"prompt": prompt_text(number), "answer": answer_text(number, style)} for number, style in GOLDEN_TEXTS
        ],
        "states": states,
        "scaling": scalings,
        "held_out": {"numbers": held_out, **figures["held_out"]},
        "training": figures["training"],
        "seed": SEED,
        "threads": THREADS,
        "made_with": {
            "python": platform.python_version(),
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "numpy": np.__version__,
        },
        "license": "Apache-2.0",
    }


def make(directory):
    started = time.monotonic()
    numbers, held_out = split_numbers()
    base, loss = train_base(numbers)
    save_base(base, directory / "base")
    training = {"base": {**BASE_TRAINING, "loss": loss}}
    for name in ADAPTERS:
        model, loss = train_adapter(name, directory / "base", numbers)
        save_adapter(model, directory / "adapters" / name)
        training[name] = {**ADAPTER_TRAINING, "loss": loss}
    print(f"trained in {time.monotonic() - started:.0f} s")

    tensors, states, scalings = evaluate(directory)
    for state, facts in states.items():
        print(f"  {state}: {' | '.join(facts['generated'])}")
    measured = {"count": len(held_out), "accuracy": accuracies(load_model(directory), held_out)}
    too_low = {s: a for s, a in measured["accuracy"].items() if a < REQUIRED_ACCURACY[s]}
    assert not too_low, f"trained, but not well enough to be of use: {too_low}"
    save_file(tensors, directory / "golden.safetensors")
    figures = {"held_out": measured, "training": training}
    write_json(directory / "golden.json", manifest(states, scalings, held_out, figures))
    print(f"made in {time.monotonic() - started:.0f} s")


def check(directory):
    """Evaluates the saved files again. Returns the number of tensors that differ from the golden ones."""
    golden = load_file(directory / "golden.safetensors")
    tensors, _, scalings = evaluate(directory)
    failures = sorted(golden.keys() ^ tensors.keys())
    largest = {kind: 0.0 for kind in CHECK_TOLERANCE}
    for name in sorted(golden.keys() & tensors.keys()):
        expected, got = golden[name], tensors[name]
        if expected.dtype != got.dtype or expected.shape != got.shape:
            failures.append(name)
        elif expected.dtype == np.int64:
            if not np.array_equal(expected, got):
                failures.append(name)
        else:
            difference = relative_difference(got, expected)
            largest[str(expected.dtype)] = max(largest[str(expected.dtype)], difference)
            if not difference <= CHECK_TOLERANCE[str(expected.dtype)]:
                failures.append(name)
    if json.loads((directory / "golden.json").read_text())["scaling"] != scalings:
        failures.append("golden.json: scaling")
    for kind, difference in largest.items():
        print(f"{kind}: largest relative difference {difference:.2e}, allowed {CHECK_TOLERANCE[kind]:.0e}")
    for name in failures:
        print(f"DIFFERENT: {name}")
    print(f"{len(golden)} tensors checked, {len(failures)} different")
    return len(failures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="directory (default: here)")
    parser.add_argument("--check", action="store_true", help="compare the golden file with a fresh evaluation")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    if arguments.check:
        return 1 if check(arguments.out) else 0
    make(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
