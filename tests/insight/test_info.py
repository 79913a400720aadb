"""`lit_gpt info`: its counts, FLOPs and memory against PyTorch's own and against a measured process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import RunProgram
from fork_server import ForkServer
from torch.utils.flop_counter import FlopCounterMode

from lit_gpt.__main__ import main as run_main
from lit_gpt.checkpoint.format import save_model
from lit_gpt.insight.info.describe import Subject, describe
from lit_gpt.insight.info.main import subject_from_config, subject_from_preset, subject_from_source
from lit_gpt.insight.info.memory import block_activation_bytes
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.model.positions import rope_table

SHAPES: list[dict[str, Any]] = [
    {},
    {"mlp": "relu", "n_kv_head": 2},
    {"position": "rope", "n_kv_head": 2, "mlp": "swiglu", "norm": "rmsnorm", "qkv_bias": False},
    {"position": "rope", "qk_norm": True, "mlp": "relu2", "head_dim": 8},
    {"qk_norm": True, "n_kv_head": 1, "norm": "rmsnorm"},
    {"dropout": 0.1},
    {"dropout": 0.1, "attn_dropout": 0.0},
    {"attn_dropout": 0.1, "position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True},
    {"dropout": 0.1, "position": "rope", "norm": "rmsnorm", "mlp": "gelu"},
    {"dropout": 0.1, "position": "rope", "norm": "rmsnorm", "mlp": "gelu", "qk_norm": True, "n_kv_head": 2},
    {"position": "rope", "rotary_dim": 4, "parallel_residual": True},
    {"position": "rope", "rotary_dim": 4, "parallel_residual": True, "norm": "rmsnorm", "mlp": "swiglu"},
    {"position": "rope", "norm": "rmsnorm", "block_norm": "both", "mlp": "geglu_tanh", "n_kv_head": 2},
    {"position": "rope", "norm": "rmsnorm", "block_norm": "post", "qk_norm": True, "qk_norm_full": True},
    {"position": "rope", "norm": "rmsnorm", "sliding_window": 10, "n_kv_head": 2},
]


def saved_by_autograd(config: GPTConfig, precision: str, batch_size: int, context: int) -> int:
    """Bytes of all distinct storages that one block's forward pass saves, its own weights and their copies left out."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    block = Block(config, 0).to(dtype)
    x = torch.randn(batch_size, context, config.n_embd, dtype=dtype, requires_grad=True)
    rotation = rope_table(config)[:context] if config.position == "rope" else None
    apart = {p.untyped_storage()._cdata for p in block.parameters()}
    if rotation is not None:
        apart.add(rotation.untyped_storage()._cdata)
    shapes = {tuple(p.shape) for p in block.parameters()} | {
        tuple(p.t().shape) for p in block.parameters() if p.dim() > 1
    }
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in apart and tuple(tensor.shape) not in shapes:
            saved[storage._cdata] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        block(x, rotation)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_are_what_autograd_saves(shape: dict[str, Any], precision: Any) -> None:
    config = GPTConfig(**{"vocab_size": 50, "block_size": 64, "n_layer": 1, "n_head": 4, "n_embd": 64, **shape})
    expected = saved_by_autograd(config, precision, batch_size=3, context=40)
    assert block_activation_bytes(config, 3, 40, precision) == pytest.approx(expected, rel=0.02)


PEAK = """
import ctypes, json, sys, torch
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

def status(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def train(config, batch_size, context, precision, checkpointing):
    model = GPT(config)
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        idx = torch.randint(config.vocab_size, (batch_size, context))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            output = model(idx, idx)
        (output.loss_sum / output.n_targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

# glibc keeps freed memory of a few MiB for itself by default, and up to 60 % more than is in use.
assert ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
small = GPTConfig(vocab_size=50, n_layer=1, n_embd=16, n_head=1)
train(small, 2, 8, "bf16-mixed", True)  # all that is imported on first use is in the baseline
values, cases = json.loads(sys.argv[1])
for case in cases:
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = status("VmRSS")
    train(GPTConfig(**values), *case)
    print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_training_memory_is_within_a_tenth_of_a_measured_process(fork_server: ForkServer, tmp_path: Path) -> None:
    values = {"vocab_size": 2000, "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}
    subject = Subject("test", GPTConfig(**values))
    cases: list[tuple[int, int, str, bool]] = [
        (2, 256, "32-true", False),
        (2, 256, "bf16-mixed", False),
        (2, 256, "32-true", True),
    ]
    names = ("batch_size", "context", "precision", "activation_checkpointing")
    estimates = [describe(subject, **dict(zip(names, case))).training.peak for case in cases]
    (tmp_path / "peak.py").write_text(PEAK)
    run = fork_server.run(tmp_path / "peak.py", json.dumps([values, cases]))
    assert run.returncode == 0, run.stderr
    assert estimates == [pytest.approx(int(line), rel=0.1) for line in run.stdout.split()]


@pytest.mark.parametrize("preset, total", [("gpt2", 124_439_808), ("llms-from-scratch-124m", 163_009_536)])
def test_counts_are_the_published_ones(preset: str, total: int) -> None:
    info = describe(subject_from_preset(preset))
    assert info.total == total
    assert info.without_embeddings == sum(t.count for t in info.tensors if t.name.startswith(("h.", "ln_f.")))


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_flops_agree_with_pytorchs_counter(shape: dict[str, Any]) -> None:
    config = GPTConfig(**{"vocab_size": 50, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, **shape})
    with torch.device("meta"):
        model = GPT(config)
        idx = torch.zeros(3, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx).logits.sum().backward()
    flops = describe(Subject("test", config), batch_size=3).flops
    assert flops["training_per_micro_batch"] == counter.get_total_flops()
    assert flops["training_per_token"] == 3 * flops["forward_per_token"]


@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_cache_bytes_are_those_of_a_cache(n_kv_head: int | None) -> None:
    config = GPTConfig(vocab_size=50, block_size=48, n_layer=3, n_head=4, n_embd=32, n_kv_head=n_kv_head)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        figures = describe(Subject("test", config)).serving[name]
        cache = KVCache(config, 5, 48, dtype)
        assert 5 * figures["cache_per_slot"] == cache.k.nbytes + cache.v.nbytes
        assert 48 * figures["cache_per_token"] == figures["cache_per_slot"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux counts it")
def test_the_largest_preset_needs_little_memory(fork_server: ForkServer, tmp_path: Path) -> None:
    script = tmp_path / "largest.py"
    script.write_text(
        "from lit_gpt.__main__ import main\n"
        "main(['info', '--preset', 'gpt2-xl'])\n"
        # ru_maxrss would count the process from which this one was forked too
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    run = fork_server.run(script)
    assert "1,557,611,200" in run.stdout
    assert int(run.stdout.split()[-1]) < 1 << 20  # KiB


@pytest.mark.slow
def test_a_checkpoint_is_described_as_it_was_trained(tmp_path: Path, program: RunProgram, tiny_model: GPT) -> None:
    path = tmp_path / "x.ckpt"
    tiny_model.bfloat16()
    save_model(path, tiny_model, None)
    checkpoint = torch.load(path)
    checkpoint["lit_gpt"]["precision"] = "bf16-mixed"
    checkpoint["hyper_parameters"]["optimizer"] = {"name": "muon"}
    checkpoint["datamodule_hyper_parameters"] = {"batch_size": 3}
    torch.save(checkpoint, path)
    shown = json.loads(program("info", "--ckpt_path", path, "--format", "json", "--context", 16).stdout)
    assert shown["parameters"]["total"] == sum(p.numel() for p in tiny_model.parameters())
    assert {row["dtype"] for row in shown["tensors"]} == {"bfloat16"}
    assert [row["name"] for row in shown["tensors"]] == list(tiny_model.state_dict())
    wanted = {"batch_size": 3, "context": 16, "precision": "bf16-mixed", "optimizer": "muon"}
    assert wanted.items() <= shown["training"].items()


def test_a_model_of_another_project_is_described(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )
    theirs.save_pretrained(tmp_path)
    assert describe(subject_from_source(str(tmp_path))).total == theirs.num_parameters()


def test_a_configuration_for_fit_is_described(tmp_path: Path) -> None:
    path = tmp_path / "fit.yaml"
    path.write_text(
        "model: {preset: nano, config: {n_layer: 3}, optimizer: {name: muon}}\n"
        "data: {tokenizer: 'bpe:1000', batch_size: 5}\ntrainer: {precision: bf16-mixed, accumulate_grad_batches: 2}\n"
    )
    info = describe(subject_from_config(str(path)))
    assert (info.config.n_layer, info.config.n_embd, info.config.vocab_size) == (3, 256, 1000)
    wanted = {"batch_size": 5, "optimizer": "muon", "precision": "bf16-mixed", "accumulate_grad_batches": 2}
    assert wanted.items() <= info.settings.items()
    path.write_text("{n_layer: 2, n_embd: 64, n_head: 2}")
    assert describe(subject_from_config(str(path))).config.n_layer == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "gpt-2"], 'did you mean "gpt2"?'),
        ([], "give one of --preset"),
        (["--preset", "gpt2", "--config", "x.yaml"], "give one of --preset"),
        (["--config", "x.yaml"], "No such file"),
        (["--config", "bad.yaml"], 'unknown model config key "n_layr": did you mean "n_layer"?'),
        (["--config", "list.yaml"], "holds no mapping"),
        (["--ckpt_path", "none.ckpt"], "does not exist"),
        (["--preset", "gpt2", "--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--preset", "gpt2", "--context", "2000"], "longer than the model's block_size=1024"),
        (["--preset", "gpt2", "--precision", "fp8"], 'unknown precision "fp8"'),
        (["--preset", "gpt2", "--optimizer", "adam"], 'did you mean "adamw"?'),
        (["--preset", "gpt2", "--format", "yaml"], "format 'yaml' is unknown"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("n_layr: 3")
    Path("list.yaml").write_text("- 3")
    assert run_main(["info", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
