"""Training on conversations: the loss of each alone, the figures of answers, samples, and resuming to the exact row."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import chat_bytes, prepare_chat, some_conversations
from fork_server import Child, ForkServer
from lightning.pytorch.loggers import TensorBoardLogger
from models import tiny_gpt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import Batches, trainer

from lit_gpt.batch import IGNORE_INDEX, Batch
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.chat_template import ChatTemplate, Message
from lit_gpt.train.answers import AnswerMetric, first_answer_targets
from lit_gpt.train.callbacks.samples import Samples
from lit_gpt.train.lm_metrics import LanguageModelMetric
from lit_gpt.train.module import LitGPT
from lit_gpt.train.optim import OptimizerConfig
from lit_gpt.train.schedule import ScheduleConfig

TESTS = Path(__file__).resolve().parent
BLOCK = 128
SHAPE = GPTConfig(vocab_size=259, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32, position="rope", norm="rmsnorm")
CONVERSATIONS = some_conversations(40, most_turns=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "out"
    prepare_chat(folder, CONVERSATIONS, val_split="hash:0.25")
    return folder


def batches(folder: Path, **options: Any) -> list[Batch]:
    data = TokenDataModule(str(folder), **{"format": "chat", "block_size": BLOCK, "batch_size": 3, **options})
    data.setup("validate")
    return list(data.val_dataloader())


def nll_alone(model: GPT, messages: list[Message], template: ChatTemplate) -> torch.Tensor:
    """The summed loss of one conversation by itself."""
    ids, counts = map(torch.tensor, template.encode(messages))
    targets = torch.where(counts[1:].bool(), ids[1:], IGNORE_INDEX)
    return model(ids[None, :-1], targets[None]).loss_sum


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "closeness"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@torch.no_grad()
def test_a_packed_batch_gives_each_conversation_the_loss_it_has_alone(
    folder: Path, dtype: torch.dtype, closeness: float
) -> None:
    model = tiny_gpt(std=0.6, dtype=dtype, vocab_size=259, block_size=512, position="rope", n_kv_head=2)
    together_batches = batches(folder, block_size=512)
    together = sum(model(each.idx, each.targets, documents=each.documents).loss_sum for each in together_batches)
    count = sum(int((each.targets != IGNORE_INDEX).sum()) for each in together_batches)
    template = ChatTemplate(chat_bytes())
    held_out = [messages for messages in CONVERSATIONS if _is_held_out(folder, messages, template)]
    alone = sum(nll_alone(model, messages, template) for messages in held_out)
    template.close()
    assert len(held_out) >= 4
    assert float(together) == pytest.approx(float(alone), rel=closeness)
    # Without the mask it is another loss, of the same targets.
    across = batches(folder, block_size=512, attend_across=True)
    assert count == sum(int((each.targets != IGNORE_INDEX).sum()) for each in across)
    spread = sum(model(each.idx, each.targets, documents=each.documents).loss_sum for each in across)
    assert abs(float(spread) - float(alone)) > 1e-5 * float(alone)


def _is_held_out(folder: Path, messages: list[Message], template: ChatTemplate) -> bool:
    from lit_gpt.data.shard_folder import open_tokens

    ids = template.encode(messages).ids
    stream = open_tokens(folder, "val")
    text = " ".join(map(str, stream.read(0, len(stream)).tolist()))
    return f" {' '.join(map(str, ids))} " in f" {text} "


# ---------------------------------------------------------------- figures


def test_where_answers_begin() -> None:
    no = IGNORE_INDEX
    targets = torch.tensor([[no, 5, 6, no, no, 7, no, 8], [4, 5, no, 6, no, no, no, no]])
    assert first_answer_targets(targets).nonzero().tolist() == [[0, 1], [0, 5], [0, 7], [1, 0], [1, 3]]


def test_figures_of_answers() -> None:
    metric = AnswerMetric()
    metric.update(torch.tensor(8.0), torch.tensor(4))
    assert metric.compute().keys() == {"loss", "perplexity"}  # as of text
    metric.update_answers(torch.tensor([5, 7, 9]), torch.tensor([5, 8, 9]), 16)
    figures = metric.compute()
    assert float(figures["first_token_accuracy"]) == pytest.approx(2 / 3)
    assert float(figures["counted_tokens"]) == 4
    assert float(figures["counted_share"]) == pytest.approx(0.25)
    assert float(figures["loss"]) == 2.0
    metric.reset()
    assert int(metric.answers) == int(metric.right) == int(metric.positions) == 0
    assert isinstance(metric, LanguageModelMetric)


def chat_module() -> LitGPT:
    torch.manual_seed(0)
    lit = LitGPT(SHAPE, optimizer=OptimizerConfig(lr=1e-2), schedule=ScheduleConfig(name="constant", warmup=0))
    lit.tokenizer = chat_bytes()
    return lit


@pytest.mark.slow
def test_a_run_logs_answers_and_asks_what_is_held_out(folder: Path, tmp_path: Path, capsys: Any) -> None:
    samples = Samples(["What is a fox?", " \n"], max_new_tokens=6, print_at_end=1, held_out=2)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    run = trainer(
        tmp_path, max_steps=30, logger=logger, val_check_interval=15, check_val_every_n_epoch=None, callbacks=[samples],
        accumulate_grad_batches=2, log_every_n_steps=5,
    )  # fmt: skip
    data = TokenDataModule(str(folder), format="chat", block_size=BLOCK, batch_size=2)
    run.fit(chat_module(), data)
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")))).Reload()
    scalars = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars["val/loss"][-1] < 0.75 * scalars["val/loss"][0]
    assert scalars["train/loss"][-1] < scalars["train/loss"][0]
    assert all(0 <= value <= 1 for value in scalars["val/first_token_accuracy"])
    counted = {int((each.targets != IGNORE_INDEX).sum()) for each in [_joined(batches(folder))]}
    assert set(scalars["val/counted_tokens"]) == counted
    assert all(0.1 < value < 0.9 for value in scalars["val/counted_share"] + scalars["train/counted_share"])
    assert all(value < 2 * 2 * BLOCK for value in scalars["train/counted_tokens"])
    texts = [events.Tensors(f"samples/{index}/text_summary") for index in range(3)]  # a blank prompt is no question
    shown = [entries[0].tensor_proto.string_val[0].decode() for entries in texts]
    assert shown[0].startswith("    What is a fox?")
    assert "samples/3/text_summary" not in events.Tags()["tensors"]
    for text in shown[1:]:
        assert "user" in text and "assistant" in text
    printed = capsys.readouterr()
    assert "--- sample 1 ---\nWhat is a fox?" in printed.out
    assert "lit_gpt chat --ckpt_path" in printed.out
    assert "conversations of" in printed.err


def _joined(some: list[Batch]) -> Batch:
    return Batch(torch.cat([each.idx for each in some]), torch.cat([each.targets for each in some]))


@pytest.mark.slow
def test_a_prompt_that_the_template_refuses_stops_before_any_work(folder: Path, tmp_path: Path) -> None:
    import dataclasses

    lit = chat_module()
    assert lit.tokenizer is not None and lit.tokenizer.chat_template is not None
    template = "{{ raise_exception('no') if messages[0].role == 'user' and add_generation_prompt }}"
    lit.tokenizer = dataclasses.replace(lit.tokenizer, chat_template=template + lit.tokenizer.chat_template)
    data = TokenDataModule(str(folder), format="chat", block_size=BLOCK, batch_size=2)
    run = trainer(tmp_path, max_steps=1, callbacks=[Samples(["hello"])])
    with pytest.raises(UserError, match=r"samples.prompts: the chat template refuses 'hello': no"):
        run.fit(lit, data)
    with pytest.raises(UserError, match="held_out=-1 must not be negative"):
        trainer(tmp_path, max_steps=1, callbacks=[Samples([], held_out=-1)]).fit(chat_module(), data)


def test_a_micro_batch_in_which_nothing_counts_is_no_nan(tmp_path: Path) -> None:
    data, lit = Batches(4, 4), chat_module()
    data.targets = (torch.full_like(data.idx[0], IGNORE_INDEX),)
    trainer(tmp_path, max_steps=1).fit(lit, data)
    assert all(weight.isfinite().all() for weight in lit.model.parameters())


# ---------------------------------------------------------------- resuming


def samples_of(root: Path) -> dict[int, list[str]]:
    """Optimizer step → the rows that all ranks gave to it, sorted."""
    steps: dict[int, list[str]] = {}
    for path in root.glob("samples_*.jsonl"):
        for line in path.read_text().splitlines():
            step, rows = json.loads(line)
            steps.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in steps.items()}


@pytest.mark.slow
def test_killed_and_resumed_to_the_exact_row(folder: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    def start(*runs: dict[str, Any]) -> Child:
        return fork_server.start(TESTS / "resume_driver.py", json.dumps(runs))

    common = {
        "folder": str(folder), "max_steps": 9, "max_epochs": -1, "batch_size": 2, "data": {"format": "chat"},
        "config": {"vocab_size": 259, "block_size": BLOCK},
    }  # fmt: skip
    killed = start({**common, "root": str(tmp_path / "killed"), "wait_at_step": 4})
    whole = start({**common, "root": str(tmp_path / "whole")})
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / "step4.ckpt").exists() and time.monotonic() < deadline:
            assert killed.poll() is None, killed.output()[1][-3000:]
            time.sleep(0.05)
    finally:
        killed.kill()
    done = whole.finish()
    assert done.returncode == 0, done.stderr[-3000:]
    ckpt = str(tmp_path / "killed" / "step4.ckpt")
    two = {"ranks": 2, "accumulate": 1, "batch_size": 4}
    done = start(
        {**common, "root": str(tmp_path / "resumed"), "ckpt_path": ckpt},
        {**common, **two, "root": str(tmp_path / "two"), "ckpt_path": ckpt},
    ).finish()
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {step: rows for step, rows in samples_of(tmp_path / "whole").items() if step >= 4}
    assert len(expected) == 5
    assert samples_of(tmp_path / "resumed") == samples_of(tmp_path / "two") == expected
    weights = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
