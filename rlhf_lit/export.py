"""Saving a trained model so that plain transformers and peft load it: the one room for that.

``save_hf`` writes a run's ``hf/`` at the end of ``fit``. The command ``export`` takes it from there: the adapter with a
model card, or the adapter merged into whole weights, and how far the result is from what was trained.

An adapter trained on a 4-bit base is never merged into the 4-bit weights, which would be rounded once more (peft #2321,
transformers #31293), but into the base in full precision, or into what its 4-bit weights stand for.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from rlhf_lit.algorithms.base import Algorithm
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.batches import Sequences
from rlhf_lit.cli import Parser, hush
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Message
from rlhf_lit.errors import UserError
from rlhf_lit.models.foundation import Foundation
from rlhf_lit.models.heads import reward_bias
from rlhf_lit.models.loading import (
    Base,
    Dtype,
    context_length,
    load_causal_lm,
    load_scorer,
    load_tokenizer,
    stored_bias,
    unwrapped,
)
from rlhf_lit.models.logprobs import hidden_states, logits
from rlhf_lit.recording import environment
from rlhf_lit.rollout.rewards import score_sequences
from rlhf_lit.runs import EXPORT, resolve_model
from rlhf_lit.tracking import short_path

# What exported and trained model are compared on. Their logits stand in memory together: 0.6 GB for 150 000 tokens.
COMPARED_ROWS = 4
COMPARED_TOKENS = 128


# --- writing a folder ------------------------------------------------------------------------------------------------


def save_hf(module: Algorithm, folder: Path) -> None:
    """Write the trained model and its tokenizer to ``folder``.

    A policy is saved as a causal language model, a reward model as a sequence classifier with one label; with LoRA, the
    adapter alone, which names its base. A reward model's folder also holds ``reward.json``: the constant that this
    package adds to the classifier's logit (transformers' own ``score`` layer has none).
    """
    if isinstance(module, RewardModel):
        write_model(module.scorer, module.tokenizer, folder, scorer=True)
    else:
        policy: Any = module.roles.policy  # type: ignore[union-attr]
        write_model(policy, module.tokenizer, folder, scorer=False)


def write_model(model: nn.Module, tokenizer: Any, folder: Path, scorer: bool) -> None:
    """Write a model, or its adapter where it has one, and its tokenizer.

    Args:
        model: a transformers model, or one inside peft's wrapper.
        tokenizer: a reward model's gets a pad token that is not EOS.
        folder: where to.
        scorer: a sequence classifier, whose folder gets ``reward.json``.
    """
    if scorer:
        inner = unwrapped(model)
        # transformers finds the last token of a row by its pad id, which therefore must not be EOS.
        pad = _pad_token(tokenizer)
        tokenizer.pad_token = pad
        inner.config.pad_token_id = tokenizer.convert_tokens_to_ids(pad)
        _save(model, folder, "default")
        (folder / "reward.json").write_text(
            json.dumps({"bias": reward_bias(inner), "pad_token_id": inner.config.pad_token_id}) + "\n"
        )
    else:
        _save(model, folder, "default")
    tokenizer.save_pretrained(folder)


def _save(model: Any, folder: Path, adapter: str) -> None:
    from peft import PeftModel

    if isinstance(model, PeftModel):
        # peft puts the name that the base was loaded by, which may be a path relative to where that was.
        model.peft_config[adapter].base_model_name_or_path = model.foundation.name
        model.save_pretrained(folder, selected_adapters=[adapter])
        model.foundation.save(folder)
    else:
        model.save_pretrained(folder)


def _pad_token(tokenizer: Any) -> str:
    """A token to pad with that is not EOS."""
    eos = tokenizer.eos_token
    named = [getattr(tokenizer, name) for name in ("pad_token", "unk_token", "bos_token")]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for token in (*named, *special) if token not in (None, eos)]
    # Becoming the pad token makes a token special, and its spelling is then split off wherever a text holds it: "!"
    # would change how most texts are cut. No text holds the spelling of a word with its space ("Ġword").
    regular = sorted(tokenizer.get_vocab().items(), key=lambda entry: -entry[1])
    spaced = [token for token, _ in regular if token.startswith(("Ġ", "▁"))]
    return str((*spare, *spaced, *(token for token, _ in regular if token != eos))[0])


# --- what is exported ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A trained model in its folder, and the run that left it there.

    Attributes:
        name: as the user named it.
        folder: the model's or the adapter's.
        run: the run's folder; None where the model stands alone.
        trust_remote_code: run model code that comes with the weights.
    """

    name: str
    folder: Path
    run: Path | None
    trust_remote_code: bool

    @classmethod
    def find(cls, name: str, trust_remote_code: bool) -> Trained:
        """What ``resolve_model`` understands, as long as it is a folder.

        Raises:
            UserError: there is no such folder, it holds no model, or its adapter's base is gone.
        """
        folder = Path(resolve_model(name))
        if not folder.is_dir():
            raise UserError(f"{name}: no such run, and no folder with a model or an adapter")
        run = folder.parent if folder.name == EXPORT and (folder.parent / "config.yaml").is_file() else None
        found = cls(name, folder, run, trust_remote_code)
        if found.base_name is not None:
            try:
                resolve_model(found.base_name)
            except UserError as error:
                raise UserError(f"{name}: the base of its adapter is gone: {error}") from None
        return found

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """The adapter's configuration; None where the folder holds a whole model."""
        file = self.folder / "adapter_config.json"
        return cast("dict[str, Any]", json.loads(file.read_text())) if file.is_file() else None

    @cached_property
    def foundation(self) -> Foundation | None:
        """What the adapter was trained on; None for a whole model, and for adapters of other tools."""
        return Foundation.load(str(self.folder)) if self.adapter else None

    @property
    def base_name(self) -> str | None:
        """The adapter's base, a folder by its absolute path; None for a whole model."""
        if self.adapter is None:
            return None
        return self.foundation.name if self.foundation else str(self.adapter["base_model_name_or_path"])

    @property
    def quantized(self) -> bool:
        """Whether an adapter was trained on 4-bit weights."""
        return self.foundation is not None and self.foundation.quantization is not None

    @cached_property
    def scorer(self) -> bool:
        """Whether it is a reward model."""
        if self.adapter:
            return bool(self.adapter.get("task_type") == "SEQ_CLS")
        architectures = json.loads((self.folder / "config.json").read_text()).get("architectures") or [""]
        return str(architectures[0]).endswith("ForSequenceClassification")

    @cached_property
    def config_file(self) -> Path | None:
        """The run's resolved configuration: the last one, where it was resumed."""
        if self.run is None:
            return None
        resumed = sorted(self.run.glob("config_resumed_*.yaml"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
        return [self.run / "config.yaml", *resumed][-1]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The ``model`` section of the run's configuration; empty where there is no run."""
        if self.config_file is None:
            return {}
        return cast("dict[str, Any]", yaml.safe_load(self.config_file.read_text(encoding="utf-8"))["model"])

    @cached_property
    def base(self) -> Base:
        """The adapter's base in full precision (for a whole model: itself), in the width it is stored in."""
        from transformers import AutoConfig

        name = self.base_name or str(self.folder)
        run = self.config.get("init_args", {}).get("base", {})
        base = Base(name, revision=run.get("revision"), trust_remote_code=self.trust_remote_code)
        try:
            config = AutoConfig.from_pretrained(name, revision=base.revision, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name}: its base {name!r} could not be read: {_first_line(error)}") from None
        dtype = getattr(config, "dtype", None) or torch.float32  # configs of old name none: their weights are float32
        return replace(base, dtype=_dtype_name(dtype))

    def load(self, folder: Path) -> nn.Module:
        """The model as it was trained: an adapter on its base, in 4 bits where that was, in the run's width.

        Args:
            folder: the trained model's, or that of a copy.

        Raises:
            UserError: it cannot be loaded, or the base is not the one the adapter was trained on.
        """
        dtype = self.config.get("init_args", {}).get("base", {}).get("dtype") if self.adapter else None
        base = replace(self.base, name=str(folder), dtype=dtype or self.base.dtype)
        return _on_device(load_scorer(base, trained=True) if self.scorer else load_causal_lm(base))

    def merged(self, dtype: Dtype, dequantized: nn.Module | None) -> nn.Module:
        """The adapter in whole weights.

        Args:
            dtype: of the result. The sum is made in the wider of it and the base's own.
            dequantized: the model as it was trained, whose 4-bit weights take the base's place; None: the base itself.
        """
        from peft import PeftModel

        wide = torch.promote_types(getattr(torch, self.base.dtype), getattr(torch, dtype))
        base = replace(self.base, dtype=_dtype_name(wide))
        model = load_scorer(base) if self.scorer else load_causal_lm(base)
        if dequantized is not None:
            _put_dequantized(dequantized, model)
        wrapped = PeftModel.from_pretrained(model, str(self.folder))
        _untie(wrapped)
        whole = wrapped.merge_and_unload()
        if self.scorer:
            whole.config.reward_bias = stored_bias(str(self.folder)) or 0.0
        return cast("nn.Module", whole.to(getattr(torch, dtype)))


def _dtype_name(dtype: torch.dtype) -> Dtype:
    return cast("Dtype", str(dtype).removeprefix("torch."))


def _on_device(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _put_dequantized(source: nn.Module, target: nn.Module) -> None:
    """Replace weights by what the 4-bit ones of ``source`` stand for in its forward pass."""
    from bitsandbytes.functional import dequantize_4bit

    places = dict(target.named_parameters())
    for name, weight in unwrapped(source).named_parameters():
        if state := getattr(weight, "quant_state", None):
            places[name.replace(".base_layer", "")].copy_(dequantize_4bit(weight.data, state))


def _untie(wrapped: Any) -> None:
    """Give the LM head weights of its own where an adapter changes them, or the embeddings that they are tied to.

    Such an adapter acts on one use of the shared weights alone; merged into both it would be another model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = wrapped.get_base_model()
    head, embeddings = inner.get_output_embeddings(), inner.get_input_embeddings()
    if inner.config.tie_word_embeddings and any(isinstance(layer, BaseTunerLayer) for layer in (head, embeddings)):
        layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        inner.config.tie_word_embeddings = False


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from the one that was trained.

    Attributes:
        largest: of the absolute differences of their logits.
        scale: the largest absolute logit of the trained one.
        rows: what they were compared on, in words.
    """

    largest: float
    scale: float
    rows: str

    def __str__(self) -> str:
        return (
            f"largest logit difference to the run's own model {self.largest:.3g} (its logits reach {self.scale:.3g}), "
            f"on {self.rows}"
        )


def _compared_on(found: Trained, tokenizer: Any, limit: int) -> tuple[list[Tensor], str]:
    """[1, time] rows of tokens, and what they are: the run's last samples, or random tokens where it has none."""
    file = found.run / "samples.jsonl" if found.run else None
    if file is not None and file.is_file():
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[-COMPARED_ROWS:]]
        chat = ChatFormat(tokenizer)
        turns = [(Message("user", row["prompt"]), Message("assistant", row["response"])) for row in samples]
        rows = [chat.demonstration(pair).tokens[:limit] for pair in turns]
        if rows:
            return [torch.tensor([row]) for row in rows], f"{len(rows)} of the run's samples"
    # No special tokens: a classifier of transformers looks for the last one that is not the pad.
    ordinary = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
    picks = torch.randint(len(ordinary), (COMPARED_ROWS, limit), generator=torch.Generator().manual_seed(0))
    return list(ordinary[picks].split(1)), f"{COMPARED_ROWS} rows of random tokens"


@torch.no_grad()
def _trained_outputs(model: nn.Module, rows: list[Tensor], scorer: bool) -> list[Tensor]:
    """Logits, or a reward model's scores, through the forward pass of training."""
    device = next(model.parameters()).device
    if scorer:
        sequences = (Sequences.pad([row[0].tolist()], [[True] * row.shape[1]]).to(device) for row in rows)
        return [score_sequences(model, sequence, COMPARED_TOKENS).cpu() for sequence in sequences]
    return [logits(model, hidden_states(model, row.to(device))).cpu() for row in rows]


@torch.no_grad()
def _plain_outputs(folder: Path, rows: list[Tensor], scorer: bool, trust_remote_code: bool) -> list[Tensor]:
    """The same of a folder with whole weights, by someone without this package."""
    import transformers

    auto = transformers.AutoModelForSequenceClassification if scorer else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    model = _on_device(model.eval())
    device = next(model.parameters()).device
    found = [model(input_ids=row.to(device)).logits.float().cpu() for row in rows]
    return [output[:, 0] + (stored_bias(str(folder)) or 0.0) for output in found] if scorer else found


# --- the model card --------------------------------------------------------------------------------------------------


def _card(found: Trained, title: str, holds: str, whole: bool, difference: Difference) -> str:
    """The text of ``README.md``; says what the run's files say, and leaves out what they do not."""
    from huggingface_hub import ModelCardData

    algorithm = str(found.config.get("class_path", "")).rsplit(".", 1)[-1]
    named = found.base_name or found.config.get("init_args", {}).get("base", {}).get("name")
    data = ModelCardData(
        # The hub takes no folder for a base, and a whole model's may be one that is not here.
        base_model=None if found.base_name is None or Path(found.base_name).exists() else found.base_name,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-classification" if found.scorer else "text-generation",
        tags=["rlhf_lit", *([algorithm.lower()] if algorithm else [])],
    )
    facts = [f"- holds: {holds}"]
    if algorithm:
        facts.append(f"- algorithm: {algorithm} (rlhf_lit)")
    if named:
        facts.append(f"- base: `{named}`")
    if found.quantized and found.foundation and found.foundation.quantization:
        how = ", ".join(f"{key} {value}" for key, value in found.foundation.quantization.items())
        facts.append(f"- the base was in 4 bits in training: {how}")
    if found.scorer:
        facts.append("- a score is the one label's logit plus `bias` of `reward.json`; pad with its `pad_token_id`")
    facts.append(f"- {difference}")
    sections = [f"# {title}", "\n".join(facts)]
    if measured := _last_measured(found.run):
        where, metrics = measured
        lines = [f"| {name} | {value} |" for name, value in metrics.items()]
        sections.append("\n".join([f"## Last measured: {where}", "", "| metric | value |", "|---|---|", *lines]))
    if found.config_file is not None:
        sections.append(f"## Configuration\n\n```yaml\n{found.config_file.read_text(encoding='utf-8').rstrip()}\n```")
    sections.append(_versions(found))
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _last_measured(run: Path | None) -> tuple[str, dict[str, str]] | None:
    """The last validation in ``metrics.csv``, else its last step: where it was, and its numbers as they stand there."""
    file = run / "metrics.csv" if run else None
    if file is None or not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(lines)]
    for prefix, words in (("val/", "validation"), ("", "training")):
        for row in reversed(rows):
            metrics = {n: value for n, value in row.items() if n.startswith(prefix) and n not in ("step", "epoch")}
            if metrics:
                return f"{words} at step {row['step']} of `metrics.csv`, which counts from 0", metrics
    return None


def _versions(found: Trained) -> str:
    """Library versions: of the run as it recorded them, and of this export."""
    columns = {"exported with": environment()["packages"]}
    if found.config_file is not None:
        record = found.config_file.with_name(found.config_file.stem.replace("config", "versions") + ".json")
        if record.is_file():
            columns = {"trained with": json.loads(record.read_text())["packages"], **columns}
    names = dict.fromkeys(name for packages in columns.values() for name in packages)
    lines = [f"| {name} | {' | '.join(str(c.get(name) or '–') for c in columns.values())} |" for name in names]
    header = [f"| package | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join(["## Versions", "", *header, *lines])


# --- the command -----------------------------------------------------------------------------------------------------


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
    # Only a whole folder ever stands under its name: it is made beside it and renamed.
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        difference = _write_and_compare(found, partial, merge, dequantize, chosen)
        title = push_to_hub or short_path(found.run or found.folder)
        card = _card(found, title, holds, merge or not found.adapter, difference)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise UserError(f"--to {target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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
    rows, words = _compared_on(found, load_tokenizer(source), limit)
    expected = _trained_outputs(model, rows, found.scorer)
    if merge:
        if not dequantize:
            del model  # before the base comes, so that one stands in memory at a time
        model = found.merged(dtype, model if dequantize else None)
    write_model(model, load_tokenizer(source), folder, found.scorer)
    del model
    if merge or not found.adapter:
        outputs = _plain_outputs(folder, rows, found.scorer, found.trust_remote_code)
    else:
        outputs = _trained_outputs(found.load(folder), rows, found.scorer)
    differences = [a - b for a, b in zip(outputs, expected, strict=True)]
    return Difference(_largest(differences), _largest(expected), words)


def _largest(tensors: list[Tensor]) -> float:
    """The largest absolute element; nan where there is one."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors]).max())


def _check_hub(name: str) -> None:
    """Refuse what cannot be uploaded, before any work is done."""
    from httpx import HTTPError
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name}: no name for a repository: {_first_line(error)}") from None
    if is_offline_mode():
        raise UserError(f"--push-to-hub {name}: offline (HF_HUB_OFFLINE is set); leave it out, or unset that")
    if get_token() is None:
        raise UserError(f"--push-to-hub {name}: no token; run 'hf auth login', or set HF_TOKEN")
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        raise UserError(f"--push-to-hub {name}: the hub did not let us in: {_first_line(error)}") from None


def _upload(folder: Path, name: str) -> None:
    from httpx import HTTPError
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Export of rlhf_lit")
    except (OSError, HTTPError, ValueError) as error:
        raise UserError(
            f"--push-to-hub {name}: {_first_line(error)}; the export is whole in {short_path(folder)}"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    hush()
    print(export(**arguments.as_dict()))
    return 0
