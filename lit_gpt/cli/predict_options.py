"""The options of `predict` and its help. Imports no torch: `predict --help` answers at once."""

from __future__ import annotations

from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from lit_gpt.console.options import help_page, make_parser
from lit_gpt.generation.generation_config import GenerationConfig

_GROUPS = {
    "the model, the prompts and the results": (
        "ckpt_path", "init_from", "start", "prompts", "chat", "system", "output", "resume", "adapter", "n_head",
    ),
    "how much, and how it is drawn": (
        "num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "precision",
    ),
    "how each token was chosen": ("show_ids", "trace", "trace_output", "trace_html", "logprobs", "prompt_logprobs"),
    "other ways to decide on tokens": (
        "strategy", "num_beams", "length_penalty", "penalty_alpha", "num_simulations", "c_puct", "rollout_length",
        "draft", "num_draft_tokens",
    ),
    "what is written less often, or never": (
        "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "banned_tokens",
    ),
    "where it ends": ("min_new_tokens", "ignore_eos", "stop_token_ids", "overflow"),
    "devices": (
        "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.default_root_dir",
    ),
    "the options themselves": ("config", "print_config", "help"),
}  # fmt: skip
_EXAMPLES = {
    "three continuations by the newest run": 'lit_gpt predict --ckpt_path last --start "    def" --num_samples 3',
    "the likeliest text": 'lit_gpt predict --ckpt_path best --start "ROMEO:" --temperature 0 --max_new_tokens 50',
    "a model of the hub": 'lit_gpt predict --init_from openai-community/gpt2 --start "Once upon a time" --top_k 50',
    "an answer of a model for chat": 'lit_gpt predict --ckpt_path chat.ckpt --chat --start "What is a list?"',
    "many prompts on four devices": (
        "lit_gpt predict --ckpt_path last --prompts prompts.jsonl --output out.jsonl --trainer.devices 4"
    ),
}
_END = """Every option is also a key of a YAML file for --config, or, as LIT_GPT_PREDICT__START,
of the environment.
Lightning's other flags are accepted too, as --trainer.NAME; those of training (--trainer.max_steps, --model.…,
--data.…) change nothing here. docs/decoding.md explains every way to decide on tokens."""


def add_predict_arguments(parser: ArgumentParser, precisions: Any) -> None:
    """The flags of `predict`: `GenerationConfig`'s, and where prompts come from and results go.

    Args:
        parser: gets them.
        precisions: the type of `--precision`.
    """
    switches = {"ignore_eos": "never generate end-of-text"}
    parser.add_class_arguments(GenerationConfig, skip=set(switches))
    switches["chat"] = "each prompt is what a user says, in the model's chat template; the answer is one turn"
    switches["resume"] = "go on with a run that was killed: what is in its .partial file is not done again"
    switches["show_ids"] = "print each prompt's ids and its tensor's shape, (1, T)"
    switches["trace"] = "show how each token was chosen: candidates, what was cut, the draw"
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=False, help=text)
    text = "a prompt, or FILE:story.md for one that is a whole file; can be given several times"
    parser.add_argument("--start", action="append", type=str, default=[], help=text)
    text = 'a file with a prompt on each line, or a .jsonl with a "prompt" (text or ids) on each line'
    parser.add_argument("--prompts", type=str | None, default=None, help=text)
    text = "with --chat: how the model shall answer, in front of every prompt"
    parser.add_argument("--system", type=str | None, default=None, help=text)
    text = 'NAME=PATH of an adapter over it; lines of a .jsonl may choose one: "model": NAME'
    parser.add_argument("--adapter", action="append", type=str, default=[], help=text)
    text = "a .jsonl file for the results (NAME.partial until all are there); null prints them"
    parser.add_argument("--output", type=str | None, default=None, help=text)
    text = "the same as a .jsonl file: a line for the initial prompt, then one for each decision"
    parser.add_argument("--trace_output", type=str | None, default=None, help=text)
    text = "the same as one self-contained page, in which every token shows its alternatives"
    parser.add_argument("--trace_html", type=str | None, default=None, help=text)
    text = "of the weights: bf16, int8 and int4 are faster and int4 is coarse; auto is bf16 on a GPU and fp32 on a CPU"
    parser.add_argument("--precision", type=precisions, default="auto", help=text)


def print_help() -> None:
    """Print the help of `predict`: what people use first, and nothing that means nothing there."""
    parser = make_parser("predict", "Continue prompts with a checkpoint.")
    add = parser.add_argument
    add("--ckpt_path", type=str | None, help="a checkpoint, or `last` or `best` of the newest run")
    add("--init_from", type=str | None, help="instead, what `lit_gpt convert` reads: a Hugging Face folder or id, …")
    add("--n_head", type=int | None, help='heads of --init_from, which a .pth of "LLMs from scratch" does not say')
    add("--trainer.accelerator", type=str, default="auto", help="cpu, gpu, cuda, mps")
    add("--trainer.devices", type=str, default="auto", help="how many devices share the prompts, or which: 4, or 0,2")
    add("--trainer.num_nodes", type=int, default=1, help="machines that share the prompts")
    add("--trainer.strategy", type=str, default="auto", help="how devices work together; auto is ddp for several")
    add("--trainer.default_root_dir", type=str | None, help="the folder with lightning_logs/, for `last` and `best`")
    add_predict_arguments(parser, str)
    print(help_page(parser, _EXAMPLES, _GROUPS, _END))
