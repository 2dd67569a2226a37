"""Golden values for PPO: TRL's last trainer and the original one, computed by their own lines.

Neither version can share an environment with the TRL that the other oracles import, so what they compute stands in
``ppo.json`` beside this file, inputs and outputs, as exact floats. To make it anew, with the two versions in folders of
their own, outside the repository:

    pip install --no-deps --target LAST trl==1.12.0
    pip install --no-deps --target ORIGINAL trl==0.11.4
    python tests/oracles/golden/make.py LAST ORIGINAL

* ``last`` is one batch of ``trl.experimental.ppo.PPOTrainer.train`` on tiny float64 models: each call of
  ``accelerator.backward`` keeps what the local variables of ``train`` hold at that moment.
* ``original`` runs functions and methods of TRL 0.11.4 on random numbers. That version no longer imports beside a
  current transformers, so their definitions are compiled one by one from its installed source.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

VERSIONS = {"last": "1.12.0", "original": "0.11.4"}
VOCABULARY, PAD, EOS = 12, 0, 1
ROWS, PROMPT, RESPONSE = 4, 4, 6

# None at its default, so that a setting that was mixed up with another shows.
LAST: dict[str, Any] = {
    "gamma": 0.97,
    "lam": 0.9,
    "kl_coef": 0.3,
    "cliprange": 0.15,
    "cliprange_value": 0.1,
    "vf_coef": 0.25,
    "max_grad_norm": 0.01,
    "learning_rate": 0.05,
    "temperature": 0.7,
    "num_ppo_epochs": 2,
}
ORIGINAL: dict[str, Any] = {
    "gamma": 0.97,
    "lam": 0.9,
    "init_kl_coef": 0.3,
    "cliprange": 0.15,
    "cliprange_value": 0.1,
    "vf_coef": 0.25,
    "whiten_rewards": False,
    "ratio_threshold": 10.0,
}


# TRL's last PPO


def last_ppo(estimator: str) -> dict[str, Any]:
    """One batch through the trainer, on the same seeds for each KL estimator."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    np.random.seed(0)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, VOCABULARY, (PROMPT - i % 2,), generator=generator).tolist() for i in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            kl_estimator=estimator,
            response_length=RESPONSE,
            stop_token="eos",
            per_device_train_batch_size=ROWS,
            total_episodes=ROWS,
            num_sample_generations=0,
            optim="sgd",
            seed=32,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **LAST,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer(),
            model=language_model(0),
            ref_model=language_model(0, disturbed=0.05),
            reward_model=scorer(1),
            value_model=scorer(2),
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
        )
        taken = capture(trainer)
        trainer.train()
    log = trainer.state.log_history[0]
    logged = ("objective/kl", "objective/scores", "policy/clipfrac_avg", "val/clipfrac_avg")
    return {**rollout(taken[0]), "updates": [update(x) for x in taken], "logged": {name: log[name] for name in logged}}


def tokenizer() -> Any:
    """One word per token; pad and EOS are two tokens, since TRL tells padding by its id (#1623)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=64
    )


def config(**settings: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **settings,
    )


def language_model(seed: int, disturbed: float = 0.0) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(config()).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += disturbed * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def scorer(seed: int) -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(num_labels=1)).double()


def capture(trainer: Any) -> list[dict[str, Any]]:
    """Keep the local variables of ``train`` at each backward, and how far the step before it moved the weights."""
    taken: list[dict[str, Any]] = []
    backward, step = trainer.accelerator.backward, trainer.optimizer.step
    weights = list(trainer.model.parameters())

    def keep(loss: Tensor, **settings: Any) -> None:
        names = dict(sys._getframe(1).f_locals)
        gradients = torch.autograd.grad(loss, [names["new_logprobs"], names["vpred"]], retain_graph=True)
        backward(loss, **settings)
        norm = torch.stack([w.grad.norm() for w in weights if w.grad is not None]).norm()
        taken.append({**names, "gradients": gradients, "gradient_norm": norm})

    def move() -> None:
        before = [w.detach().clone() for w in weights]
        step()
        moved = torch.stack([(w.detach() - b).norm() for w, b in zip(weights, before, strict=True)]).norm()
        taken[-1]["step_over_learning_rate"] = moved / LAST["learning_rate"]

    trainer.accelerator.backward, trainer.optimizer.step = keep, move
    return taken


def rollout(names: dict[str, Any]) -> dict[str, Any]:
    """The experience, [rows, time] but for the scores; TRL keeps the advantages before whitening only in pieces."""
    lengths = (names["sequence_lengths"] + 1).tolist()
    ends = [row[n - 1] for row, n in zip(names["responses"].tolist(), lengths, strict=True)]
    assert all(end == EOS for end, n in zip(ends, lengths, strict=True) if n < RESPONSE), "a pad token was sampled"
    assert {RESPONSE, RESPONSE - 1} < set(lengths), "too few kinds of ends"
    return {
        "actions": ~names["padding_mask"],
        "actions_and_one_past": ~names["padding_mask_p1"],
        "old_logprobs": names["logprobs"],
        "reference_logprobs": names["ref_logprobs"],
        "kl": names["kl"],
        "scores": names["scores"],
        "rewards": names["rewards"],
        "values": names["values"],
        "advantages": torch.stack(names["advantages_reversed"][::-1], 1),
        "returns": names["returns"],
        "whitened_advantages": names["advantages"],
    }


def update(names: dict[str, Any]) -> dict[str, Any]:
    """One optimizer step, its rows back in the rollout's order."""
    order = torch.as_tensor(names["micro_batch_inds"]).argsort()
    logprob_gradient, value_gradient = names["gradients"]
    # `max_grad_norm` is accepted and ignored: plain SGD has moved the weights by the whole gradient.
    assert float(names["gradient_norm"]) > LAST["max_grad_norm"]
    torch.testing.assert_close(names["step_over_learning_rate"], names["gradient_norm"], rtol=1e-9, atol=0)
    return {
        "logprobs": names["new_logprobs"][order],
        "values": names["vpred"][order],
        "policy_losses": names["pg_loss_max"][order],
        "squared_value_errors": names["vf_loss_max"][order],
        "policy_loss": names["pg_loss"],
        "value_loss": names["vf_loss"],
        "loss": names["loss"],
        "logprob_gradient": logprob_gradient[order],
        "value_gradient": value_gradient[order],
    }


# The original TRL


def definitions(source: Path, names: set[str], inside: str | None = None) -> list[ast.stmt]:
    """Functions and classes of a file, or the methods of one of its classes, as they stand there."""
    body = ast.parse(source.read_text()).body
    if inside:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == inside).body
    found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names]
    assert {node.name for node in found} == names
    return list(found)


def original_code(folder: Path) -> dict[str, Any]:
    """The namespace in which the compiled definitions live."""
    core = {"masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits", "flatten_dict"}
    nodes = [
        *definitions(folder / "trl" / "core.py", core),
        *definitions(folder / "trl" / "trainer" / "utils.py", {"AdaptiveKLController"}),
        *definitions(
            folder / "trl" / "trainer" / "ppo_trainer.py",
            {"compute_rewards", "_kl_penalty", "compute_advantages", "loss"},
            inside="PPOTrainer",
        ),
    ]
    names: dict[str, Any] = {"torch": torch, "np": np, "F": nn.functional, "warnings": warnings, "Mapping": Mapping}
    # This file's own `annotations` import holds for what it compiles: the types they name are looked up by nobody.
    exec(compile(ast.Module(nodes, []), "trl", "exec"), names)
    return names


def original_ppo(code: dict[str, Any]) -> dict[str, Any]:
    """Penalty, rewards, advantages and losses of four responses that start late and end early."""
    generator = torch.Generator().manual_seed(11)

    def numbers(*shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)

    time = torch.arange(7)
    first, last = torch.tensor([[0], [2], [1], [0]]), torch.tensor([[6], [5], [1], [3]])
    mask = ((first <= time) & (time <= last)).double()
    logprobs, scores = -numbers(4, 7).abs(), numbers(4, spread=2.0)
    given = {
        "mask": mask.bool(),
        "scores": scores,
        "logprobs": logprobs,
        "reference_logprobs": logprobs + numbers(4, 7, spread=0.5),
        "values": numbers(4, 7),
        "new_logprobs": logprobs + numbers(4, 7, spread=0.3),
        "new_values": numbers(4, 7),
    }
    self = SimpleNamespace(
        config=SimpleNamespace(**ORIGINAL, kl_penalty="kl"), kl_ctl=SimpleNamespace(value=ORIGINAL["init_kl_coef"])
    )
    self._kl_penalty = lambda *arguments: code["_kl_penalty"](self, *arguments)
    rewards, _, _ = code["compute_rewards"](self, scores, logprobs, given["reference_logprobs"], mask)
    masked_values, whitened, returns = code["compute_advantages"](self, given["values"], rewards, mask)
    policy_loss, value_loss, stats = code["loss"](
        self,
        logprobs,
        masked_values,
        numbers(4, 7, 3),
        given["new_values"],
        given["new_logprobs"],
        mask,
        whitened,
        returns,
    )
    full, full_reference = numbers(2, 3, 5).log_softmax(-1), numbers(2, 3, 5).log_softmax(-1)
    return {
        **given,
        "rewards": rewards,
        "returns": returns,
        "whitened_advantages": whitened,
        "policy_loss": policy_loss,
        "weighted_value_loss": value_loss,
        "policy_clip_fraction": stats["policy/clipfrac"],
        "value_clip_fraction": stats["val/clipfrac"],
        "penalties": {
            name: penalty(code, name, logprobs, given["reference_logprobs"]) for name in ("kl", "abs", "mse")
        },
        "full": {
            "logprobs": full,
            "reference_logprobs": full_reference,
            "penalty": penalty(code, "full", full, full_reference),
        },
    }


def penalty(code: dict[str, Any], name: str, logprobs: Tensor, reference: Tensor) -> Tensor:
    return code["_kl_penalty"](SimpleNamespace(config=SimpleNamespace(kl_penalty=name)), logprobs, reference)


def controllers(make: Callable[..., Any]) -> list[dict[str, Any]]:
    """Chains of updates, the first six of one link each."""
    runs = [(0.15, 6.0, 10_000.0, 512, [kl]) for kl in (0.0, 3.0, 6.0, 6.6, 9.0, 100.0)]
    runs.append((0.2, 6.0, 10_000.0, 128, [0.0, 1.3, 4.9, 6.1, 7.7, 25.0, 6.9, 5.2]))
    runs.append((0.05, 2.5, 500.0, 64, [0.4, 2.2, 2.6, 3.1, 9.0, 2.4, -0.3]))
    chains = []
    for beta, target, horizon, episodes, kls in runs:
        controller, betas = make(beta, target, horizon), []
        for kl in kls:
            controller.update(kl, episodes)
            betas.append(float(controller.value))
        chains.append(
            {"beta": beta, "target": target, "horizon": horizon, "episodes": episodes, "kl": kls, "betas": betas}
        )
    return chains


# The file


def plain(value: Any) -> Any:
    """Tensors as lists: their numbers as Python floats, whose repr is exact, or as 0 and 1."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, Tensor):
        detached = value.detach()
        return (detached.int() if detached.dtype == torch.bool else detached.double()).tolist()
    return value


def check_version(folder: Path, name: str) -> None:
    found = [d.version for d in importlib.metadata.distributions(path=[str(folder)]) if d.name == "trl"]
    if found != [VERSIONS[name]]:
        sys.exit(f"{name.upper()} must hold trl {VERSIONS[name]}, not {', '.join(found) or 'nothing'}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes ppo.json; see the docstring of this file.")
    parser.add_argument("last", type=Path, help="the folder of trl 1.12.0")
    parser.add_argument("original", type=Path, help="the folder of trl 0.11.4")
    folders = parser.parse_args()
    check_version(folders.last, "last")
    check_version(folders.original, "original")
    sys.path.insert(0, str(folders.last))
    torch.set_num_threads(1)

    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "numpy")}
    code = original_code(folders.original)
    golden = {
        "versions": {f"trl ({name})": version for name, version in VERSIONS.items()} | packages,
        "last": {"settings": LAST, **last_ppo("k1"), "k3": last_ppo("k3")["kl"]},
        "original": {
            "settings": ORIGINAL,
            **original_ppo(code),
            "controllers": controllers(code["AdaptiveKLController"]),
        },
    }
    text = json.dumps(plain(golden), indent=1)
    rows = re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    target = Path(__file__).parent / "ppo.json"
    target.write_text(rows + "\n")
    print(f"{target.name}: {target.stat().st_size} bytes, {golden['versions']}")


if __name__ == "__main__":
    main()
