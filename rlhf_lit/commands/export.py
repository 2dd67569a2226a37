"""The command ``export``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlhf_lit.commands.training import Parser, quiet_libraries
from rlhf_lit.errors import UserError, first_line
from rlhf_lit.export.card import model_card
from rlhf_lit.export.comparison import COMPARED_TOKENS, Difference, compared_on, largest, plain_outputs, trained_outputs
from rlhf_lit.export.trained import Trained
from rlhf_lit.files import atomic, short_path
from rlhf_lit.models.anatomy import context_length
from rlhf_lit.models.loading import load_tokenizer
from rlhf_lit.models.quantization import Dtype
from rlhf_lit.models.readback import require_same
from rlhf_lit.models.saving import write_model


def export(
    run: str,
    merge: bool = False,
    dequantize: bool = False,
    dtype: Dtype | None = None,
    to: str | None = None,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write a trained model for others to load, with a model card, and measure how far it is from what was trained.

    Args:
        run: a run folder, its `hf/`, or the folder of an adapter or a model.
        merge: whole weights in the place of an adapter.
        dequantize: merge onto what the 4-bit weights stand for, which the adapter was trained on.
        dtype: of merged weights; None is the base's own.
        to: the folder to make; None is `export/` in the run's folder (where there is no run, in the model's).
        push_to_hub: a repository on the Hugging Face hub to upload the folder to; a new one is private.
        trust_remote_code: run model code that comes with the weights.

    Returns:
        One line: what was written where, and the largest difference of the logits.

    Raises:
        UserError: what was asked for does not fit the model, cannot be loaded, or has no place; nothing is written.
            Where only the upload failed, the folder is there.
    """
    found = Trained.find(run, trust_remote_code)
    _check_options(found, merge, dequantize, dtype)
    target = _free_folder(Path(to) if to else (found.run or found.folder) / "export")
    if push_to_hub is not None:
        _check_hub(push_to_hub)
    chosen = dtype or found.base.dtype
    holds = _words(found, merge, dequantize, chosen)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target, shared=True) as partial:
            partial.mkdir()
            difference = _write_and_compare(found, partial, merge, dequantize, chosen)
            title = push_to_hub or short_path(found.run or found.folder)
            card = model_card(found, title, holds, merge or not found.adapter, difference)
            (partial / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--to {target}: cannot be written: {error.strerror or error}") from error
    if push_to_hub is not None:
        _upload(target, push_to_hub)
    return f"{short_path(target)}: {holds}; {difference}"


def _check_options(found: Trained, merge: bool, dequantize: bool, dtype: Dtype | None) -> None:
    if merge and not found.adapter:
        raise UserError(f"--merge: {found.name} holds a whole model, no adapter; leave --merge out")
    if dequantize and not found.quantized:
        raise UserError(f"--dequantize: {found.name} was not trained on a 4-bit base; leave it out")
    if dequantize and not merge:
        raise UserError("--dequantize says what --merge merges onto; give --merge too")
    if dtype and not merge:
        raise UserError("--dtype is of merged weights; give --merge too, or leave it out")


def _free_folder(folder: Path) -> Path:
    """The place to write to, by its absolute path."""
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {short_path(folder)}: is there already; name another folder, or remove it first")
    return folder


def _words(found: Trained, merge: bool, dequantize: bool, dtype: Dtype) -> str:
    """What the exported folder holds."""
    kind = "reward model" if found.scorer else "policy"
    if not found.adapter:
        return f"the whole {kind}, {dtype}"
    if not merge:
        bits = "4-bit" if found.quantized else "full-precision"
        return f"the {kind}'s adapter, for the {bits} base {found.base.name}"
    base = "dequantised 4-bit" if dequantize else "full-precision"
    return f"the {kind}, its adapter merged onto the {base} base, {dtype}"


def _write_and_compare(found: Trained, folder: Path, merge: bool, dequantize: bool, dtype: Dtype) -> Difference:
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
    write_model(model, load_tokenizer(source), folder, found.scorer)
    require_same(model, folder)
    del model
    if merge or not found.adapter:
        outputs = plain_outputs(folder, rows, found.scorer, found.trust_remote_code)
    else:
        outputs = trained_outputs(found.load(folder), rows, found.scorer)
    differences = [a - b for a, b in zip(outputs, expected, strict=True)]
    return Difference(largest(differences), largest(expected), words)


def _check_hub(name: str) -> None:
    """Refuse what cannot be uploaded, before any work is done."""
    from httpx import HTTPError
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name}: no name for a repository: {first_line(error)}") from None
    if is_offline_mode():
        raise UserError(f"--push-to-hub {name}: offline (HF_HUB_OFFLINE is set); leave it out, or unset that")
    if get_token() is None:
        raise UserError(f"--push-to-hub {name}: no token; run 'hf auth login', or set HF_TOKEN")
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        raise UserError(f"--push-to-hub {name}: the hub did not let us in: {first_line(error)}") from None


def _upload(folder: Path, name: str) -> None:
    from httpx import HTTPError
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Export of rlhf_lit")
    except (OSError, HTTPError, ValueError) as error:
        raise UserError(
            f"--push-to-hub {name}: {first_line(error)}; the export is whole in {short_path(folder)}"
        ) from None


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
    parser.add_argument("--dtype", type=Dtype | None, default=None, help="Of merged weights (default: the base's own).")
    parser.add_argument("--to", type=str | None, default=None, help="Folder to make (default: <run>/export).")
    parser.add_argument(
        "--push-to-hub", type=str | None, default=None, metavar="NAME", help="Hub repository to upload it to."
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run model code that comes with the weights.")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    print(export(**arguments.as_dict()))
    return 0
