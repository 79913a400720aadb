"""The program's behaviour: fast help, one-line errors, exit statuses, nothing imported before it is needed."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from environment import FIXTURES, ROOT, RunProgram

from lit_gpt.__main__ import COMMANDS, _import, main


def test_help_names_every_command_with_an_example_and_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom lit_gpt.__main__ import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert command.summary in done.stdout
        assert command.example in done.stdout


def test_dead_objects_are_sought_again_after_a_first_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    before = gc.get_freeze_count()
    assert _import("colorsys:rgb_to_hsv")(1, 1, 1) == (0, 0, 1)
    assert gc.isenabled() and (kept := gc.get_freeze_count()) > before
    alive: list[list[int]] = [[] for _ in range(10_000)]  # far more than other threads bring or drop meanwhile
    _import("colorsys:rgb_to_hsv")
    assert gc.get_freeze_count() < kept + len(alive) // 2, "only what a first import brings is left out"


FIRST = {
    "predict": ["ckpt_path", "init_from", "start"],
    "chat": ["ckpt_path", "init_from", "system"],
    "serve": ["ckpt_path", "init_from", "host", "port"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", FIRST)
def test_help_of_a_command_is_a_page_that_begins_with_what_people_use(command: str) -> None:
    script = (
        f"import sys\nfrom lit_gpt.__main__ import main\nassert main(['{command}', '--port', '1', '--help']) == 0\n"
        "heavy = {'torch', 'lightning', 'fastapi', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 100 and max(map(len, lines)) <= 120
    assert sum(line.startswith(f"  lit_gpt {command} ") for line in lines) >= 3  # examples
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert options[: len(FIRST[command])] == [f"--{name}" for name in FIRST[command]]
    assert not any(name in done.stdout for name in ("val_check_interval", "accumulate_grad", "--seed_everything"))


def test_every_option_of_serve_is_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    from lit_gpt.console.options import parser_keys
    from lit_gpt.serve.options import _parser

    assert main(["serve", "--help"]) == 0
    page = capsys.readouterr().out
    assert [key for key in parser_keys(_parser()) if f"--{key}" not in page] == []


@pytest.mark.slow
def test_the_help_of_predict_agrees_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--help"]) == 0
    page = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--ckpt_path", str(FIXTURES / "gpt2.ckpt"), "--print_config"])
    assert ended.value.code in (0, None)
    known = yaml.safe_load(capsys.readouterr().out)
    hidden = {"model", "data", "seed_everything", "trainer"}
    assert [key for key in known if key not in hidden and f"  --{key}" not in page] == []
    for line in page.splitlines():
        flag, *default = line[:34].split() or [""]
        if not line.startswith("  --") or flag in ("--config", "--print_config", "--help", "--ckpt_path"):
            continue
        value = known
        for key in flag.removeprefix("--").split("."):
            value = value[key]
        assert [str(value)] == default or value in (None, False, [], {}), f"{flag} has the default {value}"


def test_the_package_hands_on_its_names_without_importing_torch() -> None:
    script = "import sys, lit_gpt\nassert 'torch' not in sys.modules\nlit_gpt.GPTConfig.from_preset('nano')\n"
    script += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], 'unknown command "fitt": did you mean "fit"?'),
        (["fit", "--model.preset", "gpt2-xxl"], 'unknown preset "gpt2-xxl": did you mean "gpt2-xl"?'),
        (["fit", "--model.config.n_emb", "3"], 'did you mean "--model.config.n_embd"?'),
        (["fit", "--config", "absent.yaml"], "absent.yaml"),
        (["fit", "--ckpt_path", "last"], "no run under"),
        (["fit", "--ckpt_path", "absent.ckpt"], "does not exist"),
        (["validate"], "needs a model"),
        (["fit", "--trainer.max_steps", "many"], "max_steps"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert message in lines[0]


@pytest.mark.slow
def test_a_process_ends_with_status_2_and_without_a_traceback(program: RunProgram) -> None:
    done = program("fit", "--ckpt_path", "last")
    assert done.returncode == 2
    assert done.stderr.startswith("lit_gpt: error: ckpt_path=last")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("stream", "status"), [("stdout", 0), ("stderr", 1), ("both", 1), ("another", 1)])
def test_a_broken_pipe_is_success_only_where_it_was_the_results(stream: str, status: int) -> None:
    """A run that nobody reads the messages of any more is cut short: with 0 it would pass for a finished one."""
    body = {
        "stdout": "print('result', flush=True)",
        "stderr": "print('message', file=sys.stderr, flush=True)",
        "both": "print('message', file=sys.stderr, flush=True)",
        "another": "[reader, writer] = os.pipe(); os.close(reader); os.write(writer, b'x')",
    }[stream]
    script = f"import os, sys, lit_gpt.__main__ as program\ndef run(argv): {body}\nprogram.run = run\n"
    command = [sys.executable, "-c", f"{script}sys.stdin.read(); sys.exit(program.main([]))"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if stream == "both":
        streams["stderr"] = subprocess.STDOUT
    process = subprocess.Popen(command, cwd=ROOT, **streams)
    for name in ("stdout", "stderr"):
        if name == stream or stream == "both":
            reader = getattr(process, name) or process.stdout
            reader.close()
    _, errors = process.communicate(b"")
    assert process.returncode == status
    if stream in ("stdout", "another"):
        assert errors.decode() == (
            "" if stream == "stdout" else "lit_gpt: failed: BrokenPipeError: [Errno 32] Broken pipe\n"
        )


def test_a_thread_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """TensorBoard's writer printed a traceback on a full disk."""
    before = threading.excepthook

    def run(argv: list[str]) -> int:
        thread = threading.Thread(target=Path("/absent/file").read_bytes, name="writer")
        thread.start()
        thread.join()
        return 0

    monkeypatch.setattr("lit_gpt.__main__.run", run)
    assert main([]) == 0
    line = "lit_gpt: writer failed: FileNotFoundError: [Errno 2] No such file or directory: '/absent/file'\n"
    assert capsys.readouterr().err == line
    assert threading.excepthook is before
