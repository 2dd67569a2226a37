"""Roles: policy, reference, critic and reward behind one interface, on one LoRA base or as separate models.

``with roles.acting("reference") as model:`` gives the model that plays the role. With LoRA that is the policy's own
base with another adapter (or none) in force; without, a model of its own. The algorithm's code does not know which.

PEFT's own ``set_adapter`` and ``disable_adapter`` switch ``requires_grad`` of the other adapters off, so that a policy
forward followed by a switch would leave the policy without a gradient. A role is therefore switched by the layers'
active adapter alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from rlhf_lit.errors import UserError, first_line
from rlhf_lit.models.adapter_files import (
    LM_HEADS,
    SCORE,
    adapter_file,
    parts_of,
    put_weights,
    read_config,
    read_weights,
    require_parts,
    trained_modules,
    without_copies,
)
from rlhf_lit.models.adapter_names import adapter_of, copied_modules, of_adapter, plain_name, switched_modules
from rlhf_lit.models.adapters import holds_adapter
from rlhf_lit.models.anatomy import is_wrapped, states_width, unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.checkpointing import checkpoint_in_eval_mode
from rlhf_lit.models.foundation import Foundation
from rlhf_lit.models.heads import reward_bias, scalar_head
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.scorers import stored_bias

# "policy", "reference", "value", or what ``add_reward`` returns.
Role = str


@dataclass(frozen=True)
class Critic:
    """The value function.

    Args:
        init: a separate critic starts from the reward model, its head included, or from the policy with a new head.
        trunk: no separate critic but a head on the policy's hidden states; the two losses then share gradients, and
            `init` must be `policy`.
        learning_rate: peak learning rate of the critic (on the policy's trunk: of its head); null is the policy's.
        warmup: optimizer steps at the start of the run that train the critic alone (on the policy's trunk: its head);
            an adaptive β stands still meanwhile.
        head: how a new head (`init: policy`) starts: drawn by the seed with standard deviation 1/√(d+1), and divided by
            the standard deviation of its values of the first training prompts where that is above 1 (`scaled`), or as
            it was drawn (`seed`).
    """

    init: Literal["reward", "policy"] = "reward"
    trunk: bool = False
    learning_rate: float | None = None
    warmup: int = 0
    head: Literal["scaled", "seed"] = "scaled"

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"critic.learning_rate must be greater than 0 or null, not {self.learning_rate}")
        if self.warmup < 0:
            raise UserError(f"critic.warmup must be at least 0 steps, not {self.warmup}")
        if self.trunk and self.init != "policy":
            raise UserError("critic.init: a critic on the policy's trunk starts from the policy; set it to policy")


class Roles(nn.Module):
    """The models of one algorithm.

    Args:
        base: what the policy starts from.
        reference: whether a frozen reference (the policy as it is now) is needed.
    """

    def __init__(self, base: Base, reference: bool = False) -> None:
        super().__init__()
        policy = load_causal_lm(base)
        self.models = nn.ModuleDict({"policy": policy})
        self.heads = nn.ModuleDict()
        self.shared = is_wrapped(policy)
        # The adapter that is in force for each role; None: all adapters off.
        self._adapters: dict[str, str | None] = {"policy": "default"}
        if reference:
            self.add_reference()

    @property
    def policy(self) -> Any:
        """The policy's model."""
        return self.models["policy"]

    def use_reference(self, model: nn.Module) -> None:
        """Another model as the reference."""
        self._adapters.pop("reference", None)
        self.models["reference"] = model.requires_grad_(False)

    def add_reference(self, own: bool = False) -> None:
        """A frozen reference: the policy as it is now.

        Args:
            own: in weights of its own, so that it can be moved; else adapters off will do where they are the same.
        """
        if not self.shared:
            self.models["reference"] = copy.deepcopy(self.policy).requires_grad_(False)
        elif self._untouched() and not own:
            self._adapters["reference"] = None
        else:
            # The adapter was trained by an earlier stage: the reference is that stage's model, not the bare base.
            self._copy_adapter("reference", trainable=False)

    @property
    def has_reference(self) -> bool:
        """Whether there is one to be asked."""
        return "reference" in self.models or "reference" in self._adapters

    def drop_reference(self) -> None:
        """Free what the reference holds, if there is one."""
        if "reference" in self.models:
            del self.models["reference"]
        elif self._adapters.pop("reference", None) is not None:
            self.policy.delete_adapter("reference")

    def reference_pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """A reference's own weights: their names here, and with each the policy's weight it began as."""
        weights = dict(self.policy.named_parameters())
        if "reference" in self.models:
            for name, weight in self.models["reference"].named_parameters():
                yield f"models.reference.{name}", weight, weights[name]
            return
        for name, weight in weights.items():
            if adapter_of(name) == "reference":
                yield f"models.policy.{name}", weight, weights[of_adapter(name, "default")]

    @torch.no_grad()
    def move_reference(self, mix: float) -> None:
        """π₀ ← mix·π + (1 − mix)·π₀ on the reference's own weights (of an adapter: on each factor)."""
        for _, reference, policy in self.reference_pairs():
            reference.lerp_(policy.to(reference.dtype), mix)

    def add_critic(self, base: Base, init: Base | None, trunk: bool) -> None:
        """The value role: a head on the policy's hidden states (``trunk``), or a body of its own.

        Args:
            base: the policy's base.
            init: where a separate critic starts: a reward model, whose head it takes over; None: the policy's
                weights and a new head.
            trunk: share the policy's hidden states, and with them its gradients.
        """
        self.heads["value"] = scalar_head(states_width(self.policy))
        if trunk:
            self._adapters["value"] = self._adapters["policy"]
            return
        if self.shared and init is None:
            self._copy_adapter("value", trainable=True)
            return
        if self.shared and init is not None:
            if not holds_adapter(init):
                raise UserError(
                    f"critic.init: the policy trains LoRA adapters, but the reward model in {init.folder} is a full "
                    "model; train it with base.lora, or set critic.init: policy"
                )
            self.heads["value"] = self._load_adapter("value", init.folder, True, "critic.init")
            return
        if init is not None:
            if (adapted := Foundation.load(init.folder)) and adapted.quantization:
                raise UserError(
                    f"critic.init: the reward model in {init.folder} is an adapter on 4-bit weights, and those cannot "
                    "be trained; train the policy with base.lora too, or set critic.init: policy"
                )
            # It trains beside the policy, in the same manner: not in what the reward model is frozen in.
            init = replace(
                init,
                dtype=base.dtype,
                quantization=None,
                attention=base.attention,
                gradient_checkpointing=base.gradient_checkpointing,
            )
        scorer: Any = load_scorer(init or base, trained=init is not None)
        inner = unwrapped(scorer)
        if init is not None:
            self.heads["value"] = head = scalar_head(inner.score.weight.shape[1])  # it may be a larger model
            head.weight.data.copy_(inner.score.weight.data)
            head.bias.data.fill_(reward_bias(inner))
        inner.score = nn.Identity()
        if init is not None and scorer is not inner:
            scorer = scorer.merge_and_unload()
        self.models["value"] = scorer.requires_grad_(True)

    @property
    def value_on_trunk(self) -> bool:
        """Whether the critic is a head on the policy's hidden states."""
        return "value" in self._adapters and self._adapters["value"] == self._adapters["policy"]

    def add_reward(self, base: Base) -> str:
        """A frozen reward role: a LoRA reward model's adapter and head on the policy's base.

        Returns:
            The role's name.

        Raises:
            UserError: the adapter was trained on another base.
        """
        name = f"reward{sum(role.startswith('reward') for role in self._adapters)}"
        self.heads[name] = self._load_adapter(name, base.folder, False, "reward.path")
        return name

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's own trainable parameters: none that it shares with the policy."""
        body = self.models["value"].parameters() if "value" in self.models else ()
        weights = self.policy.named_parameters() if self.shared else ()
        adapter = (p for name, p in weights if adapter_of(name) == "value")
        return [p for p in (*body, *adapter, *self.heads["value"].parameters()) if p.requires_grad]

    @contextmanager
    def acting(self, role: Role) -> Iterator[Any]:
        """The model that plays a role, for the time of the block. The policy's role is in force outside of any.

        A backward pass that recomputes activations (gradient checkpointing) must run inside the block of its forward.
        """
        if not self.shared or role not in self._adapters:
            yield self.models[role if role in self.models else "policy"]
            return
        modules = switched_modules(self.policy)
        before = [(module._active_adapter, module._disable_adapters) for module in modules]
        adapter = self._adapters[role]
        for module in modules:
            module._disable_adapters = adapter is None
            if adapter is not None:
                # A module that this adapter has no copy of acts as the base's own.
                copied = getattr(module, "_adapters", None)
                module._active_adapter = [adapter] if copied is None or adapter in copied else []
        try:
            yield self.policy
        finally:
            for module, (active, disabled) in zip(modules, before, strict=True):
                module._active_adapter, module._disable_adapters = active, disabled

    def without_dropout(self) -> None:
        """eval() everywhere, with gradient checkpointing still on (transformers ties it to training mode)."""
        self.eval()
        checkpoint_in_eval_mode(self)

    def _untouched(self) -> bool:
        """Whether the policy's adapter is new and still adds nothing, so that adapters off is the same model.

        Of a layer's two matrices one begins at 0; DoRA's magnitudes move with it.
        """
        if not self.policy.new_adapter:
            return False
        zero = (".lora_B.default.", ".lora_embedding_A.default")
        weights = self.policy.named_parameters()
        if any(weight.any() for name, weight in weights if any(part in name for part in zero)):
            return False
        for _, wrapper in copied_modules(self.policy):
            own = wrapper.original_module.state_dict()
            if any(not own[name].equal(w) for name, w in wrapper.modules_to_save["default"].state_dict().items()):
                return False
        return True

    def _copy_adapter(self, name: str, trainable: bool) -> None:
        """A new adapter with the policy's present weights, under its own name."""
        from peft import get_peft_model_state_dict

        config = copy.deepcopy(self.policy.peft_config["default"])
        weights = get_peft_model_state_dict(self.policy, adapter_name="default", save_embedding_layers=False)
        if name == "value" and not config.ensure_weight_tying:
            # A critic reads hidden states: nothing would train its copy of the LM head.
            weights = without_copies(config, weights, LM_HEADS)
        self._add_adapter(name, config, trainable)
        put_weights(self.policy, weights, name, "the policy's adapter", "base.name")

    def _add_adapter(self, name: str, config: Any, trainable: bool) -> None:
        """Another adapter on the policy's base, which plays the role of its name; its weights are put in later."""
        requires = {plain_name(key): parameter.requires_grad for key, parameter in self.policy.named_parameters()}
        self.policy.add_adapter(name, config)
        self._adapters[name] = name
        # add_adapter leaves only one adapter trainable; say for each what it is. A module that gets its first copy now
        # has another name than before.
        for key, parameter in self.policy.named_parameters():
            parameter.requires_grad_(trainable if adapter_of(key) == name else requires[plain_name(key)])

    def _load_adapter(self, name: str, folder: str, trainable: bool, field: str) -> nn.Linear:
        """A reward model's adapter under a name of its own, on the policy's base, and its score head.

        Raises:
            UserError: it was trained on another base, or is not whole. Names ``field`` of the config.
        """
        from os.path import realpath

        config, ours = read_config(folder, None, field), self.policy.peft_config["default"]
        if recorded := Foundation.load(folder):
            recorded.require_same(self.policy.foundation, folder, field)
        elif realpath(config.base_model_name_or_path) != realpath(ours.base_model_name_or_path):
            raise UserError(
                f"{field}: the adapter in {folder} was trained on {config.base_model_name_or_path}, the policy's on "
                f"{ours.base_model_name_or_path}; train both on the same base"
            )
        weights = read_weights(folder, None, field)
        if f"{SCORE}weight" not in weights:
            raise UserError(f"{field}: {folder} holds a language model's adapter, no reward model's")
        score = weights.pop(f"{SCORE}weight")
        head = scalar_head(states_width(self.policy))
        if score.shape != head.weight.shape:
            raise UserError(f"{field}: the score head in {folder} is of shape {list(score.shape)}, not one score's")
        config.task_type, config.inference_mode = "CAUSAL_LM", not trainable
        config.modules_to_save = trained_modules(config.modules_to_save) or None
        where, parts = adapter_file(folder, None), parts_of(unwrapped(self.policy))
        try:
            self._add_adapter(name, config, trainable)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{field}: {where}: {first_line(error)}") from None
        require_parts(self.policy, parts, name, f"{folder}/adapter_config.json", field)
        put_weights(self.policy, weights, name, where, field)
        head.weight.data.copy_(score.to(torch.float32))
        head.bias.data.fill_(stored_bias(folder) or 0.0)
        return head.requires_grad_(trainable)
