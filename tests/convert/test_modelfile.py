"""The Modelfile: what Ollama is told of a model, and no more than is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gguf_samples import CHATML, sample_source, tokenizer

from lit_gpt.convert.main import main
from lit_gpt.convert.modelfile import SAMPLING, is_chatml, modelfile, modelfile_path
from lit_gpt.errors import UserError
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.tokenizer.chatml import with_chat_template


def test_sampling_is_ours() -> None:
    ours = GenerationConfig()
    assert {
        "temperature": ours.temperature,
        "top_k": ours.top_k or 0,
        "top_p": ours.top_p,
        "min_p": ours.min_p,
        "repeat_penalty": ours.repetition_penalty,
    } == SAMPLING


def test_a_model_that_was_not_tuned_for_chat(tmp_path: Path) -> None:
    text = modelfile(sample_source(tmp_path, "qwen3"), "model.gguf")
    assert text == (
        'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\n'
        "PARAMETER temperature 1.0\nPARAMETER top_k 0\nPARAMETER top_p 1.0\nPARAMETER min_p 0.0\n"
        'PARAMETER repeat_penalty 1.0\nPARAMETER num_ctx 48\nPARAMETER stop "<|endoftext|>"\n'
    )


def test_chatml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sample_source(tmp_path, "qwen3", "qwen2")
    text = modelfile(source, "my model.gguf")
    assert "FROM ./my model.gguf\n" in text
    assert (
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
        '{{ end }}<|im_start|>assistant\n"""\n'
    ) in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n')
    assert "template" not in capsys.readouterr().err
    assert source.tokenizer is not None
    other = replace(source, tokenizer=replace(source.tokenizer, chat_template="{{ messages[0].content }}"))
    assert '"""{{ .Prompt }}"""' in modelfile(other, "model.gguf")
    assert "the chat template is not ChatML" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["byte", "llama-bpe"])
def test_our_own_template_is_chatml(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a token before every text too: llama.cpp puts it there, as the file says."""
    chat = with_chat_template(replace(tokenizer(kind), chat_template=None))
    source = replace(sample_source(tmp_path, "qwen3", kind), tokenizer=chat)
    text = modelfile(source, "model.gguf")
    assert 'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}' in text and 'stop "<|im_end|>"' in text
    assert "template" not in capsys.readouterr().err


OVER_LINES = """{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""


def test_chatml_is_known_by_what_it_writes() -> None:
    """Each of these is compared with what Jinja makes of it, with transformers' settings."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    talk = [
        {"role": "user", "content": " What is\n2 + 2? "},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Sure?"},
    ]
    wanted = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in talk)
    yes = [
        CHATML,
        OVER_LINES,
        CHATML + "\n",
        CHATML.replace("%}{{", "%}\n{{"),
        "{# x #}" + CHATML,
    ]
    no = [
        CHATML.replace("message['content']", "message['content'] | trim"),
        CHATML.replace("assistant\\n", "assistant"),
        "Answer. " + CHATML,
        "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}" + CHATML,
        CHATML.replace("<|im_end|>", "<|end|>"),
        "",
    ]
    for template, same in [*((one, True) for one in yes), *((one, False) for one in no)]:
        made = jinja.from_string(template).render(messages=talk, add_generation_prompt=True)
        assert is_chatml(template) == same == (made == wanted + "<|im_start|>assistant\n"), template


def test_it_is_written_beside_the_file_and_over_nothing(tmp_path: Path) -> None:
    sample_source(tmp_path, "qwen3")
    folder = tmp_path / "out"
    main([str(tmp_path / "sample.ckpt"), str(folder / "model.gguf"), "--dtype", "q8_0", "--modelfile"])
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "model.gguf"]
    with pytest.raises(UserError, match="Modelfile exists already"):
        main([str(tmp_path / "sample.ckpt"), str(folder / "other.gguf"), "--modelfile"])
    assert not (folder / "other.gguf").exists()
    with pytest.raises(UserError, match="cannot name"):
        modelfile_path(Path('my "model".gguf'))
