"""The log of a run: what counts of it after kills, resumes and damage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lit_gpt.checkpoint.provenance import code_version, commit_of, environment
from lit_gpt.checkpoint.run_log import RUN_LOG, append_event, read_run_log
from lit_gpt.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def steps(folder: Path) -> list[int]:
    log = read_run_log(folder)
    assert log is not None
    return [values["step"] for values in log.validations]


def test_what_a_resumed_run_makes_again_counts_once_and_its_end_no_more(tmp_path: Path) -> None:
    append_event(tmp_path, "start", {"step": 0, "parameters": 7})
    for step in (10, 20, 30):
        append_event(tmp_path, "validation", {"step": step, "loss": step / 10})
    append_event(tmp_path, "end", {"step": 30})
    log = read_run_log(tmp_path)
    assert log is not None and log.end == {"event": "end", "step": 30} and steps(tmp_path) == [10, 20, 30]
    append_event(tmp_path, "start", {"step": 20, "parameters": 8})
    log = read_run_log(tmp_path)
    assert log is not None and log.end is None and log.start["parameters"] == 8
    assert steps(tmp_path) == [10, 20], "the one after the step that it went on from is made again"
    append_event(tmp_path, "validation", {"step": 20, "loss": 9.0})
    append_event(tmp_path, "validation", {"step": 30, "loss": math.nan})
    log = read_run_log(tmp_path)
    assert log is not None and [values["loss"] for values in log.validations] == [1.0, 9.0, None]


def test_a_line_that_was_cut_short_costs_itself_alone(tmp_path: Path) -> None:
    """Cut at every byte, as a kill or a full disk may: the lines before and after it are whole."""
    append_event(tmp_path, "start", {"step": 0})
    whole = (tmp_path / RUN_LOG).read_bytes()
    append_event(tmp_path, "validation", {"step": 5, "loss": 1.5})
    both = (tmp_path / RUN_LOG).read_bytes()
    for end in range(len(whole), len(both)):
        (tmp_path / RUN_LOG).write_bytes(both[:end])
        is_whole = end == len(both) - 1  # all but the line end
        assert steps(tmp_path) == ([5] if is_whole else [])
        append_event(tmp_path, "validation", {"step": 6, "loss": 1.0})
        assert steps(tmp_path) == ([5, 6] if is_whole else [6])


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000, b'{"event": "validation", "step": -1}', b'{"event": "validation", "step": true}', b"[1]",
     b'{"event": 3, "step": 1}', b"\xff\xfe", b'{"step": 4}', b'{"event": "validation", "step": "4", "loss": 1}'],
    ids=lambda line: line[:30],
)  # fmt: skip
def test_lines_that_are_none_of_ours_do_not_count(tmp_path: Path, line: bytes) -> None:
    append_event(tmp_path, "validation", {"step": 3, "loss": 1.0})
    with open(tmp_path / RUN_LOG, "ab") as file:
        file.write(line + b"\n")
    append_event(tmp_path, "end", {"step": 9})
    log = read_run_log(tmp_path)
    assert log is not None and steps(tmp_path) == [3] and log.end is not None


def test_a_folder_without_a_log_has_none_and_one_that_is_no_file_is_refused(tmp_path: Path) -> None:
    assert read_run_log(tmp_path) is None
    (tmp_path / RUN_LOG).mkdir()
    with pytest.raises(UserError, match=r"run\.jsonl cannot be read"):
        read_run_log(tmp_path)


def test_the_code_and_the_environment_are_told_and_not_whose_machine_it_is() -> None:
    code = code_version()
    assert len(str(code["sha256"])) == 64 and code == code_version()
    found = environment()
    assert found["packages"]["torch"].startswith("2.") and found["processor"]
    assert not {"hostname", "node", "user"} & set(found)


@pytest.mark.parametrize("kind", ["branch", "packed", "detached", "worktree"])
def test_the_commit_of_a_checkout_is_read_from_its_files(tmp_path: Path, kind: str) -> None:
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text(f"{COMMIT}\n" if kind == "detached" else "ref: refs/heads/main\n")
    if kind == "packed":
        (git / "packed-refs").write_text(f"# pack-refs\n{'f' * 40} refs/heads/other\n{COMMIT} refs/heads/main\n")
    else:
        (git / "refs/heads/main").write_text(f"{COMMIT}\n")
    checkout = tmp_path
    if kind == "worktree":
        (git / "worktrees/tree").mkdir(parents=True)
        (git / "worktrees/tree/HEAD").write_text("ref: refs/heads/main\n")
        (git / "worktrees/tree/commondir").write_text("../..\n")
        checkout = tmp_path / "tree"
        checkout.mkdir()
        (checkout / ".git").write_text(f"gitdir: {git}/worktrees/tree\n")
    assert commit_of(checkout) == COMMIT
    (git / "refs/heads/main").write_text("nonsense")
    (git / "packed-refs").write_text("")
    assert commit_of(tmp_path / "nowhere") is None
    if kind == "branch":
        assert commit_of(checkout) is None
