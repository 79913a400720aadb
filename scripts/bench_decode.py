"""Speed of decoding and of reading a prompt, beside other engines: the same random GPT-2 124M weights, in turn.

    pip install -e ".[bench]" && git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python scripts/bench_decode.py --nanogpt /tmp/nanoGPT --plot docs/decode.svg

Decoding: every engine reads a prompt of random ids and draws new tokens with top-k 200; all of it is timed. Prefill: it
reads a longer one and draws one token. Prompts are new in every round, since some engines remember what they have read.
Each has a process of its own, and rounds go through all of them in turn; an engine's figure is its fastest round, so
that a busy machine shows as little as it can. An engine that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt.files.atomic import atomic_write
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.inference.levels import ISA_VARIABLE
from lit_gpt.inference.prepare import prepare_for_inference
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

TOP_K = 200
BATCHED_CONTEXT = 512
"""Tokens of a sequence that llama.cpp's batched decoding has memory for."""
Decode = Callable[[list[list[int]], int], None]
"""Draw so many new tokens for every prompt."""


_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "CT2_FORCE_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_AVX512 = {"ATEN_CPU_CAPABILITY": "avx512", "CT2_FORCE_CPU_ISA": "AVX512", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}
PEERS_AT: dict[str, dict[str, str]] = {
    "avx2": {**_AVX2, "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"},
    "avx2_vnni": {**_AVX2, "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "DNNL_MAX_CPU_ISA": "AVX2_VNNI"},
    "avx512": {**_AVX512, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "DNNL_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512_bf16": {},
}
"""Level → the variables by which PyTorch, MKL, oneDNN and CTranslate2 leave out what is above it. llama.cpp must be
built for it: `CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=OFF …" pip install --no-cache-dir --target FOLDER
llama-cpp-python`. With its cache pip installs what it has built before, whatever the arguments: what the build tells of
itself is printed."""


def fresh_model(config: GPTConfig) -> GPT:
    """The same random weights every time."""
    torch.manual_seed(0)
    return GPT(config).eval()


def arrays(config: GPTConfig) -> dict[str, np.ndarray]:
    """Those weights by their GPT-2 names."""
    return {name: value.numpy() for name, value in fresh_model(config).state_dict().items()}


def ours(config: GPTConfig, precision: str, device: str) -> Decode:
    """This project's engine."""
    model = prepare_for_inference(fresh_model(config).to(device), precision)
    engines: dict[int, Engine] = {}

    def decode(prompts: list[list[int]], n: int) -> None:
        engine = engines.setdefault(len(prompts), Engine(model, config, max_slots=len(prompts)))
        for prompt in prompts:
            engine.submit(prompt, GenerationConfig(max_new_tokens=n, temperature=1.0, top_k=TOP_K, seed=1))
        written = sum(len(output.tokens) for output in engine.drain())
        assert written == n * len(prompts), written

    return decode


def nanogpt(config: GPTConfig, folder: str, device: str, compile: bool) -> Decode:
    """karpathy/nanoGPT: no cache, the whole context again for every token."""
    sys.path.insert(0, folder)
    from model import GPT as NanoGPT  # type: ignore[import-not-found]
    from model import GPTConfig as NanoConfig

    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")}
    model = NanoGPT(NanoConfig(**shape, bias=True, dropout=0.0)).eval()
    renamed = {}
    for name, value in fresh_model(config).state_dict().items():
        renamed[name if name.startswith("lm_head") else f"transformer.{name}"] = value
    missing = model.load_state_dict(renamed, strict=False)
    assert not missing.unexpected_keys and all("attn.bias" in key for key in missing.missing_keys), missing
    model = model.to(device)
    if compile:
        model.forward = torch.compile(model.forward)
    return lambda prompts, n: model.generate(torch.tensor(prompts, device=device), n, top_k=TOP_K)


def hugging_face(config: GPTConfig, dtype: torch.dtype, device: str) -> Decode:
    """transformers' `generate`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    values = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    model = GPT2LMHeadModel(GPT2Config(**values, vocab_size=config.vocab_size, n_positions=config.block_size)).eval()
    state = {}
    for name, value in fresh_model(config).state_dict().items():
        matrix = name.endswith("weight") and any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        state[name if name.startswith("lm_head") else f"transformer.{name}"] = value.t() if matrix else value
    model.load_state_dict(state)
    model = model.to(device, dtype)

    def decode(prompts: list[list[int]], n: int) -> None:
        idx = torch.tensor(prompts, device=device)
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": True, "top_k": TOP_K, "pad_token_id": 0}
        model.generate(idx, attention_mask=torch.ones_like(idx), **options)

    return decode


def llama_cpp(config: GPTConfig, kind: str, threads: int, batch: int) -> Decode:
    """llama.cpp through llama-cpp-python, from a GGUF file written here."""
    from llama_cpp import Llama, llama_print_system_info

    print(f"llama.cpp: {llama_print_system_info().decode().strip()}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(config, kind, Path(folder) / "model.gguf")
        model = Llama(
            str(path),
            n_ctx=config.block_size,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            n_gpu_layers=0,
        )
    if batch > 1:
        return llama_cpp_batched(model, threads, batch)

    def decode(prompts: list[list[int]], n: int) -> None:
        stream = model.generate(prompts[0], top_k=TOP_K, top_p=1.0, min_p=0.0, temp=1.0, reset=True)
        for _ in range(n):
            next(stream)

    return decode


def llama_cpp_batched(model: Any, threads: int, batch: int) -> Decode:
    """Its batched decoding, which the Python class does not offer: the C functions, as examples/batched uses them."""
    import llama_cpp as api

    options = api.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_seq_max = BATCHED_CONTEXT * batch, BATCHED_CONTEXT * batch, batch
    options.n_threads = options.n_threads_batch = threads
    context = api.llama_init_from_model(model.model, options)
    assert context
    tokens = api.llama_batch_init(options.n_batch, 0, 1)
    chains = []
    for seed in range(batch):
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        stages = (api.llama_sampler_init_top_k(TOP_K), api.llama_sampler_init_temp(1.0))
        for stage in (*stages, api.llama_sampler_init_dist(seed)):
            api.llama_sampler_chain_add(chain, stage)
        chains.append(chain)

    def run(rows: list[list[int]], past: int) -> None:
        """Read these tokens of every sequence, each after `past` others; logits for the last of each."""
        assert model.model  # which is freed with the last that refers to `model`
        tokens.n_tokens = 0
        for sequence, row in enumerate(rows):
            for position, token in enumerate(row):
                at = tokens.n_tokens
                tokens.token[at], tokens.pos[at], tokens.n_seq_id[at] = token, past + position, 1
                tokens.seq_id[at][0], tokens.logits[at] = sequence, position == len(row) - 1
                tokens.n_tokens += 1
        assert api.llama_decode(context, tokens) == 0

    def decode(prompts: list[list[int]], n: int) -> None:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        rows, past = prompts, 0
        for _ in range(n):
            run(rows, past)
            past += len(rows[0])
            last = [(sequence + 1) * len(rows[0]) - 1 for sequence in range(batch)]
            rows = [[api.llama_sampler_sample(chain, context, at)] for chain, at in zip(chains, last)]

    return decode


def write_gguf(config: GPTConfig, kind: str, path: Path) -> Path:
    """Matrices in `kind` (F32, BF16, Q8_0 or Q4_0), the rest in fp32; the head is the embedding."""
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    parts = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    parts |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    outer = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    quantization = gguf.GGMLQuantizationType[kind]
    for name, value in arrays(config).items():
        stem, leaf = name.rsplit(".", 1)
        if stem == "lm_head":
            continue
        if stem in outer:
            target = outer[stem]
        else:
            _, layer, part = stem.split(".", 2)
            target = f"blk.{layer}.{parts[part]}"
        if value.ndim == 2 and stem != "wpe" and kind != "F32":
            writer.add_tensor(f"{target}.{leaf}", gguf.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(f"{target}.{leaf}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ctranslate2(config: GPTConfig, kind: str, threads: int) -> Decode:
    """CTranslate2, from a model folder written here."""
    import ctranslate2 as ct2

    with tempfile.TemporaryDirectory() as folder:
        write_ctranslate2(config, kind, Path(folder) / "model")
        generator = ct2.Generator(f"{folder}/model", "cpu", compute_type=kind, intra_threads=threads)

    def decode(prompts: list[list[int]], n: int) -> None:
        tokens = [[str(token) for token in prompt] for prompt in prompts]
        options = {"max_length": n, "min_length": n, "sampling_topk": TOP_K, "include_prompt_in_result": False}
        results = generator.generate_batch(tokens, **options)
        assert all(len(result.sequences_ids[0]) == n for result in results)

    return decode


def write_ctranslate2(config: GPTConfig, kind: str, folder: Path) -> None:
    """The weights in CTranslate2's own layout; a token is named by its id."""
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    spec = TransformerDecoderModelSpec.from_config(config.n_layer, config.n_head, activation=Activation.GELUTanh)
    weights, decoder = arrays(config), spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["wte.weight"]
    decoder.position_encodings.encodings = weights["wpe.weight"]

    def norm(target: object, stem: str) -> None:
        target.gamma, target.beta = weights[f"{stem}.weight"], weights[f"{stem}.bias"]  # type: ignore[attr-defined]

    def linear(target: object, stem: str) -> None:
        target.weight, target.bias = weights[f"{stem}.weight"], weights[f"{stem}.bias"]  # type: ignore[attr-defined]

    norm(decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
        linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    end = f"{config.vocab_size - 1}"
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    spec.register_vocabulary([str(i) for i in range(config.vocab_size)])
    spec.validate()
    spec.optimize(quantization=None if kind == "float32" else kind)
    folder.mkdir()
    spec.save(str(folder))


def engines(arguments: argparse.Namespace, config: GPTConfig, batch: int) -> dict[str, Callable[[], Decode]]:
    """Name → what builds that engine."""
    device, threads = arguments.device, arguments.threads
    found: dict[str, Callable[[], Decode]] = {}
    for precision in ("int4", "int8", "bf16", "fp32"):
        found[f"lit_gpt {precision}"] = lambda precision=precision: ours(config, precision, device)
    if device == "cpu":
        for kind in ("Q4_0", "Q8_0", "BF16", "F32"):
            found[f"llama.cpp {kind}"] = lambda kind=kind: llama_cpp(config, kind, threads, batch)
        for kind in ("int8", "float32"):
            found[f"CTranslate2 {kind}"] = lambda kind=kind: ctranslate2(config, kind, threads)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[f"transformers {name}"] = lambda dtype=dtype: hugging_face(config, dtype, device)
    if arguments.nanogpt and batch == 1:  # it computes the whole context again for each token: minutes at 16
        found["nanoGPT generate"] = lambda: nanogpt(config, arguments.nanogpt, device, arguments.compile)
    if arguments.only:
        found = {name: build for name, build in found.items() if any(part in name for part in arguments.only)}
    return found


class Worker:
    """One engine in a process of its own: the pools of threads of two engines would wait on each other's cores."""

    def __init__(self, name: str, batch: int) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--batches", str(batch), "--worker", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer() == READY

    def _answer(self) -> str:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith(MARK):
                return line[len(MARK) :].strip()
        raise RuntimeError(f"a worker ended: {self._process.args}")

    def seconds(self, prompts: list[list[int]], n: int) -> float:
        """What decoding took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([prompts, n]) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


MARK, READY = "bench: ", "ready"


def work(arguments: argparse.Namespace, config: GPTConfig) -> None:
    """The other side of `Worker`: build one engine, decode what is asked for on stdin, say how long it took."""
    try:
        decode = engines(arguments, config, arguments.batches[0])[arguments.worker]()
    except ImportError as error:
        print(f"{MARK}{error}", flush=True)
        return
    print(f"{MARK}{READY}", flush=True)
    for line in sys.stdin:
        prompts, n = json.loads(line)
        start = time.perf_counter()
        decode(prompts, n)
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        print(f"{MARK}{time.perf_counter() - start}", flush=True)


@dataclass(frozen=True)
class Work:
    """What is timed: `batch` prompts of `prompt` tokens are read, and `new_tokens` drawn for each.

    Attributes:
        tokens: that count in tokens per second.
    """

    name: str
    batch: int
    prompt: int
    new_tokens: int
    tokens: int


def measure(arguments: argparse.Namespace, config: GPTConfig, work: Work) -> dict[str, float]:
    """Tokens per second of every engine."""
    workers = {}
    for name in engines(arguments, config, work.batch):
        worker = Worker(name, work.batch)
        if worker.ready:
            workers[name] = worker
        else:
            print(f"left out: {name}", file=sys.stderr)
    taken: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(arguments.rounds + 1):  # the first warms up
        prompts = np.random.default_rng(turn).integers(0, config.vocab_size, (work.batch, work.prompt)).tolist()
        for name, worker in workers.items():
            time.sleep(0.2)  # threads spin for a while after their work
            seconds = worker.seconds(prompts, min(3, work.new_tokens) if turn == 0 else work.new_tokens)
            if turn:
                taken[name].append(seconds)
        print(f"{work.name}, round {turn} of {arguments.rounds}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    return {name: work.tokens / min(seconds) for name, seconds in taken.items()}


TARGETS = [
    ("batch 1", "lit_gpt int8", ("llama.cpp Q8_0", "CTranslate2 int8"), 1.2),
    ("batch 1", "lit_gpt int4", ("llama.cpp Q4_0",), 1.1),
    ("batch 1", "lit_gpt bf16", ("llama.cpp BF16",), 1.0),
    ("batch 1", "lit_gpt fp32", ("llama.cpp F32",), 1.0),
    ("batch 16", "lit_gpt int8", ("CTranslate2 int8", "llama.cpp Q8_0"), 1.3),
    ("prefill 512", "lit_gpt int8", ("CTranslate2", "llama.cpp", "transformers"), 1.0),
    ("prefill 512", "lit_gpt fp32", ("CTranslate2 float32", "llama.cpp F32", "transformers fp32"), 1.0),
]
"""Work, one of our forms, the peers (whose names begin so) of which the fastest counts, the ratio aimed at."""


def report(results: dict[str, dict[str, float]]) -> None:
    """A table and the ratios that were aimed at, as Markdown on stdout."""
    for work, speeds in results.items():
        print(f"\n| {work} | tok/s |\n|---|---|")
        for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
            print(f"| {name} | {speed:.1f} |")
    print("\n| ratio | measured | aim |\n|---|---|---|")
    for work, name, beginnings, aim in TARGETS:
        speeds = results.get(work, {})
        peers = [peer for peer in speeds if peer.startswith(beginnings)]
        if name in speeds and peers:
            peer = max(peers, key=speeds.__getitem__)
            print(f"| {work}: {name} / {peer} | {speeds[name] / speeds[peer]:.2f} | {aim} |")


def plot(results: dict[str, dict[str, float]], path: str) -> None:
    """Bars of tokens per second, one panel for each kind of work."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 3.6), squeeze=False, layout="constrained")
    for axis, (work, speeds) in zip(axes[0], results.items()):
        ordered = sorted(speeds.items(), key=lambda item: item[1])
        colors = ["#c2410c" if name.startswith("lit_gpt") else "#94a3b8" for name, _ in ordered]
        bars = axis.barh([name for name, _ in ordered], [speed for _, speed in ordered], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set(title=f"GPT-2 124M, {work}", xlabel="tokens per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    with atomic_write(path) as file:
        figure.savefig(file, format="svg")


def main() -> None:
    """Measure, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS", help="of a prompt to read; 0 for none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of karpathy/nanoGPT")
    parser.add_argument("--compile", action="store_true", help="torch.compile nanoGPT")
    parser.add_argument("--isa", metavar="LEVEL", help="instruction set of all engines, at most the CPU's: avx2, …")
    parser.add_argument("--llama_cpp", metavar="FOLDER", help="llama-cpp-python as built for it (pip install --target)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="engines whose name holds one of these")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--plot", help="write an SVG here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.isa:
        os.environ |= {ISA_VARIABLE: arguments.isa, **PEERS_AT.get(arguments.isa, {})}
    if arguments.llama_cpp:
        sys.path.insert(0, arguments.llama_cpp)
    torch.set_num_threads(arguments.threads)
    config = GPTConfig.from_preset(arguments.preset)
    if arguments.worker:
        work(arguments, config)
        return
    new = arguments.new_tokens
    works = [Work(f"batch {n}", n, arguments.prompt, new, n * new) for n in arguments.batches]
    if n := arguments.prefill:
        works.append(Work(f"prefill {n}", 1, n, 1, n))
    results = {work.name: measure(arguments, config, work) for work in works}
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, PyTorch {torch.__version__}")
    report(results)
    if arguments.json:
        with atomic_write(arguments.json, "w") as file:
            json.dump(results, file, indent=1)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
