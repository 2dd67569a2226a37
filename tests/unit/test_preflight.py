"""The checks before the first step: each passes on a sound run, and sees the fault that it is there for."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from rlhf_lit import playground
from rlhf_lit.algorithms import DPO, GRPO, PPO, RLOO, SFT, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.batches import PromptBatch, Sequences
from rlhf_lit.data.modules import PreferenceDataModule, RolloutDataModule, SFTDataModule, TextDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.data.store import JoinedRows
from rlhf_lit.errors import UserError
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.losses.preference import DPOLoss, IPOLoss, PairLogProbs, PreferenceLoss
from rlhf_lit.models.base import PLAYGROUND, Base, LoRA
from rlhf_lit.models.loading import load_tokenizer
from rlhf_lit.models.roles import Critic
from rlhf_lit.playground import World
from rlhf_lit.preflight.callback import Preflight, merged
from rlhf_lit.preflight.check import NAMES, Check, LeftOut, show
from rlhf_lit.preflight.checks import checks
from rlhf_lit.preflight.rows import ANSWER_TOKENS, Looked, around_answers, within
from rlhf_lit.preflight.tokens import Marks, one_bos
from rlhf_lit.rollout.engine import Samples, Sampling
from rlhf_lit.rollout.rewards import RewardFromFunction, RewardFromModel

WORLD = World(demonstrations=40, prompts=40)
IN_WORLD = Source("playground", world=WORLD)
SETTINGS: dict[str, Any] = {"batch_size": 8, "cache": None, "max_length": 96}
ADAPTER = LoRA(rank=4)
LONG = 480  # tokens of a row, where rows are to be long


@dataclass(frozen=True)
class Place:
    """Folders of models, and a file of pairs."""

    model: str
    reward: str
    pairs: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The built-in world's model and a reward model, both of random weights, and pairs made of its demonstrations."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(PLAYGROUND)
    config.max_position_embeddings = 2 * LONG
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for name in ("model", "reward"):
        AutoTokenizer.from_pretrained(PLAYGROUND).save_pretrained(folder / name)
    prompts = [row["prompt"] for row in playground.prompts(WORLD, "train")]
    pairs = [{"prompt": prompt, "chosen": f"{prompt} it is.", "rejected": "no."} for prompt in prompts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return Place(str(folder / "model"), str(folder / "reward"), str(folder / "pairs.jsonl"))


def words(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A sound reward: of each response alone, and not always the same."""
    return [len(response) / 10 for response in responses]


def sft(place: Place, lora: LoRA | None = None) -> tuple[Algorithm, TextDataModule]:
    return SFT(Base(place.model, lora=lora)), SFTDataModule(IN_WORLD, **SETTINGS)


def reward_model(place: Place, lora: LoRA | None = None) -> tuple[Algorithm, TextDataModule]:
    return RewardModel(Base(place.model, lora=lora)), PreferenceDataModule(Source(place.pairs), **SETTINGS)


def dpo(
    place: Place, lora: LoRA | None = None, loss: PreferenceLoss = DPOLoss(0.1), **base: Any
) -> tuple[Algorithm, TextDataModule]:
    return DPO(Base(place.model, lora=lora, **base), loss), PreferenceDataModule(Source(place.pairs), **SETTINGS)


def ppo(place: Place, lora: LoRA | None = None, reward: Any = words) -> tuple[Algorithm, TextDataModule]:
    source = RewardFromModel(place.reward) if reward == "model" else RewardFromFunction(reward)
    module = PPO(
        Base(place.model, lora=lora),
        source,
        FixedKL(0.1),
        Sampling(max_new_tokens=12),
        critic=Critic(init="policy"),
    )
    return module, RolloutDataModule(train=IN_WORLD, rollout_size=8, **SETTINGS)


def ppo_from_reward(place: Place, lora: LoRA | None = None) -> tuple[Algorithm, TextDataModule]:
    return ppo(place, lora, "model")


def rloo(place: Place, lora: LoRA | None = None) -> tuple[Algorithm, TextDataModule]:
    module = RLOO(Base(place.model, lora=lora), RewardFromFunction(words), FixedKL(0.1), Sampling(max_new_tokens=12))
    return module, RolloutDataModule(train=IN_WORLD, rollout_size=8, samples_per_prompt=2, **SETTINGS)


def grpo(place: Place, lora: LoRA | None = None) -> tuple[Algorithm, TextDataModule]:
    kl = FixedKL(0.1, estimator="k3", placement="loss")
    module = GRPO(Base(place.model, lora=lora), RewardFromFunction(words), kl, Sampling(max_new_tokens=12))
    return module, RolloutDataModule(train=IN_WORLD, rollout_size=8, samples_per_prompt=2, **SETTINGS)


Run = Callable[..., tuple[Algorithm, TextDataModule]]
RUNS: list[Run] = [sft, reward_model, dpo, ppo, ppo_from_reward, rloo, grpo]
WRITERS: list[Run] = [sft, dpo, ppo]


def ready(module: Algorithm, data: TextDataModule) -> tuple[Algorithm, TextDataModule]:
    """Models built, rows read, as the trainer would have them before the first step."""
    torch.manual_seed(0)
    module.configure_model()
    module.set_train_mode()
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
    data.setup("fit")
    return module, data


@torch.no_grad()
def found(module: Algorithm, data: TextDataModule) -> dict[str, Check]:
    """What the checks of a run that is ready find, by name."""
    every = list(checks(module, data))
    assert len({check.name for check in every}) == len(every)
    return {check.name: check for check in every}


def caught(every: dict[str, Check], verdict: str = "failed") -> set[str]:
    return {name for name, check in every.items() if check.verdict == verdict}


# --- sound runs ------------------------------------------------------------------------------------------------------

TOKENS = ["trainable parameters", "text kept", "one BOS", "supervised tokens", "EOS supervised", "padding"]
ROLLOUT = [
    "trainable parameters",
    "text kept",
    "one BOS",
    "sampler",
    "padding",
    "KL = 0",
    "reference",
    "ratio = 1",
    "reward scores",
    "reward alone",
]
EXPECTED = {
    sft: [*TOKENS, "sampler", "starting loss"],
    reward_model: [*TOKENS, "starting loss"],
    dpo: [*TOKENS, "sampler", "KL = 0", "reference", "loss at step 0"],
}


@pytest.mark.parametrize("lora", [None, ADAPTER, LoRA(rank=4, dora=True)], ids=["full", "lora", "dora"])
@pytest.mark.parametrize("run", RUNS)
def test_a_sound_run_passes(run: Run, lora: LoRA | None, place: Place) -> None:
    every = found(*ready(*run(place, lora)))
    assert list(every) == EXPECTED.get(run, ROLLOUT)
    assert {check.verdict for check in every.values()} == {"ok"}, every
    assert every["padding"].found.endswith(" apart, 0.0001 allowed")


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("run", WRITERS)
def test_a_sound_run_in_bfloat16_passes(run: Run, lora: LoRA | None, place: Place) -> None:
    module, data = run(place, lora)
    module.base = Base(place.model, dtype="bfloat16", lora=lora)
    every = found(*ready(module, data))
    assert caught(every) == set(), every
    assert "0.05 allowed" in every["padding"].found


def test_a_continued_adapter_is_its_own_reference(place: Place, tmp_path: Path) -> None:
    module, _ = ready(*sft(place, ADAPTER))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.02)
    assert isinstance(module, SFT)
    module.roles.policy.save_pretrained(tmp_path / "adapter")
    load_tokenizer(Base(place.model)).save_pretrained(tmp_path / "adapter")
    base = Base(str(tmp_path / "adapter"))
    every = found(*ready(DPO(base, DPOLoss(0.1)), PreferenceDataModule(Source(place.pairs), **SETTINGS)))
    assert caught(every, "ok") == set(every), every
    assert every["reference"].found.startswith("a frozen adapter")


def test_it_leaves_everything_as_it_was(place: Place) -> None:
    """Weights, modes, sampling, the loader's place and every random generator."""

    def rolls(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        torch.rand(3)
        return [random.random() for _ in responses]

    module, data = ready(*ppo(place, ADAPTER, rolls))
    trainer: Any = SimpleNamespace(
        datamodule=data,
        global_rank=0,
        world_size=1,
        is_global_zero=False,
        precision_plugin=Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).precision_plugin,
    )
    weights = {name: p.detach().clone() for name, p in module.state_dict().items()}
    modes = {name: part.training for name, part in module.named_modules()}
    sampling = module.sampling  # type: ignore[union-attr]
    torch.manual_seed(5)
    random.seed(5)
    Preflight().on_train_start(trainer, module)
    drawn = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    assert drawn[0].equal(torch.rand(3))
    assert drawn[1] == random.random()
    assert all(weights[name].equal(p) for name, p in module.state_dict().items())
    assert modes == {name: part.training for name, part in module.named_modules()}
    assert module.sampling is sampling  # type: ignore[union-attr]
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("run", RUNS)
def test_each_check_can_be_left_out(run: Run, place: Place) -> None:
    """And is then not made: nothing of it is computed."""
    module, data = ready(*run(place))
    names = EXPECTED.get(run, ROLLOUT)

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError

    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_pre_hook(forbidden)
    every = list(checks(module, data, left_out=LeftOut(tuple(names))))
    assert [check.name for check in every] == names
    assert {check.verdict for check in every} == {"left out"}


def test_all_names_are_known_and_in_the_docs() -> None:
    """What can be left out is what can be made."""
    assert set(NAMES) == {name for run in RUNS for name in EXPECTED.get(run, ROLLOUT)}
    page = (Path(__file__).parents[2] / "docs" / "preflight.md").read_text()
    rows = [line.split("|")[1].split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert list(dict.fromkeys(rows)) == list(NAMES)


# --- costs -----------------------------------------------------------------------------------------------------------


def count_tokens(module: nn.Module, counted: list[int]) -> None:
    """Note the tokens of each pass through an embedding of the module."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_pre_hook(lambda _, inputs: counted.append(inputs[0].numel()))


def long_rows(tokenizer: Any, folder: Path) -> Source:
    """Rows whose prompt and answers take about half of ``LONG`` tokens each."""
    word = "the"
    half = " ".join([word] * (LONG // 2 // len(tokenizer(f" {word}", add_special_tokens=False).input_ids)))
    row = {"prompt": half, "completion": half, "chosen": half, "rejected": f"{half} {word}"}
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(16)))
    return Source(str(folder / "long.jsonl"))


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("run", [sft, reward_model, dpo, ppo_from_reward])
def test_long_rows_cost_less_than_an_optimizer_step(run: Run, lora: LoRA | None, place: Place, tmp_path: Path) -> None:
    """Tokens through the models, forwards; a backward pass counts as two forward ones."""
    module, data = run(place, lora)
    data.sources["train"] = [long_rows(module.tokenizer, tmp_path)]
    data.max_length, data.batch_size = 2 * LONG, 4
    if isinstance(data, RolloutDataModule):
        data.rollout_size = 4
    module, data = ready(module, data)
    counted: list[int] = []
    count_tokens(module, counted)
    every = found(module, data)
    assert {check.verdict for check in every.values()} == {"ok"}, every
    spent, passes = sum(counted), len(counted)
    counted.clear()
    places = list(range(4))
    batch = data.first_seen([data.examples["train"][place] for place in places], places)
    if isinstance(batch, PromptBatch):  # a rollout, and what an update makes of it
        assert isinstance(module, PPO)
        module.rollout(batch, 0)
        step = sum(counted) + 3 * 2 * int(batch.prompts.lengths.sum())
    else:
        module.prepare(batch)
        learned = sum(int(side.lengths.sum()) for side in batch.answers())
        assert learned > 4 * 0.8 * LONG
        for _ in module.step_losses(batch, module.denominators(batch)):
            pass
        step = sum(counted) + 2 * learned
    assert spent < step, (spent, passes, step)


def test_rows_are_the_first_short_ones_or_else_the_shortest() -> None:
    assert within([900, 10, 20, 30, 40, 50], 4, 200) == [1, 2, 3, 4]
    assert within([900, 70, 10, 60, 90], 4, 200) == [1, 2, 3], "fair shares are too small: the shortest that fit"
    assert within([900, 800], 4, 200) == [1], "one at least"
    assert within([900, 800], 4, 200, least=2) == [0, 1]
    assert within([0, 30, 0], 4, 200) == [1], "rows that have nothing to learn"
    assert within([0, 0], 4, 200) == []


def test_long_rows_are_cut_around_the_start_of_their_answers() -> None:
    tokens = [list(range(100, 110)), list(range(200, 203)), list(range(300, 312)), list(range(400, 410))]
    masks = [[i >= start for i in range(len(row))] for row, start in zip(tokens, (5, 1, 11, 1), strict=True)]
    cut = around_answers(Sequences.pad(tokens, masks), 4)
    assert [row[:n].tolist() for row, n in zip(cut.tokens, cut.lengths, strict=True)] == [
        [103, 104, 105, 106],
        [200, 201, 202],
        [308, 309, 310, 311],
        [400, 401, 402, 403],
    ]
    assert [row[:n].tolist() for row, n in zip(cut.mask, cut.lengths, strict=True)] == [
        [False, False, True, True],
        [False, True, True],
        [False, False, False, True],
        [False, True, True, True],
    ]


@pytest.mark.parametrize("run", [sft, reward_model])
def test_dropout_is_back_on_afterwards(run: Run, place: Place) -> None:
    """Off for the checks, which would differ by it, and on again for the training."""
    module, data = ready(*run(place, LoRA(rank=4, dropout=0.5)))
    modes = {name: part.training for name, part in module.named_modules()}
    assert any(modes.values())
    assert caught(found(module, data)) == set()
    assert modes == {name: part.training for name, part in module.named_modules()}


def test_answers_are_short(place: Place) -> None:
    """A handful of answers of thousands of tokens would take minutes."""
    module, data = ready(*ppo(place))
    assert isinstance(module, PPO)
    module.sampling = Sampling(max_new_tokens=5000)
    lengths, own = [], module.respond

    def respond(prompts: PromptBatch, at_most: int) -> Samples:
        samples = own(prompts, at_most=at_most)
        lengths.append(int(samples.sequences.mask.sum(-1).max()))
        return samples

    module.respond = respond  # type: ignore[method-assign, assignment]
    assert caught(found(module, data)) == set()
    assert lengths == [ANSWER_TOKENS]


# --- tokens ----------------------------------------------------------------------------------------------------------

BOS_EACH_TURN = (
    "{% for message in messages %}{{ bos_token + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)


class TwiceBOS(SFTDataModule):
    """What gluing a tokenizer's BOS to a template's does."""

    def row(self, record: Any, encoded: Any) -> dict[str, Any] | str:
        row = super().row(record, encoded)
        assert isinstance(row, dict)
        bos = self.chat.tokenizer.bos_token_id
        return {**row, "tokens": [bos, *row["tokens"]], "mask": [False, *row["mask"]]}


class Unclosed(SFTDataModule):
    """The mask that asking for pad ids makes where the pad token is EOS."""

    def row(self, record: Any, encoded: Any) -> dict[str, Any] | str:
        row = super().row(record, encoded)
        assert isinstance(row, dict)
        kept = [mask and token != self.chat.tokenizer.eos_token_id for token, mask in zip(row["tokens"], row["mask"])]  # noqa: B905
        return {**row, "mask": kept}


class Unsupervised(SFTDataModule):
    """A template whose answers were not found, in one row."""

    def row(self, record: Any, encoded: Any) -> dict[str, Any] | str:
        row = super().row(record, encoded)
        assert isinstance(row, dict)
        return {**row, "mask": [False] * len(row["mask"])} if record.row == 7 else row


@pytest.mark.parametrize(
    ("kind", "name", "line"),
    [
        (TwiceBOS, "one BOS", "a second one in 40 of 40 rows, first in row"),
        (Unclosed, "EOS supervised", "none in row 0, nor in 39 more"),
        (Unsupervised, "supervised tokens", "none in row 7"),
    ],
)
def test_faults_in_tokens(kind: type[SFTDataModule], name: str, line: str, place: Place) -> None:
    every = found(*ready(SFT(Base(place.model)), kind(IN_WORLD, **SETTINGS)))
    assert caught(every) == {name}
    assert line in every[name].found
    assert "padding" not in every, "the models have nothing to say about such rows"


def test_a_template_with_a_bos_in_each_turn(place: Place) -> None:
    """In demonstrations and in the prompts of a rollout a marker of turns is no surplus; two side by side are."""
    for run in (sft, ppo):
        module, data = run(place)
        module.tokenizer.chat_template = BOS_EACH_TURN
        assert caught(found(*ready(module, data))) == set()
        module, data = run(place)
        module.tokenizer.chat_template = BOS_EACH_TURN.replace("bos_token", "bos_token + bos_token")
        every = found(*ready(module, data))
        assert caught(every) == {"one BOS"}
        assert "40 of 40 rows" in every["one BOS"].found


def rows_of(*rows: list[int], supervised: int = 1) -> Sequences:
    return Sequences.pad(rows, [[False] * (len(row) - supervised) + [True] * supervised for row in rows])


def test_where_a_bos_may_stand() -> None:
    bos, eos, blank = 1, 2, 9

    def verdict(
        *rows: list[int], stops: tuple[int, ...] = (eos,), bos: int | None = bos, opens_turns: bool = False
    ) -> str:
        marks = Marks(bos, stops, lambda token: token == blank, opens_turns)
        return one_bos([rows_of(*rows)], list(range(len(rows))), marks).verdict

    assert verdict([bos, 5, 6, eos]) == "ok"
    assert verdict([5, 6, eos]) == "ok"
    assert verdict([bos, 5, eos, bos, 6, eos]) == "ok", "a template that opens each exchange with one"
    assert verdict([bos, 5, eos, blank, bos, 6, eos, blank, blank, bos, 7, eos]) == "ok", "ChatML, whose turns end so"
    assert verdict([blank, bos, 5, eos]) == "ok"
    assert verdict([bos, bos, 5, eos]) == "failed"
    assert verdict([bos, bos, 5, eos, blank, bos, 6, eos]) == "failed"
    assert verdict([bos, blank, bos, 5, eos]) == "failed"
    assert verdict([bos, 5, eos, bos, bos, 6, eos]) == "failed"
    assert verdict([bos, 5, bos, 6, eos]) == "failed"
    assert verdict([bos, 5, blank, bos, 6, eos]) == "failed", "a turn that begins with a rendered conversation"
    assert verdict([bos, 5, bos, 6, eos], [bos, 5, eos], [bos, 6, eos]) == "warning", "the text of one row"
    assert verdict([3, 3, 5, eos], bos=None) == "ok"
    # A template that opens turns with it and closes none.
    assert verdict([bos, 5, bos, 6, eos], opens_turns=True) == "ok"
    assert verdict([bos, bos, 5, bos, 6, eos], opens_turns=True) == "failed"
    # One token for both: what closes a turn must not be taken for a second BOS.
    assert verdict([2, 5, 2, 6, 2], bos=2) == "ok"
    assert verdict([2, 5, 2, 2, 6, 2], bos=2) == "ok"
    assert verdict([2, 2], bos=2) == "ok", "an empty answer to an empty prompt"
    assert verdict([2, 2, 5, 2], bos=2) == "failed"


# --- parameters ------------------------------------------------------------------------------------------------------


def freeze_policy(module: Any) -> str:
    module.roles.policy.model.layers[0].requires_grad_(False)
    return "roles.models.policy.model.layers.0.self_attn.q_proj.weight is frozen and 8 more"


def train_reference(module: Any) -> str:
    module.roles.models["reference"].requires_grad_(True)
    return "roles.models.reference.model.embed_tokens.weight trains and"


def train_reward(module: Any) -> str:
    module.reward.model.requires_grad_(True)
    return "reward.model.model.embed_tokens.weight trains and"


def train_base(module: Any) -> str:
    (parameter,) = (p for name, p in module.named_parameters() if name.endswith("embed_tokens.weight"))
    parameter.requires_grad_(True)
    return "embed_tokens.weight trains"


def switch_adapter(module: Any) -> str:
    module.roles.policy.set_adapter("value")  # peft's own, which freezes the others
    return "lora_A.default.weight is frozen and"


@pytest.mark.parametrize(
    ("run", "lora", "fault"),
    [
        (sft, None, freeze_policy),
        (dpo, None, train_reference),
        (ppo_from_reward, None, train_reward),
        (reward_model, ADAPTER, train_base),
        (sft, ADAPTER, train_base),
        (ppo, ADAPTER, switch_adapter),
    ],
)
def test_faults_in_trainable_parameters(run: Run, lora: LoRA | None, fault: Callable[[Any], str], place: Place) -> None:
    module, data = ready(*run(place, lora))
    line = fault(module)
    every = found(module, data)
    assert caught(every) == {"trainable parameters"}
    assert line in every["trainable parameters"].found


def test_the_number_of_trainable_parameters(place: Place) -> None:
    module, data = ready(*sft(place, ADAPTER))
    number = sum(p.numel() for name, p in module.named_parameters() if "lora_" in name)
    assert found(module, data)["trainable parameters"].found == f"{number:,} in adapters and heads"


# --- models ----------------------------------------------------------------------------------------------------------


def sees_width(model: nn.Module) -> None:
    """Embeddings that depend on how wide the batch is, as a model that attends to its padding does."""

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output * (1 + 0.02 * inputs[0].shape[1])

    model.get_input_embeddings().register_forward_hook(hook)  # type: ignore[operator]


@pytest.mark.parametrize(("attention", "budget"), [("sdpa", 8192), ("eager", 8192), ("eager", 1)])
@pytest.mark.parametrize("run", [sft, reward_model, dpo, ppo])
def test_a_model_that_sees_its_padding(run: Run, attention: str, budget: int, place: Place) -> None:
    """Or the sequences that stand in one row with it. Where rows are padded, also where no two fit into a micro-batch,
    so that a batch has no padding of its own."""
    module, data = ready(*run(place))
    data.micro_batch_tokens = budget
    model: Any = module.scorer if isinstance(module, RewardModel) else module.roles.policy  # type: ignore[union-attr]
    model.config._attn_implementation = attention
    sees_width(model)
    every = found(module, data)
    assert "padding" in caught(every)
    assert "allowed" in every["padding"].found


def test_padding_in_rows_that_fill_the_context(place: Place) -> None:
    """There is no room for more columns: the batch's own padding is what is left to look at."""
    module, data = ready(*sft(place))
    longest = max(len(row["tokens"]) for row in data.examples["train"][:4])
    module.roles.policy.config.max_position_embeddings = longest  # type: ignore[union-attr]
    assert caught(found(module, data)) == set()


def test_padding_is_the_same_in_micro_batches_of_one_row(place: Place) -> None:
    for run in (sft, dpo, ppo):
        module, data = ready(*run(place))
        data.micro_batch_tokens = 1
        assert caught(found(module, data)) == set()


@pytest.mark.parametrize("run", [dpo, ppo])
@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["full", "lora"])
def test_a_reference_that_is_another_model(run: Run, lora: LoRA | None, place: Place) -> None:
    module, data = ready(*run(place, lora))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ("lora_B" in name) if lora else name.startswith("roles.models.reference"):
                parameter.add_(2e-3)
    every = found(module, data)
    assert caught(every) == {"KL = 0"} | ({"loss at step 0"} if run is dpo else set())


@pytest.mark.parametrize("run", [dpo, ppo])
@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["full", "lora"])
def test_a_reference_that_is_the_policy_itself(run: Run, lora: LoRA | None, place: Place) -> None:
    """At step 0 all of its numbers are right."""
    module, data = ready(*run(place, lora))
    roles: Any = module.roles  # type: ignore[union-attr]
    if lora:
        roles._adapters["reference"] = "default"
    else:
        roles.models["reference"] = roles.policy
    every = found(module, data)
    assert caught(every) == {"reference"}
    assert every["KL = 0"].verdict == "ok"


def test_a_loss_that_ends_in_nothing(place: Place) -> None:
    module, data = ready(*sft(place))
    with torch.no_grad():
        module.roles.policy.model.norm.weight.fill_(math.nan)  # type: ignore[union-attr]
    every = found(module, data)
    assert caught(every) == {"padding", "starting loss"}
    assert every["starting loss"].found.startswith("nan nats per token")


def test_weights_of_another_tokenizer_are_worth_a_warning(place: Place) -> None:
    module, data = ready(*sft(place))
    with torch.no_grad():
        module.roles.policy.model.norm.weight.mul_(30)  # type: ignore[union-attr]
    every = found(module, data)
    assert (caught(every), caught(every, "warning")) == (set(), {"starting loss"})


# --- preference losses -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backwards(DPOLoss):
    """log σ(βh): the sign forgotten."""

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        return -super().__call__(pairs)


@dataclass(frozen=True)
class Own(PreferenceLoss):
    """A user's own, which does not say where it starts."""

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        return torch.relu(1 - self.beta * (pairs.chosen_logratio - pairs.rejected_logratio))


@pytest.mark.parametrize(
    ("loss", "known"),
    [
        (DPOLoss(0.1), math.log(2)),
        (DPOLoss(3.0, 0.2), math.log(2)),
        (IPOLoss(0.1), 25.0),
        (IPOLoss(0.01, average_log_prob=True), 2500.0),
    ],
)
def test_losses_of_known_value(loss: PreferenceLoss, known: float, place: Place) -> None:
    assert loss.value_at_start() == pytest.approx(known, rel=1e-12)
    check = found(*ready(*dpo(place, loss=loss)))["loss at step 0"]
    assert check.verdict == "ok"
    assert check.found == f"{known:.6g}, {type(loss).__name__} starts at {known:.6g}"


def test_a_loss_of_the_wrong_sign(place: Place) -> None:
    every = found(*ready(*dpo(place, loss=Backwards(0.1))))
    assert caught(every) == {"loss at step 0"}
    assert every["loss at step 0"].found == "-0.693147, Backwards starts at 0.693147"


def test_a_loss_of_unknown_value_is_left_out_and_said_so(place: Place) -> None:
    assert Own(0.1).value_at_start() is None
    every = found(*ready(*dpo(place, loss=Own(0.1))))
    assert (caught(every), caught(every, "skipped")) == (set(), {"loss at step 0"})
    assert every["loss at step 0"].found == "1; Own states no value_at_start"


def test_a_run_that_goes_on_has_left_its_reference(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, late in ((dpo, {"KL = 0", "loss at step 0"}), (ppo, {"KL = 0"})):
        module, data = ready(*run(place))
        with torch.no_grad():
            for parameter in module.roles.policy.parameters():  # type: ignore[union-attr]
                parameter.add_(2e-3)
        with monkeypatch.context() as patch:
            patch.setattr(type(module), "global_step", 12)
            every = found(module, data)
        assert (caught(every), caught(every, "skipped")) == (set(), late)
        assert every["KL = 0"].found.endswith("goes on from step 12")
        assert every["reference"].verdict == "ok"


# --- rollouts and rewards --------------------------------------------------------------------------------------------


def test_an_update_that_computes_other_log_probs(place: Place) -> None:
    module, data = ready(*ppo(place))

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output * 1.1 if torch.is_grad_enabled() else output

    module.roles.policy.get_input_embeddings().register_forward_hook(hook)  # type: ignore[union-attr]
    assert caught(found(module, data)) == {"ratio = 1"}


def constant(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [0.5] * len(responses)


def centred(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    mean = sum(map(len, responses)) / len(responses)
    return [len(response) - mean for response in responses]


def ranked(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [sorted(map(len, responses)).index(len(response)) / (len(responses) - 1) for response in responses]


def noisy(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [random.random() for _ in responses]


@pytest.mark.parametrize(
    ("reward", "name", "verdict", "line"),
    [
        (constant, "reward scores", "warning", "all 8 are 0.5"),
        (centred, "reward alone", "failed", "alone and in a batch "),
        (ranked, "reward alone", "failed", "a response alone cannot be scored: "),
        (noisy, "reward alone", "warning", "the same responses scored twice lie "),
    ],
)
def test_faults_in_rewards(reward: Any, name: str, verdict: str, line: str, place: Place) -> None:
    every = found(*ready(*ppo(place, None, reward)))
    assert every[name].verdict == verdict
    assert every[name].found.startswith(line)
    assert caught(every, "ok") == set(every) - {name}


def test_faults_in_a_reward_model(place: Place) -> None:
    module, data = ready(*ppo_from_reward(place))
    sees_width(module.reward.model)  # type: ignore[union-attr,arg-type]
    assert caught(found(module, data)) == {"reward alone"}
    with torch.no_grad():
        module.reward.model.score.weight.fill_(math.nan)  # type: ignore[union-attr]
    every = found(module, data)
    assert caught(every) == {"reward scores"}
    assert every["reward alone"].verdict == "skipped"


# --- the callback ----------------------------------------------------------------------------------------------------


class Loaded(Exception):
    """The training loader was asked for its first batch."""


def fit(module: Algorithm, data: TextDataModule | None, folder: Path, loader: Any = None, **settings: Any) -> None:
    trainer = Trainer(
        **settings,
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        callbacks=[Preflight()],
    )
    trainer.fit(module, train_dataloaders=loader, datamodule=data)


def test_the_table_of_a_sound_run(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(*dpo(place, ADAPTER), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    for line, name in zip(lines, EXPECTED[dpo], strict=False):
        assert line.startswith(f"ok  {name}  "), line
        assert line == line.rstrip()
    assert lines[-1].startswith("preflight: 10 checks passed in ")


def test_a_failed_check_stops_the_run_before_its_first_batch(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = dpo(place, loss=Backwards(0.1))

    def refuse(*arguments: Any) -> Iterator[Any]:
        raise Loaded
        yield

    monkeypatch.setattr("rlhf_lit.data.loader.BatchLoader.__iter__", refuse)
    with pytest.raises(UserError) as stop:
        fit(module, data, tmp_path)
    line = str(stop.value)
    assert line.startswith("preflight: loss at step 0: -0.693147, Backwards starts at 0.693147; policy and reference ")
    assert line.endswith("; to go on without it, preflight: {skip: [loss at step 0]}")
    assert "\n" not in line
    assert not list(tmp_path.rglob("*.ckpt"))
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("failed  loss at step 0")
    assert ", 1 failed in " in said[-1]


def test_a_prompt_beyond_the_context_has_its_own_line(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, data = ppo(place)
    module.configure_model()
    module.roles.policy.config.max_position_embeddings = 20  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"^model\.sampling\.max_new_tokens: after the prompt"):
        fit(module, data, tmp_path)
    assert "checks passed" not in capsys.readouterr().out


@pytest.mark.parametrize("run", [sft, reward_model, dpo, ppo_from_reward])
def test_under_autocast_the_tolerance_is_that_of_bfloat16(
    run: Run, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(*run(place), tmp_path, precision="bf16-mixed")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok  ", "preflight: ")) for line in lines), lines
    assert sum(line.startswith("ok  padding ") and line.endswith(" apart, 0.05 allowed") for line in lines) == 1


def test_a_policy_that_nothing_moves_is_no_verdict(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = ready(*dpo(place))
    monkeypatch.setattr("rlhf_lit.preflight.models._lever", lambda roles: nn.Parameter(torch.zeros(3)))
    every = found(module, data)
    assert (caught(every), caught(every, "skipped")) == (set(), {"reference"})


def test_without_a_data_module_only_the_parameters_are_checked(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, data = ready(*sft(place))
    module = SFT(Base(place.model))
    fit(module, None, tmp_path, data.train_dataloader())
    assert "preflight: 1 check passed in" in capsys.readouterr().out


def test_the_worst_verdict_of_the_ranks_counts() -> None:
    ranks = [
        [Check("a", "ok", "0"), Check("b", "failed", "0")],
        [Check("a", "warning", "1"), Check("b", "ok", "1"), Check("c", "skipped", "1")],
        [Check("a", "ok", "2"), Check("b", "failed", "2"), Check("c", "ok", "2")],
    ]
    worst = merged(ranks)
    assert [(check.name, check.verdict, check.found) for check in worst] == [
        ("a", "warning", "1"),
        ("b", "failed", "0"),
        ("c", "skipped", "1"),
    ]


def test_ranks_look_at_rows_of_their_own(place: Place) -> None:
    """Row 7 alone has nothing to learn; each of two ranks sees every second row, until they come round."""
    module, data = ready(SFT(Base(place.model)), Unsupervised(IN_WORLD, **SETTINGS))
    place_of_7 = [row["row"] for row in data.examples["train"]].index(7)
    data.examples["train"] = JoinedRows([data.examples["train"]] * 4)  # 160 rows, 64 of which a rank looks at
    seven = [i for i in range(160) if i % 40 == place_of_7]
    for rank in (0, 1):
        looked_at = range(rank, 128, 2)
        with torch.no_grad():
            names = {check.name for check in checks(module, data, rank, 2) if check.verdict == "failed"}
        assert names == ({"supervised tokens"} if set(seven) & set(looked_at) else set())


def test_a_line_holds_what_a_row_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are markup to rich, and long lines are cut by it."""
    show(
        [Check("one", "failed", "[bold]raises[/bold] " + 200 * "x"), Check("other", "warning", "b", "do")],
        Looked(8, 2, 1234),
        0.25,
    )
    assert capsys.readouterr().out.splitlines() == [
        "failed   one    [bold]raises[/bold] " + 200 * "x",
        "warning  other  b; do",
        "preflight: 0 checks passed, 1 warning, 1 failed in 0.2 s (8 rows read; 2 rows through the models, "
        "1,234 tokens a pass)",
    ]
