"""Monte Carlo tree search with PUCT, as in AlphaZero: tokens are chosen by the value of what follows them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from lit_gpt.generation import logits as L
from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation import ForwardSteps, Generation, StrategySteps
from lit_gpt.generation.outputs import Token
from lit_gpt.generation.slots import CachedSequence


@dataclass(eq=False)
class Node:
    """One token after those above it.

    Attributes:
        token: its id.
        logprob: after the tokens above it.
        children: the likeliest tokens after it; none before it was visited, or if the text ends with it.
        visits: simulations that went through it.
        total: sum of their values.
        ends: simulations that ended at it: its own visit, and every further one where the text ends with it.
        reward: its value by a function that the caller gave.
        ahead: sum of the log-probabilities, and number, of the tokens that its roll-out wrote.
        logits: (1, V) after it, kept for the report if log-probabilities are asked for or somebody observes.
    """

    token: int
    logprob: float
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    ends: int = 0
    reward: float | None = None
    ahead: tuple[float, int] = (0.0, 0)
    logits: Tensor | None = None


def mcts(generation: Generation) -> StrategySteps:
    """Before each token: `num_simulations` walks from the text to a leaf of the tree, then the most visited child.

    A walk takes the child with the largest Q + c_puct · P · √N_parent / (1 + N_child), expands the leaf by its
    `top_k` likeliest tokens, values it, and adds the value to every node on the way. What was found out about the
    chosen child is kept for the next token.
    """
    request, _ = yield from generation.read_prompt()
    sequence, root, text = request.sequence, Node(-1, 0.0, visits=1), list(generation.prompt)
    _expand(generation, root, [], request.logits)
    while True:
        for _ in range(generation.generation_config.num_simulations):
            yield from _simulate(generation, sequence, root, text)
        best = max(root.children, key=lambda child: (child.visits, child.total))
        token = Token(best.token) if root.logits is None else generation.sampler.report(root.logits[-1], best.token)
        if generation.emit(token):
            return
        text.append(best.token)
        root = best
        revalue(root, -root.logprob, -1)  # the path now begins after it


def _simulate(generation: Generation, sequence: CachedSequence, root: Node, text: list[int]) -> StrategySteps:
    """One walk from the root to a leaf, and its value back to the root."""
    path = [root]
    while path[-1].children:
        path.append(_select(path[-1], generation.generation_config.c_puct))
    leaf, ids = path[-1], [node.token for node in path[1:]]
    if not leaf.visits:
        written: list[int] = []
        if not generation.ends(ids):
            written = yield from _look_ahead(generation, sequence, leaf, text, ids)
        if generation.value is not None:
            leaf.reward = float(generation.value([*text, *ids, *written]))
    value = leaf_value(leaf, sum(node.logprob for node in path[1:]), len(ids))
    leaf.ends += 1
    for node in path:
        node.visits += 1
        node.total += value


def puct(node: Node, parent_visits: int, c_puct: float) -> float:
    """Q + c_puct · P · √N_parent / (1 + N)."""
    quality = node.total / node.visits if node.visits else 0.0
    return quality + c_puct * math.exp(node.logprob) * math.sqrt(parent_visits) / (1 + node.visits)


def _select(node: Node, c_puct: float) -> Node:
    return max(node.children, key=lambda child: puct(child, node.visits, c_puct))  # the likeliest of equals


def _look_ahead(
    generation: Generation, sequence: CachedSequence, leaf: Node, text: list[int], ids: list[int]
) -> ForwardSteps[list[int]]:
    """Read the leaf's path, expand it, and write on greedily for `rollout_length` tokens, which are returned."""
    known = _shared(sequence, text, ids)
    generation.truncate(sequence, known)
    new = [*text, *ids][known:]
    (request,) = yield [ForwardRequest(sequence, new, num_logits=len(new))]
    _expand(generation, leaf, ids, request.logits[-1:])
    written: list[int] = []
    total = 0.0
    while len(written) < generation.generation_config.rollout_length and not generation.ends([*ids, *written]):
        if written:
            (request,) = yield [ForwardRequest(sequence, written[-1:])]
        shaped = generation.sampler.after([*ids, *written]).process(request.logits[-1:])
        token = int(L.argmax(shaped))
        total += shaped[0].log_softmax(-1)[token].item()
        written.append(token)
    leaf.ahead = (total, len(written))
    return written


def _shared(sequence: CachedSequence, text: list[int], ids: list[int]) -> int:
    """Tokens of text + ids that the sequence has already; the last is to be computed in any case.

    The sequence is the path of the walk before, which need not have gone through the token that was chosen since.
    """
    wanted = [*text, *ids][:-1]
    pairs = enumerate(zip(sequence.ids, wanted))
    return next((i for i, (held, token) in pairs if held != token), min(len(sequence.ids), len(wanted)))


def _expand(generation: Generation, node: Node, path: list[int], logits: Tensor) -> None:
    """Give `node`, at the end of `path`, its children, the likeliest first."""
    logprobs = generation.sampler.after(path).process(logits)[0].log_softmax(-1)
    values, ids = logprobs.topk(min(generation.generation_config.candidates, len(logprobs)))
    node.children = [Node(i, value) for i, value in zip(ids.tolist(), values.tolist()) if value > -math.inf]
    if generation.generation_config.logprobs is not None or generation.sampler.observer is not None:
        node.logits = logits


def leaf_value(leaf: Node, logprob: float, n: int) -> float:
    """exp of the mean log-probability of the path and the roll-out, in [0, 1], or the caller's reward.

    Without the path, tails that repeat themselves would be the most valuable.
    """
    if leaf.reward is not None:
        return leaf.reward
    return math.exp((logprob + leaf.ahead[0]) / max(1, n + leaf.ahead[1]))


def revalue(node: Node, logprob: float, n: int) -> float:
    """Compute the totals of a kept subtree again, for paths that begin at its top: old and new values then compare.

    `logprob` and `n` are of the path above `node`.
    """
    logprob, n = logprob + node.logprob, n + 1
    node.total = node.ends * leaf_value(node, logprob, n) + sum(revalue(child, logprob, n) for child in node.children)
    return node.total
