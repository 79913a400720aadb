"""The README is a map, and its commands run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from environment import ROOT

from lit_gpt.__main__ import COMMANDS, main

README = (ROOT / "README.md").read_text("utf-8")


def shell_lines() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def summary(path: Path) -> str:
    docstring = re.match(r'""".*?"""', path.read_text("utf-8"), re.DOTALL)  # to parse all files would take a second
    return " ".join(ast.literal_eval(docstring[0]).split("\n\n")[0].split()) if docstring else ""


def test_the_map_has_every_file_with_the_first_line_of_its_docstring() -> None:
    sections = re.split(r"^## ", (ROOT / "docs/map.md").read_text("utf-8"), flags=re.MULTILINE)
    rows = {section.split("\n", 1)[0].rstrip("/"): section for section in sections}
    for path in [*sorted((ROOT / "lit_gpt").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]:
        line = f"| `{path.name}` | {summary(path)} |"
        assert summary(path), f"{path} has no docstring"
        assert line in rows[path.parent.relative_to(ROOT).as_posix()], f"docs/map.md lacks, or tells otherwise:\n{line}"


def test_the_map_names_nothing_that_is_gone() -> None:
    folder, gone = "", []
    for line in (ROOT / "docs/map.md").read_text("utf-8").splitlines():
        if line.startswith("## "):
            folder = line[3:].strip()
        elif found := re.match(r"\| `([^`]+)`", line):
            gone += [] if (ROOT / folder / found[1]).exists() else [f"{folder}{found[1]}"]
    assert gone == []


def test_the_readme_has_every_folder_and_names_nothing_that_is_gone() -> None:
    named = re.findall(r"^((?:lit_gpt|configs|scripts|tests|docs|\.ci)/[\w./-]*)", README, flags=re.MULTILINE)
    packages = [path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / "lit_gpt").glob("*/__init__.py")]
    assert set(packages) <= set(named)
    named += re.findall(r"\]\(((?!http)[\w./-]+)\)", README)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_ci_sets_up_and_tests_as_the_readme_says() -> None:
    script = (ROOT / ".ci/run").read_text("utf-8")
    (command,) = [line for line in shell_lines() if line.endswith("&& pytest")]
    for part in command.split(" && "):
        assert part.replace("pip install", "pip install -q") in script or part in script


@pytest.mark.slow
def test_the_commands_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At small size: the words of the README, then flags that make the run short."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts/a.txt").write_text("春眠不觉晓，处处闻啼鸟。\n" * 300, "utf-8")
    (tmp_path / "text.py").write_text((ROOT / "lit_gpt/model/gpt.py").read_text("utf-8"), "utf-8")
    short = "--trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.accelerator cpu --data.batch_size 2 "
    short += "--model.config.n_layer 1 --model.config.n_embd 16 --model.config.n_head 2 --model.config.block_size 16 "
    short += "--trainer.precision 32-true --samples.max_new_tokens 5 --data.tokenizer bpe:300"
    extra = {
        "fit": f"{short} --trainer.limit_val_batches 2",
        "predict": "--max_new_tokens 5",
        "validate": "--trainer.limit_val_batches 2",
    }
    ran = []
    for line in shell_lines():
        found = re.search(r"(?:^|&& )(lit_gpt .*)$", line)
        words = shlex.split(found[1])[1:] if found else []
        if not words or words[0] in ("serve", "convert", "chat") or "configs/chat.yaml" in words:
            continue  # they have tests that run them whole
        words += shlex.split(extra.get(words[0], ""))
        if words[0] == "fit" and "--data.source" not in words:
            words += ["--data.source", "text.py"]
        assert main(words) == 0, (line, capsys.readouterr().err)
        ran.append(words[0])
    assert {"fit", "predict", "validate", "info", "tokenize"} <= set(ran) <= set(COMMANDS)


def test_no_file_is_over_a_megabyte() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert [file.name for file in files if file.is_file() and file.stat().st_size > 1 << 20] == []
