"""Beam, contrastive, tree and speculative decoding against brute force, formulas and chi-square."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from models import tiny_gpt
from scipy.stats import chisquare
from torch import Tensor

from lit_gpt.generation.complete import Completion, complete
from lit_gpt.generation.engine import Draft, Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.strategies.contrastive import contrastive_scores
from lit_gpt.generation.strategies.mcts import Node, leaf_value, revalue
from lit_gpt.generation.strategies.speculative import look_up
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import CacheStep
from lit_gpt.model.output import GPTOutput
from lit_gpt.tokenizer.tokenizer import get_tokenizer

BLOCK = 24
PROMPTS = [[1, 2, 3], [5] * 30, [1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]


random_gpt = partial(tiny_gpt, vocab_size=41, block_size=BLOCK)


def near(model: GPT, noise: float) -> GPT:
    """A draft that often agrees with `model`."""
    draft = GPT(model.config).eval().double()
    draft.load_state_dict({name: value + noise * torch.randn_like(value) for name, value in model.state_dict().items()})
    return draft


def run(engine: Engine, prompts: list[list[int]], **settings: Any) -> list[list[Completion]]:
    results = dict(complete(engine, prompts, GenerationConfig(**settings)))
    return [results[i] for i in range(len(prompts))]


class TableModel:
    """Logits are a function of the tokens so far, given by the test; they travel through the cache as keys."""

    def __init__(self, logprobs: Any, vocab_size: int, block_size: int = 64) -> None:
        self.logprobs = logprobs
        self.config = GPTConfig(vocab_size=vocab_size, block_size=block_size, n_layer=1, n_head=1, n_embd=1, head_dim=1)

    def __call__(self, idx: Tensor, cache: CacheStep, last_only: Any = False, return_hidden: bool = False) -> GPTOutput:
        keys = idx.double()[:, None, :, None]
        seen, _ = cache.update(0, keys, keys)
        rows = []
        for b in range(len(idx)):
            positions = cache.positions.expand(len(idx), -1)[b].tolist()
            rows.append([self.logprobs(seen[b, 0, : position + 1, 0].long().tolist()) for position in positions])
        logits = torch.tensor(rows, dtype=torch.float64)
        if isinstance(last_only, Tensor):
            return GPTOutput(logits[torch.arange(len(logits)), last_only][:, None])
        return GPTOutput(logits[:, -1:] if last_only else logits)

    def engine(self, **values: Any) -> Engine:
        return Engine(self, self.config, dtype=torch.float64, max_slots=64, **values)


def random_table(seed: int, V: int = 3) -> TableModel:
    def logprobs(text: list[int]) -> list[float]:
        generator = torch.Generator().manual_seed(hash((seed, *text)) % 2**31)
        return torch.randn(V, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1).tolist()

    return TableModel(logprobs, V)


# What must equal greedy -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "beam", "num_beams": 1},
        {"strategy": "contrastive", "penalty_alpha": 0},
        {"strategy": "contrastive", "top_k": 1},
        {"strategy": "mcts", "num_simulations": 1, "rollout_length": 2},
        {"strategy": "speculative", "temperature": 0},
        {"strategy": "speculative", "temperature": 0, "draft": "a good one"},
        {"strategy": "speculative", "temperature": 0, "draft": "a good one", "repetition_penalty": 1.2, "min_p": 0.1},
    ],
    ids=str,
)
def test_equal_to_greedy(settings: dict[str, Any]) -> None:
    model = random_gpt()
    engine = Engine(model, model.config, max_slots=20, draft=Draft(near(model, 0.02), model.config))
    length = 12 if settings["strategy"] == "mcts" else 36
    penalty = settings.get("repetition_penalty", 1.0)
    expected = run(engine, PROMPTS, strategy="greedy", max_new_tokens=length, repetition_penalty=penalty)
    results = run(engine, PROMPTS, max_new_tokens=length, **settings)
    assert [result[0].ids for result in results] == [result[0].ids for result in expected]


def test_a_draft_of_no_quality_changes_nothing_and_a_perfect_one_saves_passes() -> None:
    model = random_gpt()
    expected = run(Engine(model, model.config), PROMPTS[:1], strategy="greedy", max_new_tokens=20)
    for draft, most in ((random_gpt(seed=9), 21), (model, 5)):
        engine = Engine(model, model.config, draft=Draft(draft, draft.config))
        settings = {"strategy": "speculative", "temperature": 0, "draft": "x", "num_draft_tokens": 4}
        assert run(engine, PROMPTS[:1], max_new_tokens=20, **settings)[0][0].ids == expected[0][0].ids
        assert engine.model_runner.forwards <= most


# Beam search ----------------------------------------------------------------------------------------------------------


def brute_force(model: TableModel, prompt: list[int], steps: int, end: int, penalty: float) -> list[tuple[float, Any]]:
    """(score, ids) of every sequence that ends or has `steps` tokens, the best first."""
    found = []
    for n in range(1, steps + 1):
        for ids in itertools.product(range(model.config.vocab_size), repeat=n):
            if end in ids[:-1] or (ids[-1] != end and n < steps):
                continue
            total = sum(model.logprobs([*prompt, *ids[:i]])[token] for i, token in enumerate(ids))
            found.append((total / n**penalty, ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [-0.5, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_that_is_wide_enough_finds_the_best_of_all_sequences(seed: int, penalty: float) -> None:
    model, prompt = random_table(seed), [0, 1]
    best = brute_force(model, prompt, 4, end=2, penalty=penalty)
    settings = {"strategy": "beam", "num_beams": 20, "num_samples": 3, "length_penalty": penalty, "stop_token_ids": [2]}
    (completions,) = run(model.engine(), [prompt], max_new_tokens=4, **settings)
    assert [tuple(one.ids) for one in completions] == [ids for _, ids in best[:3]]
    assert [one.score for one in completions] == pytest.approx([score for score, _ in best[:3]])
    assert [one.finish_reason for one in completions] == ["stop" if ids[-1] == 2 else "length" for _, ids in best[:3]]


def test_more_beams_than_there_are_sequences() -> None:
    (completions,) = run(random_table(0).engine(), [[0]], strategy="beam", num_beams=8, num_samples=8, max_new_tokens=1)
    assert sorted(one.ids[0] for one in completions) == [0, 1, 2]


def test_a_beam_does_not_write_on_after_a_stop_string() -> None:
    tokenizer = get_tokenizer("byte")
    text = b"ab. cd. e"

    def logprobs(seen: list[int]) -> list[float]:
        values = [-9.0] * 257
        values[text[len(seen) - 1]] = 0.0
        return values

    model = TableModel(logprobs, 257)
    engine = Engine(model, model.config, tokenizer, dtype=torch.float64, max_slots=8)
    ((best, *_),) = run(engine, [[0]], strategy="beam", num_beams=2, max_new_tokens=9, stop=". c", length_penalty=0.0)
    assert (best.text, best.finish_reason, bytes(best.ids)) == ("ab", "stop", b"ab. c")


# Contrastive search ---------------------------------------------------------------------------------------------------


def test_the_contrastive_penalty_of_each_candidate_is_its_own() -> None:
    past = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=-1)
    candidates = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, -1.0]]), dim=-1)
    scores = contrastive_scores(torch.tensor([0.5, 0.3, 0.2]), candidates, past, alpha=0.4)
    half = math.sqrt(0.5)
    expected = torch.tensor([0.6 * 0.5 - 0.4, 0.6 * 0.3 - 0.4 * half, 0.6 * 0.2 + 0.4 * half])
    torch.testing.assert_close(scores, expected)


@torch.no_grad()
def contrastive_reference(model: GPT, prompt: list[int], n: int, k: int, alpha: float) -> list[int]:
    """The paper's formula with a whole forward pass for every candidate."""
    ids = list(prompt)
    for _ in range(n):
        logits, hidden, *_ = model(torch.tensor([ids]), return_hidden=True)
        p, candidates = logits[0, -1].softmax(-1).topk(k)
        scores = []
        for probability, token in zip(p, candidates):
            after = model(torch.tensor([[*ids, int(token)]]), return_hidden=True).hidden
            similarity = torch.cosine_similarity(after[0, -1][None], hidden[0], dim=-1)
            scores.append((1 - alpha) * probability - alpha * similarity.max())
        ids.append(int(candidates[int(torch.stack(scores).argmax())]))
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_contrastive_search_follows_the_formula(position: str) -> None:
    model = random_gpt(position=position)
    engine = Engine(model, model.config, max_slots=12)
    prompts = [[1, 2, 3], [4], [9, 8, 7, 6]]
    results = run(engine, prompts, strategy="contrastive", top_k=4, penalty_alpha=0.6, max_new_tokens=15)
    assert [one.ids for (one,) in results] == [contrastive_reference(model, p, 15, 4, 0.6) for p in prompts]


# Tree search ----------------------------------------------------------------------------------------------------------


def trap(seen: list[int]) -> list[float]:
    """Token 0 looks best at first and leads to a swamp; token 1 leads to certainty."""
    first = seen[1] if len(seen) > 1 else None
    shares = {None: [0.6, 0.4, 0.0], 0: [0.34, 0.33, 0.33], 1: [0.01, 0.98, 0.01], 2: [0.34, 0.33, 0.33]}[first]
    return [math.log(share) if share else -math.inf for share in shares]


def mean_logprob(ids: list[int]) -> float:
    return sum(trap([2, *ids[:i]])[token] for i, token in enumerate(ids)) / len(ids)


def test_tree_search_looks_ahead_where_greedy_does_not() -> None:
    engine = TableModel(trap, 3).engine()
    ((greedy,),) = run(engine, [[2]], strategy="greedy", max_new_tokens=5)
    ((found,),) = run(engine, [[2]], strategy="mcts", num_simulations=30, rollout_length=4, max_new_tokens=5)
    assert (greedy.ids[0], found.ids) == (0, [1, 1, 1, 1, 1])
    assert mean_logprob(found.ids) > mean_logprob(greedy.ids)


def test_a_leaf_is_worth_its_path_too_and_a_kept_subtree_is_valued_from_its_new_root() -> None:
    leaf = Node(1, math.log(0.5), ends=1, ahead=(0.0, 3))  # a certain tail of three tokens
    path = math.log(0.001) + leaf.logprob
    assert leaf_value(leaf, path, 2) == pytest.approx(math.exp(path / 5))
    child = Node(0, math.log(0.001), [leaf], visits=2, total=9.0, ends=1, ahead=(math.log(0.25), 1))
    revalue(child, -child.logprob, -1)
    assert leaf.total == pytest.approx(math.exp(math.log(0.5) / 4))
    assert child.total == pytest.approx(0.25 + leaf.total)


def test_tree_search_follows_the_callers_reward() -> None:
    model = random_table(1, V=5)

    def twos(ids: list[int]) -> float:
        return ids.count(2) / len(ids)

    generation_config = GenerationConfig(
        strategy="mcts", num_simulations=60, rollout_length=0, max_new_tokens=6, c_puct=0.5
    )
    ((_, (rewarded,)),) = complete(model.engine(), [[0]], generation_config, value=twos)
    ((plain,),) = run(model.engine(), [[0]], strategy="mcts", num_simulations=60, rollout_length=0, max_new_tokens=6)
    assert twos(rewarded.ids) > twos(plain.ids)
    assert rewarded.ids.count(2) >= 4


def test_tree_search_ends_with_end_of_text() -> None:
    def logprobs(seen: list[int]) -> list[float]:
        return [0.0, -5.0] if len(seen) < 4 else [-5.0, 0.0]

    engine = TableModel(logprobs, 2).engine()
    settings = {"strategy": "mcts", "num_simulations": 8, "max_new_tokens": 20, "stop_token_ids": [1]}
    ((one,),) = run(engine, [[0]], **settings)
    assert (one.ids, one.finish_reason) == ([0, 0, 0, 1], "stop")


# Speculative decoding -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["ngram", "a poor one"])
def test_speculative_samples_have_the_models_distribution(draft: str) -> None:
    """Chi-square over all texts of three tokens; the prompt repeats itself, which look-up needs."""
    model, poor = random_table(3), random_table(4)
    engine = model.engine(draft=Draft(poor, poor.config))
    prompt, n = [0, 1, 2, 0, 1], 400
    settings = {"strategy": "speculative", "draft": draft, "num_draft_tokens": 2, "max_new_tokens": 3, "top_p": 0.95}
    counts: dict[tuple[int, ...], int] = {}
    (completions,) = run(engine, [prompt], num_samples=n, seed=1, **settings)
    for one in completions:
        counts[tuple(one.ids)] = counts.get(tuple(one.ids), 0) + 1
    expected = {}
    for ids in itertools.product(range(3), repeat=3):
        rows = [torch.tensor([model.logprobs([*prompt, *ids[:i]])], dtype=torch.float64) for i in range(3)]
        share = math.prod(nucleus_share(row[0], token, 0.95) for row, token in zip(rows, ids))
        if share:
            expected[ids] = n * share
    assert set(counts) <= set(expected)
    large = [ids for ids in expected if expected[ids] >= 5]
    observed = [counts.get(ids, 0) for ids in large] + [n - sum(counts.get(ids, 0) for ids in large)]
    wanted = [expected[ids] for ids in large] + [n - sum(expected[ids] for ids in large)]
    if wanted[-1] < 1e-6:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, wanted).pvalue > 1e-3


def nucleus_share(logits: Tensor, token: int, p: float) -> float:
    """Probability of `token` among the smallest set with a mass of at least p, written down anew."""
    ranked = sorted(enumerate(logits.softmax(-1).tolist()), key=lambda item: -item[1])
    kept: dict[int, float] = {}
    for i, share in ranked:
        if sum(kept.values()) >= p:
            break
        kept[i] = share
    return kept.get(token, 0.0) / sum(kept.values())


@pytest.mark.slow
def test_speculative_text_is_the_same_alone_and_in_company() -> None:
    model = random_gpt()
    draft = Draft(near(model, 0.05), model.config)
    settings = {"strategy": "speculative", "draft": "x", "max_new_tokens": 30, "seed": 3}
    alone = [run(Engine(model, model.config, draft=draft), [prompt], **settings)[0][0].ids for prompt in PROMPTS]
    together = run(Engine(model, model.config, draft=draft, max_slots=3), PROMPTS, **settings)
    assert [one.ids for (one,) in together] == alone


def test_look_up() -> None:
    assert look_up([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert look_up([1, 2, 9, 2, 1, 2], 2) == [9, 2]  # the longer match is the better one
    assert look_up([7, 1, 7, 2, 7], 1) == [2]  # of equals the latest
    assert look_up([1, 2, 3], 3) == look_up([1], 3) == look_up([1, 1], 0) == []


# All of them ----------------------------------------------------------------------------------------------------------


def test_all_strategies_together_are_what_each_is_alone() -> None:
    model = random_gpt()
    draft = Draft(near(model, 0.05), model.config)
    many: list[dict[str, Any]] = [
        {"strategy": "sample", "seed": 1, "top_k": 5},
        {"strategy": "beam", "num_beams": 3},
        {"strategy": "contrastive", "top_k": 3},
        {"strategy": "mcts", "num_simulations": 4, "rollout_length": 2},
        {"strategy": "speculative", "seed": 2, "draft": "x"},
        {"strategy": "greedy", "frequency_penalty": 0.5},
    ]
    settings = [GenerationConfig(max_new_tokens=10, **values) for values in many]
    alone = []
    for generation_config in settings:
        ((_, (one,)),) = complete(Engine(model, model.config, draft=draft), [[3, 1, 4]], generation_config)
        alone.append(one.ids)
    engine = Engine(model, model.config, draft=draft, max_slots=6)
    requests = [engine.submit([3, 1, 4], generation_config) for generation_config in settings]
    ids: dict[int, list[int]] = {request: [] for request in requests}
    for output in engine.drain():
        ids[output.request] += [token.id for token in output.tokens]
    assert [ids[request] for request in requests] == alone


@pytest.mark.parametrize("strategy", ["sample", "beam", "contrastive", "mcts", "speculative"])
def test_reported_logprobs_are_the_models(strategy: str) -> None:
    model = random_gpt()
    engine = Engine(model, model.config)
    settings = {"strategy": strategy, "logprobs": 2, "max_new_tokens": 6, "prompt_logprobs": 1}
    if strategy in ("sample", "speculative"):
        settings |= {"temperature": 0.7, "seed": 1}
    prompt = [3, 1, 4, 3, 1]
    ((one, *_),) = run(engine, [prompt], **settings)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *one.ids]])).logits[0]
    raw = logits.log_softmax(-1)
    shaped = (logits / settings.get("temperature", 1.0)).log_softmax(-1)  # type: ignore[operator]
    for i, token in enumerate(one.tokens, len(prompt) - 1):
        assert token.logprob == pytest.approx(raw[i, token.id].item())
        assert token.processed_logprob == pytest.approx(shaped[i, token.id].item())
        assert [j for j, _ in token.top] == raw[i].topk(2).indices.tolist()
    assert one.prompt is not None
    assert [token.id for token in one.prompt] == prompt
    expected = [None, *(raw[i, token].item() for i, token in enumerate(prompt[1:]))]
    assert [token.logprob for token in one.prompt] == pytest.approx(expected)
