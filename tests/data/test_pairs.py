"""Pairs of answers: TRL's forms, what is refused, and their tokens, of which the answers count."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from chatting import chat_bytes, write_lines
from pairing import prepare_pairs, some_pairs

from lit_gpt.data.formats import MASKED_FORMATS, PairEncoder
from lit_gpt.data.inspect_shards import check
from lit_gpt.data.pairs import PreferencePair, dump_pair, load_pair, read_pairs, to_pair
from lit_gpt.data.prepare import prepare
from lit_gpt.data.stdlib_definitions import library_definitions
from lit_gpt.data.text_source import BadText, TextSource
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.chat_template import ChatTemplate, Message

U, A, B, S = (
    Message(role, text) for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"), ("system", "s"))
)


def turns(*messages: Message) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


MORE = (Message("assistant", "once"), Message("user", "and?"))
FORMS: dict[str, tuple[dict[str, Any], PreferencePair]] = {
    "text": ({"prompt": "q", "chosen": "a", "rejected": "b"}, PreferencePair([U], [A], [B])),
    "messages": (
        {"prompt": turns(S, U), "chosen": turns(A), "rejected": turns(B)},
        PreferencePair([S, U], [A], [B]),
    ),
    "without a prompt": (
        {"chosen": turns(S, U, A), "rejected": turns(S, U, B)},
        PreferencePair([S, U], [A], [B]),
    ),
    "with the prompt in both answers as well": (
        {"prompt": "q", "chosen": turns(U, A), "rejected": turns(U, B)},
        PreferencePair([U], [A], [B]),
    ),
    "several turns in the prompt": (
        {"prompt": turns(U, *MORE), "chosen": turns(A), "rejected": turns(B)},
        PreferencePair([U, *MORE], [A], [B]),
    ),
    "several turns in an answer": (
        {"prompt": "q", "chosen": turns(A, U, B), "rejected": turns(B)},
        PreferencePair([U], [A, U, B], [B]),
    ),
    "answers that begin alike": (
        {"prompt": "q", "chosen": turns(*MORE, A), "rejected": turns(*MORE, B)},
        PreferencePair([U, *MORE], [A], [B]),
    ),
    "other fields, and null": (
        {"prompt": None, "chosen": turns(U, A), "rejected": turns(U, B), "score": 3},
        PreferencePair([U], [A], [B]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_trl(form: str) -> None:
    values, expected = FORMS[form]
    pair = to_pair(values, "f.jsonl: line 1")
    assert pair == expected
    assert load_pair(dump_pair(pair)) == pair


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no chosen": ({"prompt": "q", "rejected": "b"}, 'has no "chosen": write {"prompt"'),
    "no rejected": ({"prompt": "q", "chosen": "a"}, 'has no "rejected"'),
    "null": ({"prompt": "q", "chosen": "a", "rejected": None}, 'has no "rejected"'),
    "no prompt": (
        {"chosen": "a", "rejected": "b"},
        'has no "prompt", and chosen and rejected do not begin with the same',
    ),
    "no common prompt": (
        {"chosen": turns(U, A), "rejected": turns(Message("user", "other"), A)},
        'has no "prompt", and chosen and rejected do not begin with the same messages',
    ),
    "equal": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    "equal messages": ({"chosen": turns(U, A), "rejected": turns(U, A)}, "chosen and rejected are equal"),
    "one is the beginning of the other": (
        {"chosen": turns(U, A), "rejected": turns(U, A, U, B)},
        "chosen has nothing after the prompt",
    ),
    "an answer of the user": (
        {"prompt": "q", "chosen": turns(U), "rejected": turns(B)},
        "chosen goes on with the role user",
    ),
    "an empty answer": ({"prompt": "q", "chosen": " ", "rejected": "b"}, "chosen is empty"),
    "an empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    "a number": ({"prompt": "q", "chosen": 5, "rejected": "b"}, "chosen: its messages are not a list but int"),
    "an unknown role": (
        {"prompt": "q", "chosen": [{"role": "narrator", "content": "x"}], "rejected": "b"},
        "unknown role 'narrator'",
    ),
    "no role": ({"prompt": "q", "chosen": [{"content": "x"}], "rejected": "b"}, "has no role"),
    "half a character": ({"prompt": "q\ud800", "chosen": "a", "rejected": "b"}, "a lone surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs_name_file_and_line(name: str, tmp_path: Path) -> None:
    values, message = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(some_pairs(1)[0]) + "\n" + json.dumps(values) + "\n", "utf-8")
    with pytest.raises(BadText) as raised:
        list(read_pairs(TextSource(path, "bad.jsonl")))
    assert message in str(raised.value)
    assert str(raised.value).startswith("bad.jsonl: line 2")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_both_conversations_are_whole_and_only_the_answers_count() -> None:
    encoder, template = PairEncoder(chat_bytes()), ChatTemplate(chat_bytes())
    try:
        prompt = [S, U, *MORE]
        chosen, rejected = encoder.encode(dump_pair(PreferencePair(prompt, [A], [B, U, A])), "line 1")
        start = len(template.encode_prompt(prompt))
        for encoded, answer in ((chosen, [A]), (rejected, [B, U, A])):
            whole = template.encode([*prompt, *answer])
            assert encoded.ids == whole.ids
            assert encoded.counts[:start] == [False] * start
            assert encoded.counts[start:] == whole.counts[start:]
            assert encoded.counts[start]
        assert sum(chosen.counts) == 2  # "a" and the token that ends the turn
    finally:
        encoder.close()
        template.close()


@pytest.mark.slow
def test_prepared_folder_holds_two_conversations_for_each_pair(tmp_path: Path) -> None:
    index = prepare_pairs(tmp_path / "out", some_pairs(60))
    assert index.format == "pairs"
    check(tmp_path / "out")
    with pytest.raises(UserError, match="equal"):
        prepare_pairs(tmp_path / "equal", [*some_pairs(3), {"prompt": "q", "chosen": "a", "rejected": "a"}])
    assert not (tmp_path / "equal" / "index.json").exists()


def test_folder_of_pairs_is_no_folder_of_conversations(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", some_pairs(3))
    with pytest.raises(UserError, match='has no field "messages"'):
        prepare(str(source), tmp_path / "out", "byte", data_format="chat", workers=1)


@pytest.mark.slow
def test_lines_of_stdlib_pairs_are_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(library_definitions(Path(asyncio.__file__).parent))  # of the whole library it takes seconds
    monkeypatch.setattr("lit_gpt.data.stdlib_chat.library_definitions", lambda root: few)
    lines = list(MASKED_FORMATS["pairs"].generated["stdlib-pairs"]())
    assert all(isinstance(to_pair(json.loads(line), "line"), PreferencePair) for line in lines)
    assert len(lines) > 50
