"""The model card, and the other files of a Hugging Face folder that are no weights."""

from __future__ import annotations

import json
import re
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import chat_tokenizer, tiny_gpt
from packaging.licenses import canonicalize_license_expression

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import KEY, model_checkpoint, read_header, save_checkpoint, save_model
from lit_gpt.convert import card_samples, licences
from lit_gpt.convert.card_samples import sample_texts
from lit_gpt.convert.generation_json import generation_json
from lit_gpt.convert.licences import licence_metadata
from lit_gpt.convert.model_card import CardDetails, model_card
from lit_gpt.convert.recognise import open_source
from lit_gpt.convert.write import write_hf
from lit_gpt.data.shard_folder import load_index, open_local_split
from lit_gpt.errors import UserError
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.chat_template import ChatTemplate, Message, with_chat_template
from lit_gpt.tokenizer.tokenizer import CHARACTERS, EVERY_BYTE, Tokenizer, get_tokenizer

FINGERPRINT = "5e" * 32
ABOUT_RUN: dict[str, Any] = {
    "global_step": 300,
    "datamodule_hyper_parameters": {"path": "/home/me/data/mine", "source": "/home/me/poems.txt", "batch_size": 12},
    "TokenDataModule": {"fingerprint": FINGERPRINT, "block_size": 32, "accumulate": 2, "seed": 1337, "window": None},
    "callbacks": {
        "ModelCheckpoint{'monitor': None}": {"monitor": None, "best_model_score": None},
        "ModelCheckpoint{'monitor': 'val/loss'}": {"monitor": "val/loss", "best_model_score": torch.tensor(1.25)},
    },
}
RECIPE = {
    "optimizer": {"name": "muon", "lr": 6e-4, "weight_decay": 0.1},
    "schedule": {"name": "cosine", "warmup": 0.02, "min_lr_ratio": 0.1},
}
FIGURES = {"step": 280, "loss": 1.3, "perplexity": 3.6693, "bits_per_byte": 1.8755}


def trained(path: Path, model: GPT, tokenizer: Tokenizer | None, **changes: Any) -> str:
    """What `fit` saves, but for the state of the optimizer."""
    checkpoint = model_checkpoint(model.config, tokenizer, model.state_dict()) | ABOUT_RUN | changes
    checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], **RECIPE}
    checkpoint[KEY] = {"seed": 7, "validation": FIGURES, **checkpoint[KEY], "precision": "bf16-mixed"}
    save_checkpoint(path, checkpoint)
    return str(path)


def card_of(source: str, **details: Any) -> str:
    return model_card(open_source(source), CardDetails("me/it", "GPT2LMHeadModel", 1234, **details))


def rows(card: str) -> dict[str, str]:
    """Label → value of all tables."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, flags=re.MULTILINE))


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_has_what_the_checkpoint_records(tmp_path: Path, tiny_model: GPT) -> None:
    byte = get_tokenizer("byte")
    card = card_of(trained(tmp_path / "x.ckpt", tiny_model, byte), licence=licence_metadata("Apache-2.0"))
    assert rows(card) == {
        "text": "`poems.txt`",
        "token shards": "`mine`",
        "fingerprint of the training tokens (SHA-256)": f"`{FINGERPRINT}`",
        "tokenizer": f"`byte`, SHA-256 `{byte.hash}`",
        "optimizer": "`muon: lr=0.0006, weight_decay=0.1`",
        "learning rate schedule": "`cosine: warmup=0.02, min_lr_ratio=0.1`",
        "optimizer steps": "300",
        "batch of a step": "24 rows of 32 tokens",
        "tokens trained on": "230,400",
        "precision": "`bf16-mixed`",
        "seed": "7",
        "dropout": "0",
        "loss after 280 steps, nats a token": "1.3000",
        "perplexity after 280 steps": "3.6693",
        "bits per byte after 280 steps": "1.8755",
        "lowest loss of the run, nats a token": "1.2500",
    }
    assert metadata(card) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lit_gpt"],
    }
    assert "home" not in card  # folders of this machine are nobody else's concern
    for text in ("# me/it", "1,234 parameters", "a context of 32 tokens", "What it is not for", 'load("me/it")'):
        assert text in card


def test_what_is_not_recorded_is_not_invented(tmp_path: Path, tiny_model: GPT) -> None:
    """Checkpoints that `convert` wrote, and those of other projects."""
    save_model(tmp_path / "bare.ckpt", tiny_model, None)
    card = card_of(str(tmp_path / "bare.ckpt"))
    assert set(rows(card).values()) == {"not recorded"} and len(rows(card)) == 16
    assert "None was given" in card and "license" not in metadata(card) and "tokenizer" not in card.split("## Data")[0]
    write_hf(open_source(str(tmp_path / "bare.ckpt")), tmp_path / "hf")
    other = card_of(str(tmp_path / "hf"))
    assert set(rows(other).values()) == {"not recorded"} and "in the format of gpt2" in other


def test_the_example_is_a_text_that_the_model_knows(tmp_path: Path) -> None:
    """A prompt with characters that are not in the vocabulary, or longer than the context, would fail."""
    english = "Once upon a time"
    for characters, wanted in ((english, english), ("从前有\n", "从前"), ("abc\n", "ab"), ("\n", "\\n")):
        ids = {character.encode(): i for i, character in enumerate(sorted(set(characters)))}
        bytes_left = {byte: 100 + i for i, byte in enumerate(EVERY_BYTE) if byte not in ids}
        tokenizer = Tokenizer.build("char", CHARACTERS, ids | bytes_left, {}, end_of_text=None)
        model = tiny_gpt(dtype=torch.float32, vocab_size=len(ids), block_size=40)
        save_model(tmp_path / "x.ckpt", model, tokenizer)
        card = card_of(str(tmp_path / "x.ckpt"), samples=["ab\nc"])
        assert f'generate("{wanted}", max_new_tokens=20)' in card
    save_model(tmp_path / "x.ckpt", tiny_gpt(dtype=torch.float32, block_size=4), get_tokenizer("byte"))
    assert 'tokenizer("ab", return' in card_of(str(tmp_path / "x.ckpt"), samples=["ab"])


def test_data_of_the_hub_and_addresses(tmp_path: Path, tiny_model: GPT) -> None:
    changes = {"path": "hf://datasets/me/poems/shards", "source": "https://me:secret@a.org/b.txt?key=secret#c"}
    card = card_of(trained(tmp_path / "x.ckpt", tiny_model, None, datamodule_hyper_parameters=changes))
    assert metadata(card)["datasets"] == ["me/poems"]
    assert rows(card)["text"] == "`https://a.org/b.txt`" and "secret" not in card
    assert rows(card)["token shards"] == "`hf://datasets/me/poems/shards`"


ODD: dict[str, Any] = {
    "of other types": {
        "datamodule_hyper_parameters": {"path": 3, "source": ["a"], "batch_size": "many"},
        "TokenDataModule": {"fingerprint": 7, "block_size": -1, "accumulate": True},
        "callbacks": [1],
        "global_step": 0,
    },
    "no dicts": {"TokenDataModule": "x", "callbacks": {"a": 3, "b": {"monitor": "val/loss"}}, "global_step": None},
    "no numbers": {
        "callbacks": {"a": {"monitor": "val/loss", "best_model_score": torch.tensor(float("nan"))}},
        "TokenDataModule": {"accumulate": 1 << 80, "block_size": 1.5},
    },
    "no scalar": {"callbacks": {"a": {"monitor": "val/loss", "best_model_score": torch.zeros(2)}}},
    "markup": {
        "datamodule_hyper_parameters": {
            "path": "x | y |\n\n# heading `code` <script>alert(1)</script> [link](javascript:1)",
            "source": "\x00\x1b[31m" + "red" * 500,
        },
        "TokenDataModule": {"fingerprint": "a`|\n---\nlicense: mit\n"},
    },
    "a bad address": {"datamodule_hyper_parameters": {"path": "http://[::1", "source": "://"}},
}


HEADINGS = ("How to load it", "What it is not for", "Data", "Training", "Validation", "Licence")


@pytest.mark.parametrize("case", ODD)
def test_odd_values_make_no_odd_card(case: str, tmp_path: Path, tiny_model: GPT) -> None:
    """What a checkpoint holds may come from anyone: it is text in a table, or it is not there."""
    card = card_of(trained(tmp_path / "x.ckpt", tiny_model, None, **ODD[case]))
    assert len(rows(card)) == 16
    assert all(c.isprintable() or c == "\n" for c in card)
    assert metadata(card).get("license") is None
    assert re.findall(r"^#.*", card, flags=re.MULTILINE) == [
        "# me/it",
        *(
            f"## {name}"
            for name in ("How to load it", "What it is not for", "Data", "Training", "Validation", "Licence")
        ),
    ]
    assert "<script" not in card and "](java" not in card and max(map(len, card.splitlines())) < 600


def test_metadata_is_yaml_of_text(tmp_path: Path, tiny_model: GPT) -> None:
    save_model(tmp_path / "x.ckpt", tiny_model, None)
    licence = licence_metadata("GPL-3.0-or-later")
    card = card_of(str(tmp_path / "x.ckpt"), languages=("no", "zh"), licence=licence)
    assert metadata(card)["language"] == ["no", "zh"]  # Norwegian, which YAML takes for false
    assert metadata(card)["license"] == "other"
    assert "[gpl-3.0-or-later](https://spdx.org/licenses/GPL-3.0-or-later.html)" in card


def test_licences() -> None:
    assert licence_metadata("apache-2.0") == licence_metadata("APACHE-2.0") == {"license": "apache-2.0"}
    assert licence_metadata("GPL-3.0-only") == {"license": "gpl-3.0"}
    assert licence_metadata("other") == {"license": "other"}
    for name, message in (("apache2.0", 'did you mean "apache-2.0"'), ("{}", "give one of"), ("", "give one of")):
        with pytest.raises(UserError, match=re.escape(message)):
            licence_metadata(name)
    for name in [*licences._SPDX.split(), *licences._SAME]:
        assert canonicalize_license_expression(name) == name
    assert not set(map(str.lower, licences._SPDX.split())) & set(licences._HUB.split())


# Samples -------------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_from_the_model_and_the_same_each_time() -> None:
    """The same draws without the cache, by the whole text each time."""
    model, tokenizer = tiny_gpt(dtype=torch.float32), get_tokenizer("byte")
    texts = sample_texts(model, tokenizer, 3)
    assert texts == sample_texts(model, tokenizer, 3) and len(set(texts)) == 3
    generator, idx = torch.Generator().manual_seed(card_samples.SEED), torch.full((3, 1), 256)
    with torch.no_grad():
        for _ in range(31):
            values, tokens = model(idx).logits[:, -1].topk(card_samples.TOP_K)
            chosen = torch.multinomial((values / card_samples.TEMPERATURE).softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, tokens.gather(1, chosen)], dim=1)
    wanted = [row[1:] for row in idx.tolist()]
    assert texts == [tokenizer.decode(row[: row.index(256)] if 256 in row else row) for row in wanted]


def test_samples_end_where_the_text_ends_and_begin_with_what_the_model_knows() -> None:
    model = tiny_gpt(dtype=torch.float32, tie_embeddings=False)
    tokenizer = get_tokenizer("byte")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        hidden = model(torch.tensor([[256]]), return_hidden=True).hidden
        model.lm_head.weight[256] = 1e3 * hidden[0, -1]
        assert sample_texts(model, tokenizer, 2) == ["", ""]
        model.lm_head.weight.fill_(float("nan"))
    assert sample_texts(model, tokenizer, 2) == []
    assert sample_texts(tiny_gpt(dtype=torch.float32, block_size=1), tokenizer, 2) == []
    few = {byte: i + 3 for i, byte in enumerate(EVERY_BYTE)} | {b"a": 0, b"b": 1, b"c": 2}
    characters = Tokenizer.build("char", CHARACTERS, few | {b"\n": 300}, {}, end_of_text=None)
    small = tiny_gpt(dtype=torch.float32, vocab_size=3)
    assert set("".join(sample_texts(small, characters, 2))) <= set("abc")


def test_samples_are_shown_as_text(tmp_path: Path, tiny_model: GPT) -> None:
    save_model(tmp_path / "x.ckpt", tiny_model, get_tokenizer("byte"))
    samples = ["\n\n# no heading\n```\nstill inside\n````\n", "\x1b[31m红\ta"]
    card = card_of(str(tmp_path / "x.ckpt"), samples=samples)
    assert "\n`````text\n# no heading\n```\nstill inside\n````\n`````\n" in card
    assert "```text\n\ufffd[31m红\ta\n```" in card
    assert "temperature 0.8 among the 50 likeliest tokens, with seed 1" in card


# The other files -----------------------------------------------------------------------------------------------------


def test_the_generation_config_has_our_defaults(tmp_path: Path, tiny_model: GPT) -> None:
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path / "x.ckpt", tiny_model, get_tokenizer("byte"))
    write_hf(open_source(str(tmp_path / "x.ckpt")), tmp_path / "hf")
    theirs, ours = transformers.GenerationConfig.from_pretrained(tmp_path / "hf"), GenerationConfig()
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (256, 256, None)
    assert theirs.do_sample is not ours.greedy
    assert (theirs.temperature, theirs.top_p) == (ours.temperature, ours.top_p)
    assert (theirs.top_k or None, theirs.min_p or 0.0) == (ours.top_k, ours.min_p)
    assert theirs.repetition_penalty == ours.repetition_penalty
    theirs.validate()
    values = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert not {"max_length", "max_new_tokens"} & values.keys()
    assert values["top_k"] == 0  # theirs is 50 where a file has none
    assert generation_json(None).keys() & {"eos_token_id", "pad_token_id"} == set()


def test_a_model_for_chat_ends_at_the_end_of_its_turn_too() -> None:
    chat = with_chat_template(get_tokenizer("byte"))
    assert generation_json(chat).items() >= {"eos_token_id": [256, 258], "pad_token_id": 256}.items()
    only = Tokenizer.build("x", chat.pattern, chat.ranks, {"<|im_end|>": 256}, end_of_text="<|im_end|>")
    assert generation_json(replace(only, chat_template="{{ x }}"))["eos_token_id"] == 256
    without = Tokenizer.build("x", chat.pattern, chat.ranks, {"<|eot_id|>": 256, "<|eom_id|>": 257}, end_of_text=None)
    assert generation_json(replace(without, chat_template="{{ x }}"))["eos_token_id"] == [256, 257]
    assert "eos_token_id" not in generation_json(without)


@pytest.mark.slow
def test_transformers_masks_the_exported_folder_as_we_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    chat = with_chat_template(get_tokenizer("byte"))
    save_model(tmp_path / "x.ckpt", tiny_gpt(dtype=torch.float32, vocab_size=259), chat)
    write_hf(open_source(str(tmp_path / "x.ckpt")), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    talk = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": " Hi\n"}]
    wanted = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    template = ChatTemplate(chat)
    ids, counts = template.encode([Message(turn["role"], turn["content"]) for turn in talk])
    template.close()
    assert (ids, [int(one) for one in counts]) == (wanted["input_ids"], wanted["assistant_masks"])
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [256, 258]
    again = open_source(str(tmp_path / "hf")).tokenizer
    assert again is not None and again.chat_template == chat.chat_template


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("without", [None, "chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_is_read_from_either_file(without: str | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path / "x.ckpt", tiny_gpt(dtype=torch.float32, vocab_size=259), chat_tokenizer(TEMPLATE))
    write_hf(open_source(str(tmp_path / "x.ckpt")), tmp_path / "hf")
    if without == "chat_template.jinja":  # as older programs read it
        (tmp_path / "hf" / without).unlink()
    elif without is not None:
        path = tmp_path / "hf" / without
        values = json.loads(path.read_text())
        assert values.pop("chat_template") == TEMPLATE
        path.write_text(json.dumps(values))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.chat_template == TEMPLATE
    shown = theirs.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    assert shown == "<|im_start|>user\n你好<|im_end|>\n"
    again = open_source(str(tmp_path / "hf")).tokenizer
    assert again is not None and again.chat_template == TEMPLATE


def test_without_a_template_there_is_no_file(tmp_path: Path, tiny_model: GPT) -> None:
    save_model(tmp_path / "x.ckpt", tiny_model, get_tokenizer("byte"))
    write_hf(open_source(str(tmp_path / "x.ckpt")), tmp_path / "hf")
    assert not (tmp_path / "hf/chat_template.jinja").exists() and not (tmp_path / "hf/README.md").exists()


@pytest.mark.slow
def test_the_program_writes_the_card(
    tmp_path: Path, tiny_model: GPT, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained(tmp_path / "x.ckpt", tiny_model, get_tokenizer("byte"))
    words = ["--license", "cc-by-4.0", "--language", "zh,no", "--to", "hf"]
    assert main(["convert", path, *words, str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert metadata(card)["license"] == "cc-by-4.0" and metadata(card)["language"] == ["zh", "no"]
    assert card.count("```text\n") == 3 and "\n# out\n" in card
    assert f"{sum(p.numel() for p in tiny_model.parameters()):,} parameters, `GPT2LMHeadModel`" in card
    assert main(["convert", path, str(tmp_path / "none"), "--to", "hf", "--samples", "0"]) == 0
    assert "## Samples" not in (tmp_path / "none/README.md").read_text("utf-8")
    monkeypatch.setattr("lit_gpt.convert.publish._SAMPLED_BYTES", 1000)
    assert main(["convert", path, str(tmp_path / "large"), "--to", "hf"]) == 0
    assert "--samples 3 does so" in capsys.readouterr().err
    assert main(["convert", path, str(tmp_path / "asked"), "--to", "hf", "--samples", "2"]) == 0
    assert (tmp_path / "asked/README.md").read_text("utf-8").count("```text\n") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.ckpt", "--license", "mit"], "--license is for Hugging Face folders: leave it out, or add --to hf"),
        (["a.ckpt", "--samples", "0"], "--samples is for Hugging Face folders"),
        (["a.ckpt", "--private"], "--private is for Hugging Face folders"),
        (["out", "--to", "hf", "--private"], "--private is for --push OWNER/NAME"),
        ([], "convert needs OUTPUT"),
        (["--to", "hf"], "--to hf needs OUTPUT"),
        (["--push", "some/model"], "--push needs --license"),
        (["out", "--to", "hf", "--samples", "21"], "--samples 21 is outside 0 … 20"),
        (["out", "--to", "hf", "--language", "zh,,en"], '--language "" is no code'),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "absent.ckpt", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert list(tmp_path.iterdir()) == []


RUN = """
model: {config: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 32}, optimizer: {lr: 0.01}}
data: {batch_size: 8, source: secret/text.py, path: data/tokens, tokenizer: char, val_split: "tail:0.1"}
trainer: {accelerator: cpu, precision: 32-true, max_steps: 8, val_check_interval: 4, check_val_every_n_epoch: null,
  num_sanity_val_steps: 0, enable_progress_bar: false, accumulate_grad_batches: 2}
samples: {max_new_tokens: 20}
"""


@pytest.mark.slow
def printed(block: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What an example of a card prints, run as a reader copies it."""
    capsys.readouterr()
    exec(block, {})
    return capsys.readouterr().out.strip()


def test_the_card_of_a_run_lacks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/text.py").write_text(Path(str(string.__file__)).read_text("utf-8") * 2, "utf-8")
    (tmp_path / "run.yaml").write_text(RUN)
    assert main(["fit", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    last = tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt"
    assert main(["convert", str(last), "--to", "hf", "out", "--license", "mit"]) == 0, capsys.readouterr().err
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert "not recorded" not in card and "secret" not in card
    fingerprint = open_local_split(load_index("data/tokens"), "train", "data/tokens").fingerprint
    batch, tokens = "| 16 rows of 32 tokens |", f"| {read_header(last).step * 16 * 32:,} |"
    for text in (f"`{fingerprint}`", "| `text.py` |", "| `tokens` |", "| `32-true` |", "| 1337 |", batch, tokens):
        assert text in card, text
    assert card.count("```text\n") == 3
    pytest.importorskip("transformers")
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        assert any(printed(block, capsys) for _ in range(10))  # some samples are white space, or end at once
