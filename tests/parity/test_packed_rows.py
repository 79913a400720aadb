"""Rows of several documents against transformers, which gets each document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.convert.recognise import load_source
from lit_gpt.data.document_rows import DocumentRows
from lit_gpt.data.shard_folder import open_tokens
from lit_gpt.data.shards import write_shard

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V = 97
SHAPE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GPT2 = {"vocab_size": V, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", SHAPE),
    "mistral, with windows": ("MistralForCausalLM", SHAPE | {"sliding_window": 4, "head_dim": 16}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_document_has_the_loss_that_transformers_gives_it_alone(name: str, tmp_path: Path) -> None:
    kind, values = FAMILIES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    reference = model_class(model_class.config_class(**values)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path)
    model = load_source(str(tmp_path))[0].double()
    reference = reference.double()
    lengths = [9, 1, 14, 6, 18]
    rows = torch.randint(0, V, (1, sum(lengths)))
    numbers = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    counts = torch.rand(rows.shape) < 0.6
    wanted, targets = 0.0, torch.full_like(rows, IGNORE_INDEX)
    for number, part in enumerate(rows.split(lengths, 1)):
        labels = torch.where(counts[numbers == number], part[0], IGNORE_INDEX)[None]
        inside = (numbers == number).nonzero()[:, 1]
        targets[0, inside[:-1]] = labels[0, 1:]
        logprobs = reference(part).logits.log_softmax(-1)
        counted = labels[0, 1:] != IGNORE_INDEX
        wanted -= float(logprobs[0, :-1].gather(1, part[0, 1:, None])[counted].sum())
    output = model(rows, targets, documents=numbers)
    assert float(output.loss_sum) == pytest.approx(wanted, rel=1e-6)
    assert abs(float(model(rows, targets).loss_sum) - wanted) > 1e-3 * wanted


@pytest.mark.slow
@torch.no_grad()
def test_each_document_of_text_has_the_loss_that_transformers_gives_it_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path / "gpt2")
    model = load_source(str(tmp_path / "gpt2"))[0].double()
    reference = reference.double()
    eot, generator = 96, torch.Generator().manual_seed(2)
    documents = [torch.randint(0, eot, (size,), generator=generator) for size in (9, 30, 3, 25, 14, 1, 40, 21)]
    ids = torch.cat([torch.cat([each, torch.tensor([eot])]) for each in documents])
    with write_shard(tmp_path / "train_0.bin", "uint16") as writer:
        writer.add(ids.numpy())
    rows = DocumentRows(open_tokens(tmp_path, "train"), eot, 64, seed=0)
    batch = rows.read(range(len(rows)), len(rows), pin=False)
    assert 1 < len(rows) < len(documents)
    wanted = 0.0
    for number, each in enumerate(documents):  # from the end-of-text before it up to the one after it
        text = torch.cat([torch.tensor([eot] * (number > 0), dtype=torch.int64), each, torch.tensor([eot])])
        logprobs = reference(text[None, :-1]).logits[0].log_softmax(-1)
        wanted -= float(logprobs.gather(1, text[1:, None]).sum())
    output = model(batch.idx, batch.targets, documents=batch.documents)
    assert int(output.n_targets) == len(ids) - 1
    assert float(output.loss_sum) == pytest.approx(wanted, rel=1e-6)
    assert abs(float(model(batch.idx, batch.targets).loss_sum) - wanted) > 1e-3 * wanted
