"""A trained model as a run left it: what it is, on which base it stands, and how it is loaded and merged."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rlhf_lit.errors import UserError, first_line
from rlhf_lit.export.widths import Width, in_width
from rlhf_lit.files import load_yaml, short_path
from rlhf_lit.models.adapters import base_of_adapter
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.foundation import Foundation
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.quantization import Dtype, dequantized
from rlhf_lit.models.scorers import stored_bias
from rlhf_lit.runs import EXPORT, resolve_model


@dataclass(frozen=True)
class Trained:
    """A trained model in its folder, and the run that left it there.

    Attributes:
        name: as the user named it.
        folder: the model's or the adapter's.
        run: the run's folder; None where the model stands alone.
        trust_remote_code: run model code that comes with the weights.
        adapter_base: where its adapter's base is now; None: where the adapter says that it was.
    """

    name: str
    folder: Path
    run: Path | None
    trust_remote_code: bool
    adapter_base: str | None = None

    @classmethod
    def find(cls, name: str, trust_remote_code: bool, adapter_base: str | None = None) -> Trained:
        """What ``resolve_model`` understands, as long as it is a folder.

        Raises:
            UserError: there is no such folder, it holds no model, or its adapter's base is gone.
        """
        folder = Path(resolve_model(name))
        if not folder.is_dir():
            raise UserError(f"{name}: no such run, and no folder with a model or an adapter")
        run = folder.parent if folder.name == EXPORT and (folder.parent / "config.yaml").is_file() else None
        found = cls(name, folder, run, trust_remote_code, adapter_base)
        if found.adapter is None:
            if adapter_base is not None:
                raise UserError(f"--base: {name} holds a whole model, no adapter; leave --base out")
            return found
        try:
            base_of_adapter(Base(str(folder), adapter_base=adapter_base), found.adapter)
        except UserError as error:
            said = str(error).removeprefix("base.name: ").replace("base.adapter_base: ", "--base: ")
            raise UserError(said if adapter_base else f"{name}: {said}") from None
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
        if self.adapter_base is not None:
            return Base(self.adapter_base).address
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
    def sections(self) -> dict[str, Any]:
        """The run's configuration; empty where there is no run."""
        if self.config_file is None:
            return {}
        text = self.config_file.read_text(encoding="utf-8")
        return cast("dict[str, Any]", load_yaml(text, short_path(self.config_file)))

    @property
    def config(self) -> dict[str, Any]:
        """The ``model`` section of the run's configuration; empty where there is no run."""
        return cast("dict[str, Any]", self.sections.get("model", {}))

    @cached_property
    def stored(self) -> torch.dtype:
        """The width of the adapter's base in its files (for a whole model: its own)."""
        from transformers import AutoConfig

        name = self.base_name or str(self.folder)
        try:
            config = AutoConfig.from_pretrained(name, revision=self._revision, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            if self.adapter is None:
                raise UserError(f"{self.name}: its config.json could not be read: {first_line(error)}") from None
            raise UserError(
                f"{self.name}: its base {name!r} could not be read: {first_line(error)}; if it is elsewhere, say where "
                "with --base"
            ) from None
        # Configs of old name none: their weights are float32.
        return cast("torch.dtype", getattr(config, "dtype", None) or torch.float32)

    @property
    def _revision(self) -> str | None:
        return cast("str | None", self.config.get("init_args", {}).get("base", {}).get("revision"))

    @property
    def base(self) -> Base:
        """The adapter's base in full precision (for a whole model: itself), in the width it is stored in; float16 is
        computed with in float32."""
        return Base(
            self.base_name or str(self.folder),
            dtype="float32" if self.stored == torch.float16 else _dtype_name(self.stored),
            revision=self._revision,
            trust_remote_code=self.trust_remote_code,
        )

    def load(self, folder: Path) -> nn.Module:
        """The model as it was trained: an adapter on its base, in 4 bits where that was, in the run's width.

        Args:
            folder: the trained model's, or that of a copy.

        Raises:
            UserError: it cannot be loaded, or the base is not the one the adapter was trained on.
        """
        dtype = self.config.get("init_args", {}).get("base", {}).get("dtype") if self.adapter else None
        moved = self.base_name if self.adapter_base is not None else None
        base = replace(self.base, name=str(folder), dtype=dtype or self.base.dtype, adapter_base=moved)
        return on_device(load_scorer(base, trained=True) if self.scorer else load_causal_lm(base))

    def merged(self, dtype: Width, dequantized: nn.Module | None) -> nn.Module:
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
        return in_width(whole, getattr(torch, dtype))


def _dtype_name(dtype: torch.dtype) -> Dtype:
    return cast("Dtype", str(dtype).removeprefix("torch."))


def on_device(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _put_dequantized(source: nn.Module, target: nn.Module) -> None:
    """Replace weights by what the 4-bit ones of ``source`` stand for in its forward pass."""
    places = dict(target.named_parameters())
    for name, weight in unwrapped(source).named_parameters():
        if state := getattr(weight, "quant_state", None):
            places[name.replace(".base_layer", "")].copy_(dequantized(weight, state))


def _untie(wrapped: Any) -> None:
    """Give the LM head weights of its own where an adapter changes them or the embeddings that they are tied to, or has
    a copy of one of the two.

    Such an adapter acts on one use of the shared weights alone; merged into both it would be another model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    inner = wrapped.get_base_model()
    if not inner.config.tie_word_embeddings:
        return
    ends = [inner.get_output_embeddings(), inner.get_input_embeddings()]
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        head = ends[0]
        layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        inner.config.tie_word_embeddings = False
    elif any(isinstance(end, ModulesToSaveWrapper) for end in ends) and ends[0].weight is not ends[1].weight:
        inner.config.tie_word_embeddings = False
