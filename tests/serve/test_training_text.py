"""`POST /v1/continuations`: what followed in the training tokens, counted by hand in the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import CONTEXT, Serving

from lit_gpt.data.prepare import prepare
from lit_gpt.errors import UserError
from lit_gpt.serve.options import parse
from lit_gpt.serve.training_text import open_training_text
from lit_gpt.tokenizer.tokenizer import get_tokenizer

DOCUMENTS = ["the cat sat on the mat and the cow came", "the car is the best 车 of the city", "no article here"]
TEXT = "\n".join(DOCUMENTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_text(text, "utf-8")
    prepare([str(tmp_path / f"{number}.txt") for number in range(3)], tmp_path / "shards", "byte", val_split="hash:0")
    return tmp_path / "shards"


@pytest.fixture
def reading(start: Callable[..., Serving], folder: Path) -> Serving:
    return start(training_text=open_training_text(str(folder), get_tokenizer("byte")))


def test_what_followed_is_counted(reading: Serving) -> None:
    answer = reading.post("/v1/continuations", {"prompt": "xyz the c", "limit": 2}).json()
    whole = "".join(text + "\0" for text in DOCUMENTS).encode()
    assert answer["suffix"] == " the c" and answer["suffix_tokens"] == 6
    followed = Counter(chr(whole[i + 6]) for i in range(len(whole) - 6) if whole[i : i + 6] == b" the c")
    assert answer["occurrences"] == sum(followed.values()) == 2
    assert {each["text"]: each["count"] for each in answer["next"]} == followed
    assert [each["share"] for each in answer["next"]] == [0.5, 0.5] and answer["rest"] == 0
    assert answer["tokens_searched"] == len(TEXT.encode()) + 1


def test_the_excerpts_end_with_their_documents(reading: Serving) -> None:
    answer = reading.post("/v1/continuations", {"prompt": "the c", "excerpts": 20}).json()
    assert answer["occurrences"] == 4 and len(answer["excerpts"]) == 4
    for excerpt in answer["excerpts"]:
        assert excerpt["before"].endswith("the c") and excerpt["shard"] == "train_000000.bin"
        shown = excerpt["before"] + excerpt["next"] + excerpt["after"]
        assert any(shown in text for text in DOCUMENTS)
    ended = reading.post("/v1/continuations", {"prompt": "city", "limit": 1}).json()
    assert ended["next"][0]["count"] == 1 and ended["excerpts"][0]["after"] == ""


def test_what_was_generated_counts_as_text(reading: Serving) -> None:
    whole = reading.post("/v1/continuations", {"prompt": "the best 车"}).json()
    parts = reading.post("/v1/continuations", {"prompt": "the best", "generated": list(" 车".encode())}).json()
    assert whole == parts and whole["suffix_tokens"] == len("the best 车".encode())


def test_nothing_of_it_occurs(reading: Serving) -> None:
    answer = reading.post("/v1/continuations", {"prompt": "the Q"}).json()
    assert (answer["suffix"], answer["occurrences"], answer["next"], answer["excerpts"]) == ("", 0, [], [])


def test_without_training_text_it_says_how_to_get_it(server: Serving) -> None:
    refused = server.post("/v1/continuations", {"prompt": "a"})
    assert refused.status_code == 404 and "--data_path" in refused.json()["error"]["message"]


def test_bad_input(reading: Serving) -> None:
    for body, param in (({"prompt": [300]}, "prompt"), ({"prompt": "a", "generated": [300]}, "generated")):
        assert reading.post("/v1/continuations", body).json()["error"]["param"] == param
    assert reading.post("/v1/continuations", {"prompt": "a", "limit": 0}).status_code == 400
    assert reading.post("/v1/continuations", {"prompt": "a" * (50 * CONTEXT)}).status_code == 400


def test_a_folder_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("春眠不觉晓", "utf-8")
    prepare([str(tmp_path / "c.txt")], tmp_path / "other", "char", val_split="hash:0")
    with pytest.raises(UserError, match=r"data_path=.*other holds shards of the tokenizer char, the model has byte"):
        open_training_text(str(tmp_path / "other"), get_tokenizer("byte"))
    with pytest.raises(UserError, match="no such folder"):
        open_training_text(str(tmp_path / "none"), get_tokenizer("byte"))


def test_the_option_is_parsed() -> None:
    assert parse(["--ckpt_path", "x.ckpt", "--data_path", "data/stdlib"]).data_path == "data/stdlib"
