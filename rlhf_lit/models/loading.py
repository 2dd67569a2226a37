"""The one room where models and tokenizers are loaded: full precision or 4-bit, with LoRA adapters or without.

A *base* is what a user names in a config: a hub name, a folder, or the run folder of an earlier stage. An adapter
folder (what a LoRA run exports) is loaded as its base with the adapter continued.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.foundation import Foundation, fingerprint
from rlhf_lit.runs import resolve_model

Dtype = Literal["float32", "bfloat16", "float16"]
PLAYGROUND = Path(__file__).parent / "playground"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): only they train, the base is frozen.

    Args:
        rank: r, the rank of the update.
        alpha: the update is scaled by alpha/r (rsLoRA: alpha/√r).
        dropout: on the adapters' input. SFT and RewardModel only: the others run without dropout and refuse it.
        targets: "all-linear" (every linear layer but the heads), or the names of the layers.
        dora: weight-decomposed adapters (Liu et al. 2024, arXiv 2402.09353).
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    dora: bool = False
    rslora: bool = False


@dataclass(frozen=True)
class Quantization:
    """4-bit base weights through bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).

    Args:
        type: the 4-bit data type, nf4 or fp4.
        double: quantise the quantisation constants too (0.37 bit per parameter less).
        compute_dtype: what the weights are dequantised to for a matrix product.
    """

    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    compute_dtype: Dtype = "bfloat16"


@dataclass(frozen=True)
class Base:
    """The model an algorithm starts from.

    Args:
        name: a hub name, a folder, a run folder of an earlier stage (`runs/<name>` means its newest version), or
            `playground` for the built-in world's small model.
        tokenizer: where the tokenizer is, if not with the model.
        dtype: of the base weights. Adapters and heads are float32.
        attention: transformers' attention implementation; null lets transformers choose.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: torch.compile the decoder layers of all models of the run, for training and scoring; sampling, whose
            cache grows token by token, stays as it is. The first steps take some tens of seconds more.
        lora: train low-rank adapters instead of all weights.
        quantization: load the base weights in 4 bits (needs `lora`, or an adapter folder). Where `name` is an adapter
            folder, null is what the adapter was trained on.
        fresh: take only the configuration from `name` and start from random weights, drawn from the seed.
        revision: a branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the weights.
    """

    name: str
    tokenizer: str | None = None
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    lora: LoRA | None = None
    quantization: Quantization | None = None
    fresh: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.fresh and (self.lora or self.quantization):
            raise UserError("base.fresh: random weights cannot be frozen: leave out base.lora and base.quantization")
        if self.name == "playground" and not self.fresh:
            raise UserError("base.name: playground has no weights of its own: set base.fresh: true")

    @property
    def folder(self) -> str:
        """Where the model really is: run folders resolved to their `hf/`, `playground` to the packaged folder."""
        return str(PLAYGROUND) if self.name == "playground" else resolve_model(self.name)

    @property
    def address(self) -> str:
        """The same, a folder by its absolute path: what a checkpoint remembers."""
        return str(Path(self.folder).absolute()) if Path(self.folder).is_dir() else self.folder


def _adapter_config(base: Base) -> dict[str, Any] | None:
    """The adapter configuration of a folder or hub repository that holds an adapter, else None."""
    from transformers.utils.peft_utils import find_adapter_config_file

    file = None if base.fresh else find_adapter_config_file(base.folder, revision=base.revision)
    return cast("dict[str, Any]", json.loads(Path(file).read_text())) if file else None


def holds_adapter(base: Base) -> bool:
    """Whether a base names an adapter, and no whole model."""
    return _adapter_config(base) is not None


def load_tokenizer(base: Base) -> Any:
    """The tokenizer of a base. Raises UserError where there is none to be found."""
    from transformers import AutoTokenizer

    folder = resolve_model(base.tokenizer) if base.tokenizer else base.folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"base.tokenizer: no tokenizer could be loaded from {folder!r}: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"base.tokenizer: the tokenizer of {folder!r} has no EOS token, so no response could end")
    return tokenizer


def require_embeddings(module: nn.Module, tokens: int) -> None:
    """Every token of the tokenizer must have an embedding; a token without one would end a run in its middle.

    Args:
        module: with its models built.
        tokens: of the tokenizer.

    Raises:
        UserError: a model of the module has fewer embeddings.
    """
    from transformers import PreTrainedModel

    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            rows = part.get_input_embeddings().weight.shape[0]
            if tokens > rows:
                raise UserError(f"base.tokenizer: it has {tokens} tokens, and the model only {rows} embeddings")


def require_no_dropout(base: Base, algorithm: str) -> None:
    """Refuse LoRA dropout: PPO, DPO and KTO compare log-probs of the same tokens in different passes."""
    if base.lora and base.lora.dropout:
        raise UserError(f"base.lora.dropout: {algorithm} runs without dropout; set it to 0")


def load_causal_lm(base: Base) -> nn.Module:
    """The language model of a base, adapters included, in eval mode."""
    model = _load(base, "AutoModelForCausalLM", {})
    _check_head(model)
    return model


def load_scorer(base: Base, trained: bool = False, frozen: bool = False) -> nn.Module:
    """The base as a sequence classifier with one score, its head in float32, in eval mode.

    A head that comes with the weights is kept; a new one is drawn normal with standard deviation 1/√(d+1) (Ziegler et
    al. 2019, §2.1).

    Args:
        base: where it is.
        trained: the base must be a reward model: it must come with a head.
        frozen: it will not be trained, so that it may be a whole model in 4 bits; nothing of it asks for a gradient.
    """
    model = _load(base, "AutoModelForSequenceClassification", {"num_labels": 1}, frozen)
    if frozen:
        model.requires_grad_(False)
    inner = unwrapped(model)
    if trained and inner.new_head:
        raise UserError(f"{base.name} is no reward model: it has no trained score head, and a new one scores at random")
    # The constant found after training; an adapter folder has no config.json of its own to hold it.
    if (bias := stored_bias(base.folder)) is not None:
        inner.config.reward_bias = bias
    return model


def stored_bias(folder: str) -> float | None:
    """The constant that a reward model's folder adds to its scores; None where it names none."""
    file = Path(folder) / "reward.json"
    return float(json.loads(file.read_text())["bias"]) if file.is_file() else None


def _load(base: Base, auto_class: str, extra: dict[str, Any], frozen: bool = False) -> nn.Module:
    import transformers

    adapter_folder = base.folder if (adapter := _adapter_config(base)) else None
    if adapter:
        if base.lora is not None and not _same_adapter(base.lora, adapter):
            raise UserError(
                f"base.lora: {base.name} already holds an adapter of rank {adapter['r']} and alpha "
                f"{adapter['lora_alpha']}, which is continued; set base.lora to the same values, or export it merged"
            )
        weights = replace(base, name=str(adapter["base_model_name_or_path"]))
        recorded = Foundation.load(base.folder)
        if recorded and recorded.quantization and base.quantization is None:
            # An adapter stands on the base it was trained on, in 4 bits where that was.
            weights = replace(weights, quantization=Quantization(**recorded.quantization))
    else:
        weights, recorded = base, None
    if base.quantization and not (base.lora or adapter or frozen):
        raise UserError("base.quantization: 4-bit weights cannot be trained: set base.lora too")
    auto = getattr(transformers, auto_class)
    dtype = getattr(torch, base.dtype)
    keywords: dict[str, Any] = {
        "revision": weights.revision,
        "trust_remote_code": weights.trust_remote_code,
        **extra,
    }
    if base.attention is not None:
        keywords["attn_implementation"] = base.attention
    missing = {"score.weight"}  # of the weights; a fresh model's are all drawn anew
    try:
        if base.fresh:
            config = transformers.AutoConfig.from_pretrained(weights.folder, **keywords)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
                model = auto.from_config(config, dtype=dtype)
        else:
            if weights.quantization:
                keywords["quantization_config"] = _quantization_config(weights.quantization)
            model, loaded = auto.from_pretrained(weights.folder, dtype=dtype, output_loading_info=True, **keywords)
            missing = set(loaded["missing_keys"])
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"base.name: {weights.folder!r} could not be loaded: {_first_line(error)}") from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        several = ", such as a score head with several labels" if "num_labels" in extra else ""
        raise UserError(f"base.name: {weights.folder!r} holds weights of other shapes{several}") from None
    scorer = "num_labels" in extra
    if scorer:
        _prepare_score_head(model, new="score.weight" in missing)
    elif not base.fresh and missing:
        raise UserError(
            f"base.name: {weights.folder!r} is no whole language model, it lacks {', '.join(sorted(missing))}"
        )
    if weights.quantization:
        _keep_4bit_layout(model)
    if base.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if base.lora or adapter_folder:
        model.requires_grad_(False)
        foundation = _foundation(model, weights)
        if recorded and adapter_folder:
            recorded.require_same(foundation, adapter_folder, "base.name")
        model = _with_adapter(model, base, adapter_folder, weights.address, scorer)
        model.foundation = foundation
    return cast("nn.Module", model.eval())


def _foundation(model: Any, base: Base) -> Foundation:
    """What a model, loaded and not yet adapted, is as the base of adapters."""
    body = getattr(model, model.base_model_prefix)
    quantization = asdict(base.quantization) if base.quantization else None
    return Foundation(base.address, quantization, fingerprint(body))


def _quantization_config(quantization: Quantization) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        # Heads stay in full precision; `score` is not among those transformers leaves out by itself.
        llm_int8_skip_modules=["lm_head", "score"],
    )


def _keep_4bit_layout(model: nn.Module) -> None:
    """Forbid the in-place repacking of 4-bit weights for AVX512-BF16, after which gradients are wrong or None."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _prepare_score_head(model: Any, new: bool) -> None:
    """The `score` head in float32, drawn anew unless it came with the weights; ``model.new_head`` tells which."""
    if not isinstance(getattr(model, "score", None), nn.Module):
        raise UserError(f"base.name: {type(model).__name__} has no `score` head; a decoder-only model is needed")
    head = model.score
    model.new_head = new
    if new:
        width = head.weight.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
            values = torch.randn(head.weight.shape) / (width + 1) ** 0.5
        head.weight.data.copy_(values)
    head.float()


def _with_adapter(model: Any, base: Base, adapter_folder: str | None, weights_folder: str, scorer: bool) -> Any:
    from peft import LoraConfig, PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    if adapter_folder:
        config = PeftConfig.from_pretrained(adapter_folder)
    else:
        assert base.lora is not None
        config = LoraConfig(
            r=base.lora.rank,
            lora_alpha=base.lora.alpha,
            lora_dropout=base.lora.dropout,
            target_modules=base.lora.targets,
            use_dora=base.lora.dora,
            use_rslora=base.lora.rslora,
        )
    config.inference_mode = False
    config.task_type = "SEQ_CLS" if scorer else "CAUSAL_LM"
    config.modules_to_save = ["score"] if scorer else None
    config.base_model_name_or_path = weights_folder
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"base.lora: {_first_line(error)}") from None
    if adapter_folder:
        loaded = load_peft_weights(adapter_folder, device="cpu")
        has_head = any("score" in key for key in loaded)
        if has_head and not scorer:
            raise UserError(f"base.name: {adapter_folder!r} is a reward model's adapter, no language model's")
        if scorer:
            wrapped.get_base_model().new_head = not has_head
        if scorer and not has_head:
            # A language model's adapter has no head, but peft asks for one: the new one.
            head = wrapped.get_base_model().score.original_module
            loaded |= {f"base_model.model.score.{name}": weight for name, weight in head.state_dict().items()}
        result = set_peft_model_state_dict(wrapped, loaded)
        if result.unexpected_keys:
            raise UserError(f"base.name: the adapter in {adapter_folder} does not fit its base {weights_folder}")
    return wrapped


def _same_adapter(lora: LoRA, adapter: dict[str, Any]) -> bool:
    return lora.rank == adapter["r"] and lora.alpha == adapter["lora_alpha"]


def _check_head(model: nn.Module) -> None:
    """Our hidden states → LM head path must give the model's own logits, or log-probs would be silently wrong."""
    from rlhf_lit.models.logprobs import logits
    from rlhf_lit.models.packing import hidden_states

    tokens = torch.tensor([[1, 2, 3]], device=next(model.parameters()).device)
    with torch.no_grad():
        own = unwrapped(model)(input_ids=tokens, use_cache=False).logits.float()
        ours = logits(model, hidden_states(model, tokens)).float()
    if not torch.allclose(own, ours, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"base.name: {type(unwrapped(model)).__name__} changes its logits after the LM head in a way not supported"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
