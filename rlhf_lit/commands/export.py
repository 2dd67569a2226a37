"""The command ``export``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from rlhf_lit.commands.training import Parser, quiet_libraries
from rlhf_lit.errors import UserError, tell
from rlhf_lit.export.card import model_card
from rlhf_lit.export.comparison import COMPARED_TOKENS, Difference, compared_on, largest, plain_outputs, trained_outputs
from rlhf_lit.export.hub import check_hub, upload
from rlhf_lit.export.ollama import write_modelfile
from rlhf_lit.export.trained import Trained
from rlhf_lit.export.widths import Width, in_width
from rlhf_lit.files import atomic, short_path
from rlhf_lit.models.anatomy import context_length
from rlhf_lit.models.loading import load_tokenizer
from rlhf_lit.models.readback import require_same
from rlhf_lit.models.saving import write_model


def export(
    run: str,
    merge: bool = False,
    dequantize: bool = False,
    dtype: Width | None = None,
    base: str | None = None,
    to: str | None = None,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write a trained model for others to load, with a model card, and measure how far it is from what was trained.

    Args:
        run: a run folder, its `hf/`, or the folder of an adapter or a model.
        merge: whole weights in the place of an adapter.
        dequantize: merge onto what the 4-bit weights stand for, which the adapter was trained on.
        dtype: of whole weights, a reward model's head excepted; None is the width they are stored in (merged ones: the
            base's).
        base: where the base of an adapter is now; None is where the adapter says that it was.
        to: the folder to make; None is `export/` in the run's folder (where there is no run, in the model's).
        push_to_hub: a repository on the Hugging Face hub to upload the folder to; a new one is private.
        trust_remote_code: run model code that comes with the weights.

    Returns:
        One line: what was written where, and the largest difference of the logits.

    Raises:
        UserError: what was asked for does not fit the model, cannot be loaded, or has no place; nothing is written.
            Where only the upload failed, the folder is there.
    """
    found = Trained.find(run, trust_remote_code, base)
    _check_options(found, merge, dequantize, dtype)
    target = _free_folder(Path(to) if to else (found.run or found.folder) / "export")
    if push_to_hub is not None:
        check_hub(push_to_hub)
    chosen = dtype or cast("Width", str(found.stored).removeprefix("torch."))
    holds = _words(found, merge, dequantize, chosen)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target, shared=True) as partial:
            partial.mkdir()
            difference = _write_and_compare(found, partial, merge, dequantize, chosen)
            whole_policy = not found.scorer and (merge or not found.adapter)
            ollama = write_modelfile(partial, found.trust_remote_code) if whole_policy else None
            card = model_card(found, holds, partial, push_to_hub, difference, ollama)
            (partial / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--to {target}: cannot be written: {error.strerror or error}") from error
    line = f"{short_path(target)}: {holds}; {difference}"
    return line if push_to_hub is None else f"{line}; uploaded to {upload(target, push_to_hub)}"


def _check_options(found: Trained, merge: bool, dequantize: bool, dtype: Width | None) -> None:
    if merge and not found.adapter:
        raise UserError(f"--merge: {found.name} holds a whole model, no adapter; leave --merge out")
    if dequantize and not found.quantized:
        raise UserError(f"--dequantize: {found.name} was not trained on a 4-bit base; leave it out")
    if dequantize and not merge:
        raise UserError("--dequantize says what --merge merges onto; give --merge too")
    if dtype and found.adapter and not merge:
        raise UserError(
            f"--dtype is of whole weights, and {found.name} is an adapter; give --merge too, or leave it out"
        )


def _free_folder(folder: Path) -> Path:
    """The place to write to, by its absolute path."""
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {short_path(folder)}: is there already; name another folder, or remove it first")
    return folder


def _words(found: Trained, merge: bool, dequantize: bool, dtype: Width) -> str:
    """What the exported folder holds."""
    kind = "reward model" if found.scorer else "policy"
    if not found.adapter:
        return f"the whole {kind}, {dtype}"
    if not merge:
        bits = "4-bit" if found.quantized else "full-precision"
        return f"the {kind}'s adapter, for the {bits} base {found.base.name}"
    base = "dequantised 4-bit" if dequantize else "full-precision"
    return f"the {kind}, its adapter merged onto the {base} base, {dtype}"


def _write_and_compare(found: Trained, folder: Path, merge: bool, dequantize: bool, dtype: Width) -> Difference:
    """Write model and tokenizer, load them again, and compare with the model as it was trained."""
    source = replace(found.base, name=str(found.folder))
    model = found.load(found.folder)
    limit = min(COMPARED_TOKENS, context_length(model) or COMPARED_TOKENS)
    rows, words = compared_on(found, load_tokenizer(source), limit)
    expected = trained_outputs(model, rows, found.scorer)
    if merge:
        if not dequantize:
            del model  # before the base comes, so that one stands in memory at a time
        model = found.merged(dtype, model if dequantize else None)
    elif not found.adapter:
        model = in_width(model, getattr(torch, dtype))
    write_model(model, load_tokenizer(source), folder, found.scorer)
    require_same(model, folder)
    del model
    if merge or not found.adapter:
        outputs = plain_outputs(folder, rows, found.scorer, found.trust_remote_code)
    else:
        outputs = trained_outputs(found.load(folder), rows, found.scorer)
    differences = [a - b for a, b in zip(outputs, expected, strict=True)]
    return Difference(largest(differences), largest(expected), words)


def main(argv: list[str]) -> int:
    """Run ``export``."""
    parser = Parser(
        prog="rlhf-lit export",
        description="A trained model, for plain transformers or peft to load.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=str, help="A run folder, its hf/, or the folder of an adapter or a model.")
    parser.add_argument("--merge", action="store_true", help="Merge the adapter onto the full-precision base.")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="With --merge, for an adapter trained on 4-bit weights: merge onto what those stand for.",
    )
    parser.add_argument(
        "--dtype",
        type=Width | None,
        default=None,
        help="Of whole weights (default: as they are, or as the base's are).",
    )
    parser.add_argument(
        "--base", type=str | None, default=None, metavar="FOLDER", help="Where the base of an adapter is, if it moved."
    )
    parser.add_argument("--to", type=str | None, default=None, help="Folder to make (default: <run>/export).")
    parser.add_argument(
        "--push_to_hub",
        "--push-to-hub",
        type=str | None,
        default=None,
        metavar="NAME",
        help="Hub repository to upload it to.",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run model code that comes with the weights.")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    tell(export(**arguments.as_dict()))
    return 0
