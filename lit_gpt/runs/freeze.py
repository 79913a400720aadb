"""The program `lit_gpt freeze`: the model of a run as a folder that does not change any more, and its verification."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from jsonargparse import Namespace

from lit_gpt.checkpoint.frozen import (
    PREFIX,
    VARIABLE,
    Manifest,
    check_name,
    frozen_folder,
    frozen_root,
    verify,
    write_manifest,
)
from lit_gpt.console.messages import note
from lit_gpt.console.options import CommandParser, make_parser, options_first
from lit_gpt.errors import UserError
from lit_gpt.runs.record import RunRecord, read_run


def main(argv: list[str]) -> int:
    """Run `lit_gpt freeze`; prints the folder, or what was verified, and the manifest's hash."""
    parser = _parser()
    options = parser.parse_args(options_first(parser, argv))
    _check(options)
    if options.verify is not None:
        folder = frozen_folder(options.verify)
        manifest = verify(folder)
        print(f"{folder}: {len(manifest.files)} files as they were frozen {manifest.frozen_at}")
    else:
        licence: Mapping[str, str] = {}
        if options.license is not None:
            from lit_gpt.convert.licences import licence_metadata

            licence = licence_metadata(options.license)
        folder, manifest = freeze(read_run(Path(options.run)), options.name, options.unfinished, licence)
        print(folder)
        note(f"{PREFIX}{manifest.name} is its name for --ckpt_path, --init_from and lit_gpt convert")
    print(f"manifest {manifest.sha256}")
    return 0


def freeze(
    run: RunRecord, name: str, unfinished: bool = False, licence: Mapping[str, str] | None = None
) -> tuple[Path, Manifest]:
    """Freeze the checkpoint of a run under a name. The folder appears whole or not at all.

    Args:
        run: of a folder the best checkpoint is frozen, or the last if there is none.
        name: of the frozen model.
        unfinished: also freeze a run that has not come to its end.
        licence: entries of the model card's metadata.

    Returns:
        The folder and its manifest.

    Raises:
        UserError: if the name is taken, the run has not finished or has no checkpoint, or nothing can be written.
    """
    folder = frozen_root() / check_name(name)
    _check_absent(folder)
    if run.checkpoint is None:
        raise UserError(f"{run.name} has no checkpoint yet: wait for its first validation, or name another run")
    if not run.finished and not unfinished:
        log = "has not come to its end" if run.about else "has no record of its end, as runs of earlier versions"
        raise UserError(f"{run.name} {log}: let it end, or freeze it as it is with --unfinished")
    _prepare_root(folder.parent)
    from lit_gpt.convert.recognise import open_source
    from lit_gpt.convert.write import whole_folder
    from lit_gpt.runs.frozen_content import FreezeOrder, write_content

    frozen_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    order = FreezeOrder(run, open_source(str(run.checkpoint)), name, frozen_at, licence or {})
    try:
        with whole_folder(folder) as unfinished_folder:
            write_content(order, unfinished_folder)
            manifest = write_manifest(unfinished_folder, name, frozen_at)
            for path in unfinished_folder.iterdir():
                path.chmod(0o444)
    except OSError:
        _check_absent(folder)  # another process was faster
        raise
    folder.chmod(0o555)
    return folder, manifest


def _prepare_root(root: Path) -> None:
    """Make the folder of all frozen models. Raises UserError if it cannot be made or written to."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root} cannot be made ({error.strerror}): set {VARIABLE} to a folder that can") from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise UserError(f"{root} cannot be written to: set {VARIABLE} to a folder that can")


def _check_absent(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already, and what is frozen does not change: choose another --name")


def _parser() -> CommandParser:
    parser = make_parser(
        "freeze",
        "Keep the model of a run for good: weights, tokenizer, configuration, log, where it comes from, samples and a "
        f"model card, in a read-only folder under frozen/ or {VARIABLE}. Every command then takes {PREFIX}NAME.",
    )
    add = parser.add_argument
    add("run", type=str | None, nargs="?", help="a run's folder (its best checkpoint is frozen), or a checkpoint in it")
    add("--name", type=str | None, help="of the frozen model: letters, digits, '.', '_' and '-'")
    add("--unfinished", action="store_true", help="also freeze a run that has not come to its end")
    add("--license", type=str | None, help="for the model card: apache-2.0, or another id of the hub or of SPDX")
    add("--verify", type=str | None, metavar="NAME", help="read every byte of a frozen model and name what was changed")
    return parser


def _check(options: Namespace) -> None:
    """Refuse options that do not go together. Raises UserError."""
    if options.verify is not None:
        for name in ("run", "name", "license"):
            if options[name] is not None:
                raise UserError(f"--verify {options.verify} only reads: leave {options[name]} out")
        return
    if options.run is None:
        raise UserError("freeze needs a run: lit_gpt freeze lightning_logs/version_0 --name poet")
    if options.name is None:
        raise UserError(f"freeze needs a name for {options.run}: --name poet, which is then {PREFIX}poet")
