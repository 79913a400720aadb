"""Checkpoints of nanoGPT and two textbooks, written by small modules with those names, against these modules."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.convert.recognise import load_source, open_source
from lit_gpt.convert.write import write_hf, write_lit_gpt
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import CHARACTERS, EVERY_BYTE, Tokenizer

V, C, H, N, T = 65, 32, 4, 2, 24


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(…, T, D) → (…, T, D), written out."""
    weights = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    mask = torch.ones(q.size(-2), q.size(-2)).tril() == 0
    return weights.masked_fill(mask, -math.inf).softmax(-1) @ v


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def idx() -> Tensor:
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# nanoGPT: Linear everywhere, exact GELU, tied, biases all or none, a mask buffer where there is no flash attention.


class NanoBlock(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias)
        self.attn.register_buffer("bias", torch.tril(torch.ones(1, 1, T, T)))
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(C, 4 * C, bias), nn.Linear(4 * C, C, bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads, self.attn.c_attn(self.ln_1(x)).split(C, -1))
        x = x + self.attn.c_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, bias: bool, vocab: int = V) -> None:
        super().__init__()
        parts = {"wte": nn.Embedding(vocab, C), "wpe": nn.Embedding(T, C), "ln_f": nn.LayerNorm(C, bias=bias)}
        self.transformer = nn.ModuleDict({**parts, "h": nn.ModuleList(NanoBlock(bias) for _ in range(N))})
        self.lm_head = nn.Linear(C, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx) + self.transformer["wpe"].weight[: idx.size(1)]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def save_nano(path: Path, model: NanoGPT, bias: bool, prefix: str = "", **more: Any) -> None:
    rows = model.lm_head.weight.shape[0]
    arguments = {
        "n_layer": N,
        "n_head": H,
        "n_embd": C,
        "block_size": T,
        "bias": bias,
        "vocab_size": rows,
        "dropout": 0.2,
    }
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": arguments,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "out_dir": "../out"},
    }
    torch.save(checkpoint | more, path)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@torch.no_grad()
def test_nanogpt(bias: bool, prefix: str, tmp_path: Path) -> None:
    reference = randomised(NanoGPT(bias))
    save_nano(tmp_path / "ckpt.pt", reference, bias, prefix)
    model, tokenizer = load_source(str(tmp_path / "ckpt.pt"))
    assert distance(model(idx()).logits, reference(idx())) < 1e-5
    assert tokenizer is None and model.config.dropout == 0.2
    assert model.lm_head.weight is model.wte.weight


@torch.no_grad()
def test_nanogpt_without_biases_goes_to_transformers_and_back(tmp_path: Path) -> None:
    """GPT-2 of transformers has biases: zeros there, and absent again here, unless they were trained in between."""
    transformers = pytest.importorskip("transformers")
    reference = randomised(NanoGPT(False))
    save_nano(tmp_path / "ckpt.pt", reference, False)
    source = open_source(str(tmp_path / "ckpt.pt"))
    write_hf(source, tmp_path / "hf")
    hub = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert distance(hub(idx()).logits, reference(idx())) < 1e-5
    back = open_source(str(tmp_path / "hf"))
    assert back.config == source.config and back.weights.keys() == source.weights.keys()
    assert all(torch.equal(stored.read(), back.weights[name].read()) for name, stored in source.weights.items())
    hub.transformer.h[1].ln_1.bias.fill_(0.5)
    hub.save_pretrained(tmp_path / "tuned")
    tuned = open_source(str(tmp_path / "tuned"))
    assert tuned.config.norm_bias and tuned.config.qkv_bias
    assert distance(tuned.load()(idx()).logits, hub(idx()).logits) < 1e-5


def write_meta(path: Path, characters: str) -> None:
    table = {character: i for i, character in enumerate(characters)}
    meta = {"vocab_size": len(table), "stoi": table, "itos": dict(enumerate(characters))}
    path.write_bytes(pickle.dumps(meta))


def test_nanogpt_characters(tmp_path: Path) -> None:
    """`meta.pkl` beside the checkpoint becomes the tokenizer, with nanoGPT's ids; it is found nowhere else."""
    characters = "\n !$&',-.3:;?ABCXYZabcxyzé你👍"
    write_meta(tmp_path / "meta.pkl", characters)
    save_nano(tmp_path / "ckpt.pt", NanoGPT(True), True)
    _, tokenizer = load_source(str(tmp_path / "ckpt.pt"))
    assert tokenizer is not None
    assert tokenizer.encode(characters) == list(range(len(characters)))
    assert tokenizer.decode(range(len(characters))) == characters
    assert tokenizer.encode("ABC\n") == [characters.index(c) for c in "ABC\n"]
    assert min(tokenizer.encode("Q")) >= len(characters)  # a character that the model never saw has no row
    (tmp_path / "meta.pkl").rename(tmp_path / "other.pkl")
    assert load_source(str(tmp_path / "ckpt.pt"))[1] is None
    chosen = open_source(str(tmp_path / "ckpt.pt"), tokenizer=str(tmp_path / "other.pkl")).tokenizer
    assert chosen is not None and chosen.hash == tokenizer.hash


def test_nanogpt_with_the_padded_gpt2_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {byte: i for i, byte in enumerate(EVERY_BYTE)}
    named = Tokenizer.build("gpt2", CHARACTERS, ranks, {"<|endoftext|>": 50256})
    monkeypatch.setattr("lit_gpt.convert.source.get_tokenizer", lambda name: named)
    save_nano(tmp_path / "ckpt.pt", NanoGPT(False, 50304), False)
    model, tokenizer = load_source(str(tmp_path / "ckpt.pt"))
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (50257, 50304)
    assert tokenizer is named


def test_nanogpt_lacking_arguments(tmp_path: Path) -> None:
    save_nano(tmp_path / "ckpt.pt", NanoGPT(False), False, model_args={"n_layer": 2})
    with pytest.raises(UserError, match="model_args lacks n_head, n_embd, block_size, bias, vocab_size"):
        open_source(str(tmp_path / "ckpt.pt"))


# "LLMs from scratch": a norm with scale and shift, three matrices for queries, keys and values, GELU by tanh, untied.


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) + self.shift


class RaschkaBlock(nn.Module):
    def __init__(self, qkv_bias: bool) -> None:
        super().__init__()
        self.att, self.ff = nn.Module(), nn.Module()
        for name in ("W_query", "W_key", "W_value"):
            self.att.add_module(name, nn.Linear(C, C, bias=qkv_bias))
        self.att.out_proj = nn.Linear(C, C)
        self.att.register_buffer("mask", torch.triu(torch.ones(T, T), diagonal=1))
        self.ff.layers = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C))
        self.norm1, self.norm2 = Scaled(), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (heads(w(y)) for w in (self.att.W_query, self.att.W_key, self.att.W_value))
        x = x + self.att.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ff.layers(self.norm2(x))


class Raschka(nn.Module):
    def __init__(self, qkv_bias: bool = False) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(V, C), nn.Embedding(T, C)
        self.trf_blocks = nn.Sequential(*(RaschkaBlock(qkv_bias) for _ in range(N)))
        self.final_norm, self.out_head = Scaled(), nn.Linear(C, V, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tok_emb(idx) + self.pos_emb.weight[: idx.size(1)]
        return self.out_head(self.final_norm(self.trf_blocks(x)))


@pytest.mark.slow
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("around", [True, False], ids=["with optimizer", "bare"])
@torch.no_grad()
def test_llms_from_scratch(qkv_bias: bool, around: bool, tmp_path: Path) -> None:
    reference = randomised(Raschka(qkv_bias))
    state: dict[str, Any] = reference.state_dict()
    if around:
        state = {
            "model_state_dict": state,
            "optimizer_state_dict": torch.optim.AdamW(reference.parameters()).state_dict(),
        }
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(UserError, match="n_head="):
        open_source(str(tmp_path / "model.pth"))
    source = open_source(str(tmp_path / "model.pth"), n_head=H)
    assert distance(source.load()(idx()).logits, reference(idx())) < 1e-5
    assert (source.config.qkv_bias, source.config.tie_embeddings) == (qkv_bias, False)
    write_lit_gpt(source, tmp_path / "a.ckpt")
    assert distance(load_source(str(tmp_path / "a.ckpt"))[0](idx()).logits, reference(idx())) < 1e-5


def test_the_old_file_format_of_torch(tmp_path: Path) -> None:
    """Before 1.6 torch.save wrote no zip file; such a file cannot be mapped, but read."""
    reference = randomised(Raschka())
    torch.save(reference.state_dict(), tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    source = open_source(str(tmp_path / "model.pth"), n_head=H)
    assert distance(source.load()(idx()).logits, reference(idx())) < 1e-5


# The transformer book: a matrix for each head, ReLU, fixed sinusoidal positions, a head with a bias.


class BookHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("Wq", "Wk", "Wv"):
            self.add_module(name, nn.Linear(C, C // H, bias=False))
        self.register_buffer("mask", torch.tril(torch.ones(T, T)))

    def forward(self, x: Tensor) -> Tensor:
        return attend(self.Wq(x), self.Wk(x), self.Wv(x))


class BookBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2, self.mha, self.ffn = nn.LayerNorm(C), nn.LayerNorm(C), nn.Module(), nn.Module()
        self.mha.heads = nn.ModuleList(BookHead() for _ in range(H))
        self.mha.projection_layer = nn.Linear(C, C)
        self.ffn.ffn = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        x = x + self.mha.projection_layer(torch.cat([head(y) for head in self.mha.heads], -1))
        return x + self.ffn.ffn(self.ln2(x))


class Book(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.token_embedding_lookup_table = nn.Embedding(vocab, C)
        self.transformer_blocks = nn.Sequential(*(BookBlock() for _ in range(N)), nn.LayerNorm(C))
        self.model_out_linear_layer = nn.Linear(C, vocab)

    def forward(self, idx: Tensor) -> Tensor:
        position = torch.arange(idx.size(1))[:, None]
        angle = position / 10000 ** (torch.arange(0, C, 2) / C)
        table = torch.zeros(idx.size(1), C)
        table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
        x = self.token_embedding_lookup_table(idx) + table
        return self.model_out_linear_layer(self.transformer_blocks(x))


@torch.no_grad()
def test_the_transformer_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cl100k_base` is cut where the model's vocabulary ends: text never becomes an id that it has no row for."""
    ranks = {byte: i for i, byte in enumerate(EVERY_BYTE)} | {b"he": 256, b"hell": 257, b"hello": 258}
    whole = Tokenizer.build("cl100k_base", r"\w+|(?s:.)", ranks, {"<|endoftext|>": 300})
    monkeypatch.setattr("lit_gpt.convert.source.get_tokenizer", lambda name: whole)
    reference = randomised(Book(258))
    h_params = {
        "d_model": C,
        "context_length": T,
        "num_blocks": N,
        "num_heads": H,
        "dropout": 0.1,
        "max_token_value": 258,
    }
    state = {
        "model_state_dict": reference.state_dict(),
        "h_params": h_params | {"device": "cpu", "learning_rate": 1e-3},
    }
    torch.save(state, tmp_path / "model.ckpt")
    model, tokenizer = load_source(str(tmp_path / "model.ckpt"))
    assert distance(model(idx()).logits, reference(idx())) < 1e-5
    assert whole.encode("hello") == [258]
    assert tokenizer is not None and tokenizer.n_vocab == 258
    assert max(tokenizer.encode("hello")) < 258 and tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with pytest.raises(UserError, match=r"position='sinusoidal'"):
        write_hf(open_source(str(tmp_path / "model.ckpt")), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
