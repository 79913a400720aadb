"""Tokenizers of Hugging Face against our conversion of them, both ways: the same ids, or a refusal."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HubTokenizer

from lit_gpt.checkpoint.format import save_model
from lit_gpt.convert.recognise import load_source, open_source
from lit_gpt.convert.tokenizer_json import convert_tokenizer, read_tokenizer, write_tokenizer, write_tokenizer_config
from lit_gpt.convert.write import write_hf, write_lit_gpt
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer
from lit_gpt.tokenizer.train import train_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
CORPUS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; it's 2026 and they've 3.14 reasons.\n\n",
    "def f(x):\n    return [x ** 2 for x in range(100)]\n\n\tif x == y:\n        pass\n",
    "naïve café — Ελληνικά, Русский язык, 你好世界，日本語のテキスト 한국어 العربية हिन्दी 👩‍👩‍👧 🇩🇪\n",
    "DON'T WON'T I'LL you'll WE'RE aaaa aaaaaaa     spaces   \t tabs \r\n ends 1 22 333 4444\n",
] * 4
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STYLES = ["gpt2", "llama3", "qwen", "smollm2", "neox"]


def hub_tokenizer(style: str) -> HubTokenizer:
    """A byte-level BPE tokenizer as that family's `tokenizer.json` has it, trained here."""
    return HubTokenizer.from_str(_trained(style))


@cache
def _trained(style: str) -> str:
    tokenizer = HubTokenizer(models.BPE(ignore_merges=style == "llama3"))
    if style in ("qwen", "neox"):
        tokenizer.normalizer = normalizers.NFC()
    if style in ("llama3", "qwen"):
        split = pre_tokenizers.Split(Regex(LLAMA3 if style == "llama3" else QWEN), "isolated")
        steps: list[Any] = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if style == "smollm2":
        steps = [pre_tokenizers.Digits(individual_digits=True), *steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = SPECIALS if style == "smollm2" else []
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=first, show_progress=False),
    )
    tokenizer.add_special_tokens(SPECIALS)
    if style == "neox":
        tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)])
    if style == "llama3":
        number = tokenizer.token_to_id("<|im_start|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", number)]
        )
    return tokenizer.to_str()


def write_folder(folder: Path, tokenizer: HubTokenizer, **side: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **side}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module", params=STYLES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer of a folder, and ours."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, hub_tokenizer(request.param))
    ours = read_tokenizer(folder, {}, request.param)
    assert ours is not None
    return transformers.AutoTokenizer.from_pretrained(folder), ours


PIECES = [
    "'",
    "s",
    "LL",
    "ve",
    " ",
    "  ",
    " " * 25,
    "\n",
    "\r\n",
    "\t",
    "1",
    "22",
    "333",
    "a",
    "é",
    "e\u0301",
    "你",
    "👍🏽",
    "½",
    "㉐",
    "<|",
]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))


@pytest.mark.slow
@given(text=TEXTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_ids_on_any_text(both: tuple[Any, Tokenizer], text: str) -> None:
    theirs, ours = both
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == ids
    wanted = unicodedata.normalize("NFC", text) if ours.normalization else text
    assert ours.decode(ids) == wanted


@pytest.mark.slow
def test_digits_that_are_digits_to_one_library_only() -> None:
    """`Digits` cuts before some characters that the class N does not hold; a merge with the space would show it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "Ġð"])}
    hub = HubTokenizer(models.BPE(vocabulary, [("Ġ", "ð")]))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    hub.pre_tokenizer = pre_tokenizers.Sequence(steps)
    details = {"eos": None, "eos_id": None, "bos": None, "chat_template": None}
    ours = convert_tokenizer(json.loads(hub.to_str()), details, "tokenizer.json", "x")
    for start in range(0x10000, 0x20000, 256):
        text = "".join(f" {chr(code)}" for code in range(start, start + 256))  # each cut off by the next one's space
        assert ours.encode(text) == hub.encode(text).ids, hex(start)


def test_details_are_carried(tmp_path: Path) -> None:
    tokenizer = hub_tokenizer("llama3")
    write_folder(tmp_path, tokenizer, chat_template="{{ messages }}", eos_token={"content": "<|im_end|>"})
    ours = read_tokenizer(tmp_path, {}, "org/some-model")
    assert ours is not None
    assert ours.name == "some-model"
    assert ours.chat_template == "{{ messages }}"
    assert ours.eot_id == tokenizer.token_to_id("<|im_end|>")
    assert ours.bos_id == tokenizer.token_to_id("<|im_start|>")
    (tmp_path / "chat_template.jinja").write_text("{# newer #}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    number = tokenizer.token_to_id("<|endoftext|>")
    newer = read_tokenizer(tmp_path, {"eos_token_id": [number, 3]}, "x")
    assert newer is not None and newer.chat_template == "{# newer #}" and newer.eot_id == number
    qwen = hub_tokenizer("qwen")
    write_folder(tmp_path / "qwen", qwen)
    nfc = read_tokenizer(tmp_path / "qwen", {}, "x")
    assert nfc is not None and nfc.normalization == "NFC" and nfc.bos_id is None


def test_vocab_and_merges_files(tmp_path: Path) -> None:
    """GPT-2's own pair of files, without a `tokenizer.json`."""
    hub = hub_tokenizer("gpt2")
    hub.model.save(str(tmp_path))
    assert (tmp_path / "merges.txt").exists()
    ours = read_tokenizer(tmp_path, {}, "x")
    assert ours is not None
    for text in CORPUS:
        assert ours.encode(text) == hub.encode(text, add_special_tokens=False).ids


def characters(byte_fallback: bool) -> dict[str, Any]:
    """BPE over characters, without tokens for bytes."""
    hub = HubTokenizer(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True))
    hub.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    hub.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False))
    return json.loads(hub.to_str())


def changed(path: str, value: Any) -> dict[str, Any]:
    values = json.loads(hub_tokenizer("gpt2").to_str())
    *parents, last = path.split(".")
    inner = values
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return values


def unigram() -> dict[str, Any]:
    return json.loads(HubTokenizer(models.Unigram([("a", 0.0)])).to_str())


def reordered() -> dict[str, Any]:
    values = json.loads(hub_tokenizer("gpt2").to_str())
    merges = values["model"]["merges"]
    merges[10], merges[200] = merges[200], merges[10]
    return values


def unreachable() -> dict[str, Any]:
    """A token that no merges lead to: tiktoken would still find it."""
    values = json.loads(hub_tokenizer("gpt2").to_str())
    values["model"]["vocab"]["zyxw"] = 5000
    return values


REFUSALS = {
    "characters": (lambda: characters(False), "SentencePiece-like BPE"),
    "a byte is missing": (lambda: characters(True), "it lacks 256 of the 256 bytes"),
    "unigram": (unigram, "Unigram"),
    "lower case": (lambda: changed("normalizer", {"type": "Lowercase"}), "normalizer Lowercase"),
    "prefix space": (lambda: changed("pre_tokenizer.add_prefix_space", True), "add_prefix_space"),
    "dropout": (lambda: changed("model.dropout", 0.1), "dropout=0.1"),
    "merges out of order": (reordered, "out of the order of ids"),
    "a token out of reach": (unreachable, "'zyxw'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_tiktoken_cannot_do_is_refused_with_the_reason(case: str) -> None:
    make, message = REFUSALS[case]
    details = {"eos": "<|endoftext|>", "eos_id": None, "bos": None, "chat_template": None}
    with pytest.raises(UserError) as caught:
        convert_tokenizer(make(), details, "tokenizer.json", "x")
    assert message in str(caught.value)


def test_a_sentencepiece_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="SentencePiece"):
        read_tokenizer(tmp_path, {}, "meta-llama/Llama-2-7b")


def made(spec: str) -> Tokenizer:
    if spec == "byte":
        return get_tokenizer(spec)
    if spec in STYLES:
        values = json.loads(hub_tokenizer(spec).to_str())
        details = {"eos": "<|endoftext|>", "eos_id": None, "bos": None, "chat_template": "{{ x }}"}
        return convert_tokenizer(values, details, "tokenizer.json", spec)
    return train_tokenizer(spec, CORPUS)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["byte", "char", "bpe:500", *STYLES])
def test_ours_in_transformers_and_back(spec: str, tmp_path: Path) -> None:
    """A folder that we write gives the same ids in AutoTokenizer, and comes back with the same hash."""
    transformers = pytest.importorskip("transformers")
    ours = made(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(write_tokenizer(ours, spec)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(write_tokenizer_config(ours, 64)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eot_id
    assert theirs.chat_template == ours.chat_template

    @given(text=TEXTS)
    @settings(max_examples=30, deadline=None)
    def same_ids(text: str) -> None:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)

    same_ids()
    if ours.bos_id is not None:
        assert theirs("a")["input_ids"] == [ours.bos_id, *ours.encode("a")]
    back = read_tokenizer(tmp_path, {}, spec)
    assert back is not None
    assert (back.hash, back.eot_id, back.bos_id) == (ours.hash, ours.eot_id, ours.bos_id)


@pytest.mark.slow
def test_a_whole_model_with_its_tokenizer(tmp_path: Path) -> None:
    """Text in, the same text out: ours, transformers with the folder we write, and ours from that folder again."""
    transformers = pytest.importorskip("transformers")
    ours = train_tokenizer("bpe:400", CORPUS)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=ours.n_vocab, padded_vocab_size=448, block_size=64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(tmp_path / "a.ckpt", model, ours)
    write_hf(open_source(str(tmp_path / "a.ckpt")), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert reference.dtype == torch.float64
    prompt = theirs("The quick brown", return_tensors="pt")
    wanted = reference.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist()
    ids = ours.encode("The quick brown")
    with torch.no_grad():
        while len(ids) < len(wanted):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids == wanted
    write_lit_gpt(open_source(str(tmp_path / "hf")), tmp_path / "b.ckpt")
    again, tokenizer = load_source(str(tmp_path / "b.ckpt"))
    assert tokenizer is not None and tokenizer.hash == ours.hash
    assert again.config.padded_vocab_size is None  # rows that mean nothing are left behind
    assert torch.equal(again.wte.weight, model.wte.weight[: ours.n_vocab])
    with torch.no_grad():
        idx = torch.tensor([ids])
        torch.testing.assert_close(again(idx).logits, model(idx).logits, rtol=1e-12, atol=1e-12)
