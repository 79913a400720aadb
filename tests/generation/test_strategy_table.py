"""The table of strategies: an entry and a function are all that a strategy needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from environment import ROOT
from mock_models import CountingModel, collect, counting_engine

from lit_gpt.errors import UserError
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.strategy_table import FILTERS, STRATEGIES, StrategySpec

FILE = '''
from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.outputs import Token


def second_best(generation):
    """The token after the likeliest one by id, with `top_k` sequences for no reason."""
    request, _ = yield from generation.read_prompt()
    for _ in range(generation.generation_config.candidates - 1):
        generation.fork(request.sequence)
    while True:
        token = Token((int(request.logits.argmax()) + 1) % 11)
        if generation.emit(token):
            return
        (request,) = yield [ForwardRequest(request.sequence, [token.id])]
'''


def refuse_half(settings: Any) -> None:
    if settings.temperature == 0.5:
        raise UserError("second_best knows no temperature=0.5")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "second_best.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    spec = StrategySpec(
        "second_best:second_best", knobs=FILTERS, defaults={"top_k": 3}, sequences="top_k", check=refuse_half
    )
    monkeypatch.setitem(STRATEGIES, "second_best", spec)


@pytest.mark.usefixtures("added")
def test_a_strategy_that_is_added_to_the_table_generates() -> None:
    model = CountingModel()
    engine = counting_engine(model)
    request = engine.submit([4], GenerationConfig(strategy="second_best", max_new_tokens=2))
    first = (model.next([4]) + 1) % 11
    assert collect(engine)[request, 0] == [first, (model.next([4, first]) + 1) % 11]
    assert not any(engine.slots.is_live(slot) for slot in range(8))


@pytest.mark.usefixtures("added")
def test_what_its_entry_says_is_checked() -> None:
    config = GenerationConfig(strategy="second_best", num_beams=2, top_p=0.9)
    assert config.check() == ["num_beams=2 has no effect with strategy second_best"]
    assert (config.candidates, config.sequences, config.generations) == (3, 3, 1)
    with pytest.raises(UserError, match=r"second_best knows no temperature=0\.5"):
        GenerationConfig(strategy="second_best", temperature=0.5).check()
    with pytest.raises(UserError, match='did you mean "second_best"'):
        GenerationConfig(strategy="second_bets").check()
    with pytest.raises(UserError, match="second_best needs 9 slots of cache and there are 8: lower top_k"):
        counting_engine(CountingModel()).submit([4], GenerationConfig(strategy="second_best", top_k=9))


@pytest.mark.slow
def test_the_flags_offer_what_the_table_has_and_need_no_torch() -> None:
    code = (
        "import sys; from lit_gpt.generation.strategy_table import *;"
        "STRATEGIES['second_best'] = StrategySpec('x:y', knobs=FILTERS);"
        "from jsonargparse import ArgumentParser; from lit_gpt.generation.generation_config import GenerationConfig;"
        "parser = ArgumentParser(); parser.add_class_arguments(GenerationConfig); parser.print_help();"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "{" + ",".join([*STRATEGIES, "second_best"]) + "}" in done.stdout


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_entry_names_a_function_in_a_file_of_its_own(name: str) -> None:
    module, function = STRATEGIES[name].function.split(":")
    assert STRATEGIES[name].load().__name__ == function == module.rsplit(".", 1)[-1]
    assert STRATEGIES[name].load().__module__ == module


def test_no_strategy_file_is_left_out_of_the_table() -> None:
    files = {path.stem for path in (Path(ROOT) / "lit_gpt/generation/strategies").glob("[!_]*.py")}
    assert files == {spec.function.split(":")[1] for spec in STRATEGIES.values()}
