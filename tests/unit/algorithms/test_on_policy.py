"""What PPO, RLOO and GRPO share, and what the two without a critic make of a rollout."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlhf_lit.algorithms import GRPO, PPO, RLOO
from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.batches import ExperienceBatch
from rlhf_lit.errors import UserError
from rlhf_lit.losses.advantages import GAE, GroupRelative, LeaveOneOut
from rlhf_lit.losses.kl import AdaptiveKL, FixedKL, KLController
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.heads import token_values
from rlhf_lit.models.roles import Critic
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import MissingEOS, RewardFromFunction, RewardSource
from rlhf_lit.rollout.shaping import Shaping

PROMPTS, SAMPLES = 4, 3


def moved(kind: Any, llama: str, **settings: Any) -> OnPolicy:
    """An algorithm whose policy has left its reference."""
    module = tiny.make_on_policy(kind, Base(name=llama), **settings)
    tiny.disturb(module.roles.models["policy"], 0.05)
    return module


def groups() -> tiny.PromptBatch:
    return tiny.repeated(tiny.prompts(PROMPTS), SAMPLES)


def last_tokens(experience: ExperienceBatch, column: str) -> torch.Tensor:
    rows = torch.arange(len(experience))
    return getattr(experience, column)[rows, experience.sequences.lengths - 1]


def totals(module: OnPolicy, experience: ExperienceBatch) -> list[list[float]]:
    """R = score − Σ β·k1 of each response, by prompt, from the experience's own log-probs and the function's scores."""
    texts = [
        module.tokenizer.decode(row[mask], skip_special_tokens=True)
        for row, mask in zip(experience.sequences.tokens, experience.sequences.mask, strict=True)
    ]
    scores = torch.tensor(tiny.word_count([], texts, []))
    beta = 0.0 if module.kl.placement == "loss" else module.kl.beta
    total = scores - beta * (experience.old_logprobs - experience.reference_logprobs).sum(-1)
    return total.view(PROMPTS, SAMPLES).tolist()


# --- advantages by comparison ----------------------------------------------------------------------------------------


def test_rloo_compares_each_response_with_the_others_to_its_prompt(llama: str) -> None:
    module = moved(RLOO, llama)
    experience = module.rollout(groups(), 0)
    expected = []
    for group in totals(module, experience):
        expected += [own - (sum(group) - own) / (SAMPLES - 1) for own in group]
    mask = experience.sequences.mask
    spread = torch.where(mask, torch.tensor(expected)[:, None], 0.0)
    torch.testing.assert_close(experience.advantages, spread, rtol=1e-4, atol=1e-5)
    assert len({round(value, 3) for value in expected}) == PROMPTS * SAMPLES
    torch.testing.assert_close(experience.returns - experience.values, experience.advantages)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_grpo_ranks_each_response_among_those_to_its_prompt(llama: str, scale: Any) -> None:
    """The KL stands in the loss, so R is the score alone."""
    module = moved(GRPO, llama, kl=FixedKL(0.2, "k3", "loss"), advantages=GroupRelative(scale))
    experience = module.rollout(groups(), 0)
    expected = []
    for group in totals(module, experience):
        mean = sum(group) / SAMPLES
        deviation = math.sqrt(sum((own - mean) ** 2 for own in group) / (SAMPLES - 1))
        expected += [(own - mean) / (deviation + 1e-4 if scale == "group" else 1.0) for own in group]
    torch.testing.assert_close(last_tokens(experience, "advantages"), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_responses_that_are_all_alike_are_counted(llama: str) -> None:
    module = moved(GRPO, llama, reward=RewardFromFunction(first_prompt_differs), kl=FixedKL(0.0))
    module.rollout(groups(), 0)
    assert module.rollout_metrics["rollout/zero_advantages"] == pytest.approx((PROMPTS - 1) / PROMPTS)


def first_prompt_differs(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [float(i**2) if prompt == "prompt 0" else 1.0 for i, prompt in enumerate(prompts)]


def test_on_policy_rloo_has_reinforces_gradient(llama: str) -> None:
    """One pass, ρ = 1: the gradient of the clipped loss is that of −Σ_i A_i·log π(y_i)/tokens."""
    module = moved(RLOO, llama).double()
    experience = module.rollout(groups(), 0)
    step = tiny.Step(module, experience)
    module.zero_grad()
    logprobs = tiny.logprobs_of(module, experience.sequences)
    mask = experience.sequences.mask
    (-(last_tokens(experience, "advantages") * logprobs.sum(-1)).sum() / mask.sum()).backward()
    ours = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert step.gradients.keys() == ours.keys()
    for name, gradient in step.gradients.items():
        torch.testing.assert_close(gradient, ours[name], rtol=0, atol=1e-6 * step.norm)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_shaped_before_the_penalty_joins_them(llama: str) -> None:
    """The running moments take this rollout in before they normalise it, and remember it for the next."""
    shaping = Shaping("standardise", 1.0, MissingEOS("replace", -2.0))
    module = moved(RLOO, llama, shaping=shaping, sampling=Sampling(max_new_tokens=30))
    records = []
    module.on_rollout = lambda number, record: records.append(record)
    history = torch.empty(0)
    for number in range(2):
        module.rollout(groups(), number)
        record = records[number]
        history = torch.cat([history, record.scores.raw])
        clipped = ((record.scores.raw - history.mean()) / history.std(correction=0)).clamp(-1, 1)
        ended = record.samples.ended
        expected = torch.where(ended, clipped, -2.0)
        torch.testing.assert_close(record.scores.shaped, expected, rtol=1e-5, atol=1e-5)
        assert ended.any()
        assert not ended.all()
        rewards = record.rewards.sum(-1) + record.penalty.sum(-1)
        torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-4)
        metrics = module.rollout_metrics
        assert metrics["objective/scores"] == pytest.approx(float(record.scores.raw.mean()), abs=1e-5)
        assert metrics["objective/shaped_scores"] == pytest.approx(float(expected.mean()), abs=1e-5)


def test_the_moments_travel_in_the_checkpoint(llama: str) -> None:
    module = moved(RLOO, llama, shaping=Shaping("standardise"))
    module.rollout(groups(), 0)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other = moved(RLOO, llama, shaping=Shaping("standardise"))
    other.on_load_checkpoint(checkpoint)
    assert other.score_moments == module.score_moments
    assert other.score_moments.count == PROMPTS * SAMPLES


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_whose_scores_are_no_numbers_ends_the_run(llama: str, bad: float) -> None:
    """Functions are checked as they answer; a model's NaN would stay in the running moments for good."""
    module = moved(RLOO, llama, reward=Broken(bad))
    with pytest.raises(UserError, match=rf"reward: the response '.*' to '.*' has the score {bad}"):
        module.rollout(groups(), 0)
    assert module.score_moments.count == 0


class Broken(RewardSource):
    """A source whose third score is no number."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, sequences: Any, *rest: Any) -> torch.Tensor:
        return torch.tensor([1.0, 2.0, self.bad] + [0.5] * (len(sequences) - 3))


# --- the policy's loss -----------------------------------------------------------------------------------------------


def test_the_entropy_bonus_raises_the_entropy(llama: str) -> None:
    """Its gradient is the entropy's own, against a plain softmax over the model's logits."""
    bonus = 0.7
    module = moved(RLOO, llama, policy_loss=ClippedPolicyLoss(entropy_coefficient=bonus)).double()
    plain = moved(RLOO, llama).double()
    experience = module.rollout(groups(), 0)
    with_bonus, without = tiny.Step(module, experience), tiny.Step(plain, experience)
    mask = experience.sequences.mask
    plain.zero_grad()
    logits = plain.roles.models["policy"](experience.sequences.tokens).logits[:, :-1][mask[:, 1:]]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    entropy.backward()
    assert with_bonus.totals["policy/entropy"] == pytest.approx(float(entropy.detach()), abs=1e-6)
    assert with_bonus.totals["loss"] == pytest.approx(
        without.totals["loss"] - bonus * float(entropy.detach()), abs=1e-6
    )
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            expected = without.gradients[name] - bonus * parameter.grad
            torch.testing.assert_close(with_bonus.gradients[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("placement", ["k3", "full"])
def test_aggregation_weighs_the_loss_and_its_kl_alike(llama: str, aggregation: str, placement: str) -> None:
    settings: dict[str, Any] = {"policy_loss": ClippedPolicyLoss(aggregation=aggregation)}  # type: ignore[arg-type]
    module = moved(GRPO, llama, kl=FixedKL(0.5, placement, "loss"), **settings)  # type: ignore[arg-type]
    experience = module.rollout(groups(), 0)
    step = tiny.Step(module, experience)
    mask = experience.sequences.mask
    lengths = mask.sum(-1, keepdim=True).expand_as(mask)[mask]
    weight = {"token_mean": 1 / mask.sum(), "sequence_mean": 1 / lengths / len(mask), "constant": 1 / len(mask) / 10}
    share = weight[aggregation] * torch.ones(int(mask.sum()))
    loss = -(share * experience.advantages[mask]).sum()
    assert len(lengths.unique()) > 1
    ratio = (experience.old_logprobs - experience.reference_logprobs)[mask]
    kl = torch.expm1(-ratio) + ratio
    if placement == "full":
        policy, reference = (
            module.roles.models[role](experience.sequences.tokens).logits[:, :-1][mask[:, 1:]].log_softmax(-1)
            for role in ("policy", "reference")
        )
        kl = (policy.exp() * (policy - reference)).sum(-1).detach()
    assert step.totals["policy/loss"] == pytest.approx(float(loss), abs=1e-5)
    assert step.totals["policy/kl_loss"] == pytest.approx(float((share * kl).sum()), rel=1e-4)
    assert step.totals["loss"] == pytest.approx(float(loss + 0.5 * (share * kl).sum()), abs=1e-5)


def test_a_sampler_that_differs_is_corrected(llama: str) -> None:
    """Experience of a sampler whose log-probs are off by a known amount: weights e^0.5, truncated at 1.2."""
    module = moved(RLOO, llama, policy_loss=ClippedPolicyLoss(importance_cap=1.2))
    plain = moved(RLOO, llama)
    experience = module.rollout(groups(), 0)
    uncorrected = tiny.Step(plain, experience)
    for shift, weight in ((-0.5, 1.2), (0.3, math.exp(-0.3))):
        off = experience.old_logprobs + shift
        other = tiny.Step(module, tiny.replace(experience, sampled_logprobs=off))
        assert other.totals["policy/importance"] == pytest.approx(weight, abs=1e-5)
        assert other.totals["loss"] == pytest.approx(weight * uncorrected.totals["loss"], abs=1e-5)


# --- leaving a rollout early -----------------------------------------------------------------------------------------


def fit(module: OnPolicy, folder: Path, steps: int) -> list[tuple[int, float]]:
    """Train for some steps through the real data module, three passes of one minibatch over each rollout.

    Returns:
        Of each step the number of the rollout it was made on, and its mean log(π_old/π).
    """
    from lightning import Callback, Trainer

    from rlhf_lit.data.modules import RolloutDataModule
    from rlhf_lit.data.records import Source

    (folder / "prompts.txt").write_text("".join(f"w{3 + i} w{9 + i}\n" for i in range(8)))
    taken: list[tuple[int, float]] = []

    class Count(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            taken.append((made[-1], float(trainer.callback_metrics.get("policy/update_kl", 0))))

    made: list[int] = []
    module.on_rollout = lambda number, record: made.append(number)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Count()], default_root_dir=folder,
    )  # fmt: skip
    source = Source(str(folder / "prompts.txt"))
    trainer.fit(
        module,
        RolloutDataModule(train=source, rollout_size=4, batch_size=4, ppo_epochs=3, template="none", cache=None),
    )
    return taken


def small_ppo(llama: str, **settings: Any) -> PPO:
    defaults = {"reward": RewardFromFunction(tiny.word_count), "kl": FixedKL(0.1), "critic": Critic(init="policy")}
    sampling = Sampling(max_new_tokens=4)
    return PPO(Base(name=llama), **{**defaults, "sampling": sampling, "learning_rate": 1e-2, **settings})


def test_a_rollout_that_moved_the_policy_too_far_is_left(llama: str, tmp_path: Path) -> None:
    """The step that finds it so is the last on its rollout; the number of steps of the run stays."""
    assert [number for number, _ in fit(small_ppo(llama), tmp_path, 6)] == [0, 0, 0, 1, 1, 1]
    limit = 1e-3
    steps = fit(small_ppo(llama, max_update_kl=limit), tmp_path, 12)
    assert len(steps) == 12
    made = 0
    for (number, moved_by), (following, _) in pairwise(steps):
        made += 1
        ends = moved_by > limit or made == 3
        assert following == number + ends
        made = 0 if ends else made
    assert any(moved_by > limit for _, moved_by in steps)
    assert steps[-1][0] > 3, "more rollouts than three steps on each would make"


# --- the critic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "trunk"), [(None, False), (None, True), (LoRA(rank=4), False), (LoRA(rank=4), True)])
def test_warming_up_moves_the_critic_alone(llama: str, tmp_path: Path, lora: LoRA | None, trunk: bool) -> None:
    critic = Critic(init="policy", trunk=trunk, warmup=2)
    for steps, policy_moves in ((2, False), (3, True)):
        module = PPO(
            Base(name=llama, lora=lora), RewardFromFunction(tiny.word_count), FixedKL(0.1),
            sampling=Sampling(max_new_tokens=4), critic=critic, learning_rate=1e-2,
        )  # fmt: skip
        tiny.build(module)
        before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        fit(module, tmp_path, steps)
        changed = {name for name, p in module.named_parameters() if name in before and not p.equal(before[name])}
        critics = {name for name in before if "value" in name}
        assert critics & changed
        assert bool(changed - critics) == policy_moves
        if not policy_moves:
            # The policy's moments and step counts have not begun either.
            states = module.optimizers().optimizer.state  # type: ignore[union-attr]
            assert len(states) == len(module.roles.critic_parameters())


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
@pytest.mark.parametrize("kl", [FixedKL(0.1), FixedKL(0.1, "full", "loss")])
def test_a_critic_on_the_trunk_costs_no_pass_of_its_own(llama: str, lora: LoRA | None, kl: KLController) -> None:
    """Its values come from the score pass; the update's one pass has the gradient of both passes together."""
    critic = Critic(init="policy", trunk=True)
    module = tiny.make_ppo(
        Base(name=llama, lora=lora), critic=critic, kl=kl, policy_loss=ClippedPolicyLoss(entropy_coefficient=0.01)
    )
    tiny.disturb(module, 0.05)
    passes: list[bool] = []

    def count(body: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
        if not options["use_cache"]:  # as sampling does
            passes.append(torch.is_grad_enabled())

    hook = unwrapped(module.roles.policy).model.register_forward_hook(count, with_kwargs=True)
    batch = module.rollout(tiny.prompts(6), 0)
    assert passes == [False] * (1 if lora is None else 2), "the policy's, and the reference's on the same weights"
    with torch.no_grad(), module.roles.acting("value") as model:
        values = token_values(model, module.roles.heads["value"], batch.sequences)
    torch.testing.assert_close(batch.values, values, rtol=0, atol=1e-5)
    tiny.disturb(module, 0.02, seed=9)
    passes.clear()
    together = tiny.Step(module, batch, cut=False)
    hook.remove()
    full = kl.estimator == "full"
    assert passes.count(True) == 1 + full

    module.zero_grad()
    denominators = module.denominators(batch)
    with module.roles.acting("value") as model:
        values = token_values(model, module.roles.heads["value"], batch.sequences)
        module.value_term(values, batch, denominators).loss.backward()
    for share in OnPolicy.losses(module, batch, denominators):
        share.loss.backward()
    apart = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert together.gradients.keys() == apart.keys()
    for name, gradient in together.gradients.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-4, atol=1e-6)


def test_an_adaptive_beta_stands_still_while_the_critic_warms_up(llama: str, tmp_path: Path) -> None:
    """KL is 0 there, so it would only ever shrink."""
    for warmup, moves in ((3, False), (0, True)):
        module = small_ppo(llama, kl=AdaptiveKL(0.2, horizon=100.0), critic=Critic(init="policy", warmup=warmup))
        fit(module, tmp_path, 3)  # one rollout
        assert (module.kl_coefficient != 0.2) == moves


def test_the_critic_has_a_learning_rate_of_its_own(llama: str, tmp_path: Path) -> None:
    module = small_ppo(llama, critic=Critic(init="policy", learning_rate=3e-3), learning_rate=1e-3)
    fit(module, tmp_path, 3)
    groups = module.optimizers().param_groups  # type: ignore[union-attr]
    assert [group["initial_lr"] for group in groups] == [1e-3, 3e-3]
    theirs = {id(p) for p in groups[1]["params"]}
    assert theirs == {id(p) for p in [*module.roles.models["value"].parameters(), *module.roles.heads.parameters()]}
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(module.trainable_parameters())
    # Both as the last of three steps was made with, on the way from the peak to 0.
    logged = module.trainer.callback_metrics
    assert float(logged["train/learning_rate"]) == pytest.approx(1e-3 / 3)
    assert float(logged["train/critic_learning_rate"]) == pytest.approx(3e-3 / 3)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"sampling": Sampling(top_k=5)}, r"sampling\.top_k, sampling\.top_p: .* leave them null"),
        ({"sampling": Sampling(top_p=0.9)}, r"sampling\.top_k, sampling\.top_p"),
        ({"max_update_kl": 0.0}, r"max_update_kl must be greater than 0"),
        ({"advantages": LeaveOneOut()}, r"model\.advantages: LeaveOneOut reads no critic; use RLOO, not PPO"),
    ],
)
def test_bad_settings_get_one_line(llama: str, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        small_ppo(llama, **settings)


def test_without_a_critic_its_values_cannot_be_read(llama: str) -> None:
    with pytest.raises(UserError, match=r"model\.advantages: GAE reads a critic; use PPO, not RLOO"):
        RLOO(Base(name=llama), RewardFromFunction(tiny.word_count), FixedKL(0.1), advantages=GAE())


@pytest.mark.parametrize(("setting", "value"), [("learning_rate", 0.0), ("warmup", -1)])
def test_bad_critics_get_one_line(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"critic\.{setting}"):
        Critic(**{setting: value})


@pytest.mark.parametrize("kind", [RLOO, GRPO])
def test_one_response_to_a_prompt_has_nothing_to_be_compared_with(kind: Any, llama: str, tmp_path: Path) -> None:
    module = kind(Base(name=llama), RewardFromFunction(tiny.word_count), FixedKL(0.1))
    with pytest.raises(UserError, match=rf"data\.samples_per_prompt: {kind.__name__} .* 2 or more"):
        fit(module, tmp_path, 1)


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_a_prompt_with_several_responses_is_computed_once(
    llama: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the score pass and in the update; with the numbers that the rows have by themselves."""
    critic = {"critic": Critic(init="policy")} if kind is PPO else {}
    module = tiny.make_on_policy(kind, Base(name=llama), **critic)
    tiny.disturb(module, 0.03)
    prompts = tiny.repeated(tiny.prompts(3), 4)
    shapes: list[tuple[int, ...]] = []

    def count(body: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
        if not options["use_cache"]:  # as sampling does
            shapes.append(tuple(options["input_ids"].shape))

    unwrapped(module.roles.policy).model.register_forward_hook(count, with_kwargs=True)
    batch = module.rollout(prompts, 0)
    alike = tiny.Step(module, batch)
    asked = tiny.prompts(3).prompts.lengths.sum() + batch.sequences.mask.sum()
    assert shapes == [(1, int(asked))] * 2
    monkeypatch.setattr("rlhf_lit.models.packing.packs", lambda model: False)
    again = module.rollout(prompts, 0)
    assert torch.equal(again.sequences.tokens, batch.sequences.tokens)
    for name, column in again.columns().items():
        torch.testing.assert_close(batch.columns()[name], column, rtol=0, atol=1e-5)
    alike.assert_equals(tiny.Step(module, batch), 1e-5)
    assert shapes[-1] == tuple(batch.sequences.tokens.shape), "padded rows"
