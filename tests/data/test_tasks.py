"""Files of tasks: what a line means, which lines are refused, which tokens are scored, and each once on any ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from environment import FIXTURES
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.data.loader import RankShare
from lit_gpt.data.task_batches import TaskDataModule, TaskLoader
from lit_gpt.data.tasks import Question, ScoredText, encode_questions, read_questions
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer
from lit_gpt.tokenizer.train import train_tokenizer


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return str(path)


def test_lines_of_both_kinds(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tasks.jsonl",
        {"query": "The capital of France is", "choices": ["Rome", "Paris"], "gold": 1, "id": "an id is no matter"},
        "",
        {"query": "春眠不觉", "choices": ["晓", "夜"], "gold": 0, "target_delimiter": ""},
        {"context": "To be, or not to", "continuation": " be"},
    )
    assert read_questions(path) == [
        Question(f"{path}: line 1", "The capital of France is", (" Rome", " Paris"), ("Rome", "Paris"), 1),
        Question(f"{path}: line 3", "春眠不觉", ("晓", "夜"), ("晓", "夜"), 0),
        Question(f"{path}: line 4", "To be, or not to", (" be",)),
    ]


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ([1], "line 2 is not an object such as"),
        ({}, 'line 2 has no "query" with "choices", and no "context"'),
        ({"question": "q"}, "it has ['question']: write"),
        ({**GOOD, "context": "c"}, "line 2 is a question and a cloze text at once"),
        ({"choices": ["a", "b"], "gold": 0}, "line 2: query is missing"),
        ({**GOOD, "query": 5}, "line 2: query is 5, not text"),
        ({**GOOD, "choices": ["a"]}, "choices is ['a'], not a list of two texts or more"),
        ({**GOOD, "choices": "ab"}, "choices is 'ab', not a list"),
        ({**GOOD, "choices": ["a", ""]}, "line 2: choice 1 is empty"),
        ({**GOOD, "choices": ["a", None]}, "line 2: choice 1 is None, not text"),
        ({**GOOD, "target_delimiter": None}, "target_delimiter is None, not text"),
        ({"query": "q", "choices": ["a", "b"]}, '"gold" is None, not the number of one of its 2 choices'),
        *(({**GOOD, "gold": gold}, f'"gold" is {gold}') for gold in (2, -1, True, 0.5)),
        ({"context": "c"}, "line 2: continuation is missing"),
        ({"continuation": "c"}, "line 2: context is missing"),
        ({"context": "c", "continuation": ""}, "line 2: continuation is empty, so there is nothing to score"),
        ('{"context": "\\ud800", "continuation": "a"}', "line 2: context: a lone surrogate"),
    ],
    ids=str,
)
def test_a_bad_line_is_named_with_its_number(line: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tasks.jsonl", GOOD, line)
    with pytest.raises(UserError) as raised:
        read_questions(path)
    assert message in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_files_that_have_no_questions(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "absent.jsonl", "no such file"), (tmp_path, "no such file")):
        with pytest.raises(UserError, match=message):
            read_questions(str(path))
    with pytest.raises(UserError, match="it has no questions: write one on each line"):
        read_questions(write(tmp_path / "empty.jsonl", ""))


# ---------------------------------------------------------------- tokens


@cache
def merges() -> Tokenizer:
    """Byte-pair merges, some of which cross from a context into what follows it."""
    return train_tokenizer("bpe:400", [(FIXTURES / "text.txt").read_text("utf-8")])


WORDS = st.lists(st.sampled_from(["hear", " me", "speak", " ", "  ", "\n", ".", "春眠", "不", "ll", " go"]), max_size=6)


@pytest.mark.slow
@given(before=WORDS, after=WORDS, bos=st.booleans(), block_size=st.integers(1, 12))
def test_the_tokens_are_those_of_lm_evaluation_harness(
    before: list[str], after: list[str], bos: bool, block_size: int
) -> None:
    """Written as its 0.4.13 has it: `_encode_pair`, `loglikelihood` and the slice of `_loglikelihood_tokens`."""
    tokenizer = replace(merges(), bos_id=3) if bos else merges()
    start = [3] if bos else []
    context, continuation = "".join(before), "".join(after)
    n_spaces = len(context) - len(context.rstrip())
    moved, kept = (context[-n_spaces:] + continuation, context[:-n_spaces]) if n_spaces else (continuation, context)
    if kept:
        context_enc = start + tokenizer.encode(kept)
        continuation_enc = (start + tokenizer.encode(kept + moved))[len(context_enc) :]
    else:
        context_enc, continuation_enc = [3 if bos else tokenizer.eot_id], tokenizer.encode(moved)
    question = Question("x: line 1", context, (continuation,))
    if not 0 < len(continuation_enc) <= block_size:
        with pytest.raises(UserError, match=r"x: line 1: the continuation has (no token of its own|\d+ tokens)"):
            encode_questions([question], tokenizer, block_size)
        return
    ((ids, scored, is_cut),) = encode_questions([question], tokenizer, block_size)
    whole = context_enc + continuation_enc
    assert ids[:-1] == whole[-(block_size + 1) :][:-1]
    assert ids[-scored:] == continuation_enc
    assert is_cut == (len(whole) > block_size + 1)


def test_a_tokenizer_without_an_end_of_text_has_nothing_before_an_empty_context() -> None:
    tokenizer = replace(get_tokenizer("byte"), end_of_text=None)
    with pytest.raises(UserError, match="x: there is nothing before what is to be scored"):
        encode_questions([Question("x", "", ("a",))], tokenizer, 8)


# ---------------------------------------------------------------- batches


@pytest.mark.slow
@given(
    sizes=st.lists(st.tuples(st.integers(2, 9), st.integers(1, 8)), min_size=1, max_size=30),
    rows=st.integers(1, 4),
    ranks=st.sampled_from([1, 2, 3]),
)
def test_each_text_is_scored_once_in_batches_of_one_shape(sizes: list[tuple[int, int]], rows: int, ranks: int) -> None:
    texts = [
        ScoredText(list(range(10 * number, 10 * number + size)), min(scored, size - 1), False)
        for number, (size, scored) in enumerate(sizes)
    ]
    loaders = [TaskLoader(texts, RankShare(rows, ranks, rank)) for rank in range(ranks)]
    seen = []
    for batches in zip(*loaders, strict=True):
        assert len({batch.idx.shape for batch in batches}) == 1
        for batch in batches:
            for idx, targets, number in zip(*batch):
                if number < 0:
                    assert not idx.any() and (targets == IGNORE_INDEX).all()
                    continue
                ids, scored, _ = texts[int(number)]
                assert idx[: len(ids) - 1].tolist() == ids[:-1] and not idx[len(ids) - 1 :].any()
                wanted = [IGNORE_INDEX] * (len(ids) - 1 - scored) + ids[-scored:]
                assert targets.tolist() == wanted + [IGNORE_INDEX] * (len(targets) - len(wanted))
                seen.append(int(number))
    assert sorted(seen) == list(range(len(texts)))
    assert all(len(loader) == -(-len(texts) // (rows * ranks)) for loader in loaders)


def test_the_data_module_divides_its_batch_size_among_the_ranks() -> None:
    data = TaskDataModule([ScoredText([1, 2], 1, False)] * 10, batch_size=6)
    assert len(data.val_dataloader()) == 2
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(world_size=3, global_rank=1, strategy=strategy)  # type: ignore[assignment]
    assert [len(batch.numbers) for batch in data.val_dataloader()] == [2, 2]
