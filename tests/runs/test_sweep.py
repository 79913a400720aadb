"""The parts of a sweep that need no training: what is tried, what is refused, who makes which run, the table."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import postgres, server_program

from lit_gpt.__main__ import main
from lit_gpt.errors import UserError
from lit_gpt.runs.grid import SweptKey, grid_values, parse_settings, random_values
from lit_gpt.runs.record import CurvePoint, RunRecord
from lit_gpt.runs.search import StudyRuns, check_storage, file_system, open_study
from lit_gpt.runs.sweep_loop import finished_parts
from lit_gpt.runs.sweep_options import EqualBudget, parse, parse_budget, without_password
from lit_gpt.runs.sweep_plan import (
    PlannedRun,
    RunStatus,
    definition,
    read_plan,
    read_runs,
    write_plan,
    write_run,
)
from lit_gpt.runs.sweep_source import SweepResult
from lit_gpt.runs.sweep_table import by_configuration, print_results

LR = "model.optimizer.lr=0.1,0.2"
CONFIG = {"seed_everything": 7, "data": {"seed": 5}, "trainer": {"max_steps": 4}}


# What is tried -------------------------------------------------------------------------------------------------------


def test_a_grid_is_all_combinations_and_a_value_may_have_commas() -> None:
    keys = parse_settings(["a.b=1,2", 'c=[3,4],{"x": 5, "y": 6},"7,8"', "d=null"])
    assert keys[1].choices == ("[3,4]", '{"x": 5, "y": 6}', '"7,8"')
    grid = grid_values(keys)
    assert len(grid) == 6
    assert grid[1] == {"a.b": "1", "c": '{"x": 5, "y": 6}', "d": "null"}


def test_draws_are_different_stay_in_their_range_and_do_not_change_when_more_are_drawn() -> None:
    keys = parse_settings(["lr=log:1e-4..1e-2", "n=2..5", "x=-1.0..1.0", "name=adamw,muon"])
    assert [(key.is_whole, key.is_log, key.is_range) for key in keys] == [
        (False, True, True),
        (True, False, True),
        (False, False, True),
        (False, False, False),
    ]
    drawn = random_values(keys, 200, 3)
    assert drawn[:50] == random_values(keys, 50, 3) != random_values(keys, 50, 4)
    assert len({json.dumps(values) for values in drawn}) == 200
    rates = [float(values["lr"]) for values in drawn]
    assert 1e-4 <= min(rates) < 2e-4 and 5e-3 < max(rates) <= 1e-2
    below = sum(rate < 1e-3 for rate in rates)
    assert 70 < below < 130, "the middle of a logarithmic range is its geometric mean"
    assert {values["n"] for values in drawn} == {"2", "3", "4", "5"}
    assert all(-1 <= float(values["x"]) <= 1 for values in drawn)
    with pytest.raises(UserError, match="there are only 4 configurations"):
        random_values(parse_settings(["a=1,2", "b=1,2"]), 5, 1)
    with pytest.raises(UserError, match="no more than 3 configurations"):
        random_values(parse_settings(["a=1..3"]), 4, 1)
    assert SweptKey("x", (), 2, 3, True).draw(random.Random(1)) in ("2", "3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to sweep: give --set"),
        (["--set", "lr"], "--set lr has no KEY=VALUES: write it as"),
        (["--set", "lr=1,,2"], "--set lr=1,,2 has an empty value"),
        (["--set", "lr=1,1"], "--set lr=1,1 names 1 twice"),
        (["--set", "lr=1,2", "--set", "lr=3"], "--set lr is given twice"),
        (["--set", "lr=2..1"], "the range must go up"),
        (["--set", "lr=log:0..1"], "0 has no logarithm"),
        (["--set", "ckpt_path=a,b"], "--set ckpt_path cannot be swept"),
        (["--set", LR, "--budget", "5"], "--budget 5 is none: write 00:05:00"),
        (["--set", LR, "--budget", "steps:0"], "--budget steps:0 must be above zero"),
        (["--set", LR, "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--set", LR, "--seeds", "-1"], "--seeds -1 must be at least 1"),
        (["--set", LR, "--draws", "5"], "--draws 5 is for --method random"),
        (["--set", LR, "--budget", "steps:5", "--set", "trainer.max_steps=5"], "trainer.max_steps and --budget decide"),
        (["--set", LR, "--seeds", "2", "--set", "data.seed=5"], "--set data.seed and --seeds decide the same"),
        (["--set", "data.tokenizer=byte,char"], "give --metric bits_per_byte"),
        (["--set", LR, "--method", "search"], "give --budget"),
        (["--set", LR, "--method", "search", "--budget", "steps:5", "--seeds", "3"], "--seeds 3 is for"),
        (["--set", LR, "--storage", "journal:x", "--retry_failed"], "a trial cannot be run again"),
        (["--set", LR, "--method", "gird"], "method"),
        (["--sett", LR], 'unknown option "--sett": did you mean "--set"?'),
        (["--set", "a=1..2"], "--set a is a range, of which a grid cannot try all"),
        (["--set", LR, "--config", "."], "--config . cannot be read"),
    ],
)
def test_what_cannot_be_swept_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_grid_of_ten_thousand_is_refused_with_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    hundred = ",".join(map(str, range(100)))
    words = ["--set", f"a={hundred}", "--set", f"b={hundred}"]
    assert main(["sweep", *words]) == 2
    assert "this sweep has 10,000 runs, more than 100: give --max_runs 10000" in capsys.readouterr().err
    assert parse([*words, "--max_runs", "10000"]).max_runs == 10000
    assert main(["sweep", *words[:2], "--seeds", "2"]) == 2
    assert "has 200 runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("00:05:00", "time", 300),
        ("01:00:00:01", "time", 86401),
        ("steps:500", "steps", 500),
        ("tokens:20M", "tokens", 2e7),
        ("tokens:1.5G", "tokens", 1.5e9),
        ("flops:1e15", "flops", 1e15),
    ],
)
def test_budgets_are_time_steps_tokens_or_flops(text: str, unit: str, amount: float) -> None:
    budget = parse_budget(text)
    assert (budget.unit, budget.amount) == (unit, pytest.approx(amount))


def test_tenths_of_a_budget_hold_the_lowest_loss_up_to_there() -> None:
    losses = {2: 3.0, 4: 2.0, 7: 2.5}
    curve = [CurvePoint(step, step * 2.0, None, None, loss, None) for step, loss in losses.items()]
    record = RunRecord(Path("x"), "x", {}, curve, False)
    expected = {2: 3.0, 3: 3.0, 4: 2.0, 5: 2.0, 6: 2.0, 7: 2.0}
    assert finished_parts(record, EqualBudget("steps", 10), 10) == expected
    assert finished_parts(record, EqualBudget("flops", 1e9), 10) == expected
    assert finished_parts(record, EqualBudget("time", 20), None) == expected
    assert finished_parts(RunRecord(Path("x"), "x", {}, [], False), EqualBudget("time", 20), None) == {}


# The plan ------------------------------------------------------------------------------------------------------------


def test_a_run_has_all_of_its_options_and_seeds_of_its_own(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path, number, {"a": "1"}, CONFIG, number) for number in (0, 1))
    assert read_runs(tmp_path) == [first, second]
    assert [run.seed for run in (first, second)] == [7, 8]
    config = second.config()
    assert (config["seed_everything"], config["data"]["seed"]) == (8, 6)
    assert config["trainer"] == {
        "max_steps": 4,
        "default_root_dir": str(second.folder),
        "enable_progress_bar": False,
    }
    assert write_run(tmp_path, 2, {}, CONFIG).config()["seed_everything"] == 7
    assert CONFIG["data"] == {"seed": 5}, "each run has a copy"
    assert second.label == "run 0001 (a=1 seed=8)"


def test_a_folder_holds_one_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("{}")
    words = ["--config", "base.yaml", "--set", LR]
    asked = definition(parse(words))
    assert read_plan(tmp_path, asked) is None
    write_plan(tmp_path, asked, count=2)
    plan = read_plan(tmp_path, definition(parse([*words, "--jobs", "4", "--format", "json"])))
    assert plan is not None and plan["count"] == 2
    for other, difference in ((["--seeds", "2"], "--seeds differs"), (["--budget", "steps:4"], "--budget differs")):
        with pytest.raises(UserError, match=f"holds another sweep .{re.escape(difference)}"):
            read_plan(tmp_path, definition(parse([*words, *other])))
    Path("base.yaml").write_text("{trainer: {}}")
    with pytest.raises(UserError, match="a file of --config has changed"):
        read_plan(tmp_path, definition(parse(words)))
    (tmp_path / "sweep.json").write_text("[1")
    with pytest.raises(UserError, match="is damaged"):
        read_plan(tmp_path, asked)


# The table -----------------------------------------------------------------------------------------------------------


def results() -> list[SweepResult]:
    def result(number: int, lr: str, seed: int, status: RunStatus | None) -> SweepResult:
        return SweepResult(number, {"model.optimizer.lr": lr}, seed, status)

    return [
        result(0, "0.1", 1, RunStatus("finished", "", 2.0, 3.0, 40, "x")),
        result(1, "0.2", 1, RunStatus("finished", "", 1.0, 1.5, 20, "y")),
        result(2, "0.1", 2, RunStatus("failed", "no\tmemory " * 20)),
        result(3, "0.2", 2, RunStatus("finished", "", 1.5, 2.5, 40, "z")),
    ]


def test_the_table_is_sorted_by_the_figure_and_failures_come_last(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(parse(["--set", LR, "--seeds", "2"]), results())
    runs, groups = capsys.readouterr().out.split("\n\n")
    lines = runs.splitlines()
    assert lines[0].split() == [
        *("run", "model.optimizer.lr", "seed", "loss"),
        *("bits", "per", "byte", "at", "step", "state"),
    ]
    assert [line.split()[0] for line in lines[1:]] == ["0001", "0003", "0000", "0002"]
    assert lines[1].split() == ["0001", "0.2", "1", "1.0000", "1.5000", "20", "finished"]
    assert lines[-1].endswith("…") and len(lines[-1]) < 200
    assert [line.split() for line in groups.splitlines()][1:] == [
        ["0.2", "1.2500", "1.0000", "1.5000", "2", "of", "2"],
        ["0.1", "2.0000", "2.0000", "2.0000", "1", "of", "2"],
    ]


def test_the_results_as_json_have_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", LR, "--seeds", "2", "--format", "json", "--metric", "bits_per_byte", "--budget", "steps:9"]
    print_results(parse(words), results())
    found = json.loads(capsys.readouterr().out)
    assert found["budget"] == ["steps", 9] and found["metric"] == "bits_per_byte"
    assert found["runs"][0]["bits_per_byte"] == 1.5 and found["runs"][0]["run"] == "y"
    assert found["runs"][-1]["state"] == "failed"
    assert found["configurations"][0]["mean"] == pytest.approx(2.0)
    assert math.isinf(by_configuration(results()[2:3], "loss")[0].mean or math.inf)


# Several machines ----------------------------------------------------------------------------------------------------


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nhost:/x /mnt/our\\040share nfs4 rw 0 0\n")
    assert file_system(Path("/mnt/our share/runs"), mounts) == "nfs4"
    assert file_system(Path("/mnt/other"), mounts) == "ext4"
    monkeypatch.setattr("lit_gpt.runs.search.file_system", lambda folder: "nfs4")
    with pytest.raises(UserError, match=r"network file system \(nfs4\).*give journal:/share/a.journal"):
        check_storage("sqlite:////share/a.db")
    with pytest.raises(UserError, match="is no address: give postgresql"):
        check_storage("a.db")
    with pytest.raises(UserError, match="there is no folder"):
        check_storage("journal:/no/such/folder/x")
    check_storage("postgresql+psycopg://me:secret@host/name")
    assert without_password("x postgresql://me:secret@host/name") == "x postgresql://me:…@host/name"


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """Address of a database of PostgreSQL's."""
    if server_program("pg_ctl") is None:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    with postgres() as address:
        yield f"postgresql://{address}"


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What several machines share a sweep through."""
    return f"journal:{tmp_path}/journal" if request.param == "journal" else request.getfixturevalue("database")


def machine(
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    count: int,
    keys: list[SweptKey] | None = None,
) -> StudyRuns:
    """One of the machines that share a sweep."""
    output = tmp_path / name
    study = open_study(storage, f"shared {tmp_path}", True)
    monkeypatch.setattr("socket.gethostname", lambda: name)
    if keys is None:
        own = [write_run(output, number, {"a": str(number)}, CONFIG) for number in range(count)]
        return StudyRuns(study, output, own, count, "loss")

    def make(number: int, values: dict[str, str]) -> PlannedRun | str:
        return "n_head is odd" if number == 0 else write_run(output, number, values, CONFIG)

    return StudyRuns(study, output, read_runs(output), count, "loss", keys, make)


def test_machines_share_a_grid_and_each_run_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    pytest.importorskip("optuna")
    one, two = (machine(tmp_path, name, monkeypatch, storage, 5) for name in ("one", "two"))
    two._study.enqueue_trial({"run": 3}, user_attrs={"run": 3})  # as where both begin at the same time
    made: list[int] = []
    first = one.claim()
    assert first is not None
    for source in (two, one, two, one):
        run = source.claim()
        assert run is not None
        made.append(run.number)
        source.end(run, RunStatus("finished", "", 1.0 + run.number, None, 4, "x"))
    assert sorted([first.number, *made]) == [0, 1, 2, 3, 4]
    assert two.claim() is None and one.claim() is None
    again = machine(tmp_path, "one", monkeypatch, storage, 5)
    resumed = again.claim()
    assert resumed == first, "what was killed goes on where it was"
    again.end(resumed, RunStatus("failed", "no memory"))
    assert again.claim() is None
    tables = [
        [(result.number, result.status.state, result.status.loss) for result in source.results() if result.status]
        for source in (again, two)
    ]
    assert tables[0] == tables[1]
    assert [state for _, state, _ in tables[0]].count("finished") == 4
    assert {result.machine for result in two.results()} == {"", "one"}


def test_a_database_that_refuses_is_named_without_its_password(database: str) -> None:
    pytest.importorskip("optuna")
    refused = re.sub(r":[^:]+@", ":guessed@", database)
    with pytest.raises(UserError, match=r"--storage postgresql://lit_gpt:…@.* cannot be used: .*password") as error:
        open_study(refused, "shared", True)
    assert "guessed" not in str(error.value) and "\n" not in str(error.value)


def test_a_search_draws_others_on_each_machine_counts_refusals_and_ends_the_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    pytest.importorskip("optuna")
    keys = parse_settings(["lr=log:1e-4..1e-2", "n=2,3", "depth=1..8"])
    one = machine(tmp_path, "one", monkeypatch, storage, 14, keys)
    two = machine(tmp_path, "two", monkeypatch, storage, 14, keys)
    drawn, pruned = [], 0
    for number in range(20):
        source = (one, two)[number % 2]
        run = source.claim()
        if run is None:
            break
        drawn.append(run.values["lr"])
        loss = 1.0 + number
        if any(source.report(run, part, loss) for part in (1, 2, 3, 4)):
            pruned += 1
            source.end(run, RunStatus("pruned", "", loss, None, 2, "x"))
        else:
            source.end(run, RunStatus("finished", "", loss, None, 4, "x"))
    assert one.claim() is None and two.claim() is None
    results = two.results()
    assert len(results) == 14 and len(set(drawn)) == len(drawn)
    failed = [result for result in results if result.status is not None and result.status.state == "failed"]
    assert [(result.number, result.status.why) for result in failed if result.status] == [(0, "n_head is odd")]
    assert len(drawn) == 13
    assert pruned > 0, "each is worse than those before"
