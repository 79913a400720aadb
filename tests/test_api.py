"""`load` and what it returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from environment import ROOT
from models import tiny_gpt

import lit_gpt
from lit_gpt.api import Generator, load
from lit_gpt.checkpoint.format import save_model
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_gpt(std=0.2, dtype=torch.float32, n_head=2)


@pytest.fixture
def gpt(model: GPT) -> Generator:
    return Generator(model, get_tokenizer("byte"))


@pytest.mark.slow
def test_load_gives_a_generator(model: GPT, gpt: Generator, tmp_path: Path) -> None:
    save_model(tmp_path / "x.ckpt", model, get_tokenizer("byte"))
    loaded = lit_gpt.load(str(tmp_path / "x.ckpt"), precision="fp32", device="cpu")
    assert loaded.generate("ROMEO:", strategy="greedy") == gpt.generate("ROMEO:", strategy="greedy")
    assert loaded.config == model.config
    for name, message in (("missing.ckpt", "missing.ckpt"), ("x.ckpt", "device='tpu' cannot be used")):
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / name), device="tpu" if name == "x.ckpt" else "cpu")


LOADING = """
import sys
import lit_gpt
heavy = {"torch._dynamo", "sympy", "lightning", "torchmetrics", "matplotlib", "huggingface_hub", "tokenizers"}
lit_gpt.load(sys.argv[1])
print("load:", *sorted(heavy & set(sys.modules)))
from lit_gpt.serve.main import build_service, create_app, parse
create_app(build_service(parse(["--ckpt_path", sys.argv[1]]), sys.argv[1]))
print("serve:", *sorted(heavy & set(sys.modules)))
"""


@pytest.mark.slow
def test_loading_imports_no_compiler_and_nothing_of_other_projects_checkpoints(model: GPT, tmp_path: Path) -> None:
    save_model(tmp_path / "x.ckpt", model, get_tokenizer("byte"))
    command = [sys.executable, "-c", LOADING, str(tmp_path / "x.ckpt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "load:\nserve:\n"


def test_generate_takes_one_prompt_or_several_texts_or_ids(gpt: Generator) -> None:
    settings = {"max_new_tokens": 6, "seed": 1}
    one = gpt.generate("ROMEO:", **settings)
    assert isinstance(one, str)
    assert gpt.generate(list(b"ROMEO:"), **settings) == one
    assert gpt.generate(["ROMEO:", [13, 7, 42]], **settings) == [one, gpt.generate([13, 7, 42], **settings)]
    first, second = gpt.generate("ROMEO:", num_samples=2, **settings)
    assert first == one != second
    assert gpt.generate([]) == []
    assert len(gpt.generate(["a", "b"], strategy="beam", num_beams=4, num_samples=2, max_new_tokens=4)[1]) == 2


def test_a_stream_is_the_text_in_whole_characters(gpt: Generator) -> None:
    settings = {"max_new_tokens": 60, "seed": 2, "logit_bias": {228: 9.0, 189: 9.0, 160: 9.0}}
    pieces = list(gpt.stream("ROMEO:", **settings))
    assert "".join(pieces) == gpt.generate("ROMEO:", **settings)
    assert len(pieces) > 5


def test_a_stream_that_is_left_frees_its_slot_and_does_not_disturb(gpt: Generator) -> None:
    expected = gpt.generate("a", seed=1, max_new_tokens=20)
    stream = gpt.stream("b", seed=2, max_new_tokens=20)
    next(stream)
    assert gpt.generate("a", seed=1, max_new_tokens=20) == expected
    stream.close()  # type: ignore[attr-defined]
    assert not any(engine.has_work for engine in gpt._engines.values())


def test_logprobs_are_the_models_even_past_the_context(model: GPT, gpt: Generator) -> None:
    text = "To be, or not to be, that is the question: whether"
    tokens = gpt.logprobs(text, top=3)
    ids = list(text.encode())
    assert [token.id for token in tokens] == ids
    assert tokens[0].logprob is None
    with torch.no_grad():
        for i in (1, 20, 31, 32, 33, 49):
            cropped = torch.tensor([ids[max(0, i - 32) : i]])
            expected = model(cropped).logits[0, -1].log_softmax(-1)
            assert tokens[i].logprob == pytest.approx(expected[ids[i]].item(), rel=1e-4)
            assert [j for j, _ in tokens[i].top] == expected.topk(3).indices.tolist()


def test_a_draft_checkpoint_changes_no_greedy_text(model: GPT, gpt: Generator, tmp_path: Path) -> None:
    torch.manual_seed(1)
    small = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=16))
    save_model(tmp_path / "draft.ckpt", small, get_tokenizer("byte"))
    settings = {"strategy": "speculative", "temperature": 0, "max_new_tokens": 20}
    expected = gpt.generate("ROMEO:", strategy="greedy", max_new_tokens=20)
    assert gpt.generate("ROMEO:", draft=str(tmp_path / "draft.ckpt"), **settings) == expected
    assert gpt.generate("ROMEO:", **settings) == expected


def test_a_model_of_bare_ids(model: GPT) -> None:
    bare = Generator(model, None)
    ids = bare.generate([1, 2, 3], max_new_tokens=4, strategy="greedy")
    assert len(ids) == 4
    assert bare.generate([[1, 2, 3], [4]], max_new_tokens=4, strategy="greedy")[0] == ids
    for call in (lambda: bare.generate("text"), lambda: bare.stream([1])):
        with pytest.raises(UserError, match="came without a tokenizer"):
            call()


def test_wrong_settings_are_refused(gpt: Generator) -> None:
    with pytest.raises(UserError, match=r'unknown generation option "temprature": did you mean "temperature"\?'):
        gpt.generate("a", temprature=1)
    with pytest.raises(UserError, match="outside the vocabulary"):
        gpt.generate([[1], [999]])
    assert gpt.generate("a", max_new_tokens=2, seed=1) == gpt.generate("a", max_new_tokens=2, seed=1)
