"""Contrastive search (Su et al. 2022, arXiv 2202.06417): likely tokens whose hidden state is unlike those before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation import Generation, StrategySteps


def contrastive(generation: Generation) -> StrategySteps:
    """Among the k likeliest tokens v take the one with the largest (1 - α) · p(v | x) - α · max_j cos(h_v, h_j).

    h_v is the hidden state after the final norm once v itself was fed; each candidate has its own, so all k are fed, in
    one pass, to copies of the sequence. j runs over every token before, the prompt's included, each with the state it
    had when it was read. The winner's sequence is the next text; the others' differ from it in one token, which is all
    that is copied.
    """
    alpha, k = generation.generation_config.penalty_alpha, generation.generation_config.candidates
    request, states = yield from generation.read_prompt(hidden=True)
    assert states is not None
    sequence, logits = request.sequence, request.logits
    past = F.normalize(states, dim=-1)  # (S, C)
    while True:
        probabilities, ids = generation.sampler.process(logits)[0].softmax(-1).topk(min(k, logits.size(-1)))
        ids, probabilities = ids[probabilities > 0], probabilities[probabilities > 0]
        sequences = [sequence, *(generation.fork(sequence) for _ in ids[1:])]
        requests = yield [ForwardRequest(one, [token], hidden=True) for one, token in zip(sequences, ids.tolist())]
        candidates = F.normalize(torch.cat([request.states for request in requests]), dim=-1)  # (k, C)
        chosen = int(contrastive_scores(probabilities, candidates, past, alpha).argmax())
        if generation.emit(generation.sampler.report(logits[-1], int(ids[chosen]))):
            return
        sequence, logits = sequences[chosen], requests[chosen].logits
        for one in sequences:
            if one is not sequence:
                generation.free(one)
        past = torch.cat([past, candidates[chosen : chosen + 1]])


def contrastive_scores(probabilities: Tensor, candidates: Tensor, past: Tensor, alpha: float) -> Tensor:
    """(k,) scores of k tokens, from their (k,) probabilities and unit states: theirs (k, C), the past's (S, C)."""
    penalty = (candidates @ past.T).amax(-1)
    return (1 - alpha) * probabilities - alpha * penalty.to(probabilities.dtype)
