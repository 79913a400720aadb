"""docs/step_by_step.ipynb, executed from its first cell to its last on a short run; its outputs are kept."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from environment import ROOT
from fork_server import ForkServer
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs/step_by_step.ipynb"
SHORT = (
    "--trainer.max_steps 4 --trainer.val_check_interval 4 --trainer.limit_val_batches 2 --data.batch_size 2 "
    "--data.tokenizer char --samples.prompts [] --trainer.precision 32-true"
)


def test_its_outputs_are_kept() -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 9 and all(cell["execution_count"] == number for number, cell in enumerate(code, 1))
    assert all(output["output_type"] == "stream" for cell in code for output in cell["outputs"])
    text = "".join(line for cell in code for output in cell["outputs"] for line in output["text"])
    assert all(start in text for start in ("农夫山泉", "可口可乐", "奥利奥", "蒙牛"))


@pytest.mark.slow
def test_it_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork_server: ForkServer) -> None:
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PATH", fork_server.write_commands(tmp_path / "bin"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("STEP_BY_STEP_FLAGS", SHORT)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    argv = [str(tmp_path / "bin/python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": argv, "display_name": "Forked", "language": "python"}
    (tmp_path / "jupyter/kernels/forked").mkdir(parents=True)
    (tmp_path / "jupyter/kernels/forked/kernel.json").write_text(json.dumps(kernel))
    notebook = nbformat.read(NOTEBOOK, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="forked", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "6 blocks, 4 heads, width 80" in text and "蒙牛" in text
