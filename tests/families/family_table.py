"""docs/models.md: what works of which family, found out on small models.

python tests/families/family_table.py            # writes docs/models.md anew
python tests/families/family_table.py llama opt  # prints the rows of some families
"""

from __future__ import annotations

import gc
import math
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
from small_families import FAMILIES, build
from torch import Tensor, nn

from rlhf_lit.algorithms import DPO, SFT, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.errors import UserError
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.packing import layout_of
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.engine import Sampling, sample
from rlhf_lit.rollout.rewards import score_sequences

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# In nats of a token: what float32 leaves between two orders of summation.
ROUNDING = 5e-6
STEPS, RATE = 2, 1e-3
NF4 = Quantization(compute_dtype="float32")
YES = "yes"


class Fault(Exception):
    """A number that is not what it has to be, in words."""


@dataclass
class Trial:
    """One family while it is tried.

    Attributes:
        kind: transformers' name of it.
        folder: of the small model.
        place: for what the trials write.
    """

    kind: str
    folder: str
    place: Path

    def language_model(self) -> nn.Module:
        return load_causal_lm(Base(self.folder))


def require(condition: bool, words: str) -> None:
    if not condition:
        raise Fault(words)


def plain(folder: str, auto: str = "AutoModelForCausalLM") -> Any:
    """The model as transformers loads it, without this package."""
    import transformers

    return getattr(transformers, auto).from_pretrained(folder).eval()


def rows_of(sequences: Any) -> list[Tensor]:
    """[1, time] tokens of each row, unpadded."""
    return [row[None, :length] for row, length in zip(sequences.tokens, sequences.lengths.tolist(), strict=True)]


@torch.no_grad()
def plain_logprobs(model: Any, sequences: Any) -> Tensor:
    """[tokens] log-probs of the masked tokens, a row at a time."""
    found = []
    for row, mask in zip(rows_of(sequences), sequences.mask, strict=True):
        table = model(input_ids=row).logits[0, :-1].float().log_softmax(-1)
        chosen = table.gather(-1, row[0, 1:, None])[:, 0]
        found.append(chosen[mask[1 : row.shape[1]]])
    return torch.cat(found)


def layout(trial: Trial) -> str:
    return {"padded": "padded", "packed": "packed", "shared": "packed, shared prompts"}[
        layout_of(trial.language_model())
    ]


@torch.no_grad()
def logprobs(trial: Trial) -> str:
    sequences = tiny.sequences(tiny.RAGGED)
    ours = token_logprobs(trial.language_model(), sequences)[sequences.mask]
    expected = plain_logprobs(plain(trial.folder), sequences)
    require(float(expected.std()) > 0.05, "the small model tells no tokens apart")
    gap = float((ours - expected).abs().max())
    require(gap <= ROUNDING, f"off by {gap:.1e} nats")
    return YES


def greedy(trial: Trial) -> str:
    """Prompts of 2 to 9 tokens at once, against one at a time."""
    from transformers import GenerationConfig

    model, other = trial.language_model(), plain(trial.folder)
    prompts = tiny.prompts(6).prompts
    samples = sample(model, prompts, None, Sampling(max_new_tokens=8), (tiny.EOS,)).sequences
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=tiny.EOS, pad_token_id=0)
    alike = 0
    for prompt, row in zip(rows_of(prompts), rows_of(samples), strict=True):
        expected = other.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        alike += expected.tolist() == row.tolist()
    require(alike == len(prompts), f"{len(prompts) - alike} of {len(prompts)} differ in a batch")
    return YES


def two_steps(module: Algorithm, batch: Any) -> list[dict[str, float]]:
    """Loss and metrics of two steps on one batch, all finite, after which the weights are others."""
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    totals = []
    for _ in range(STEPS):
        totals.append(tiny.Step(module, batch).totals)
        require(all(math.isfinite(value) for value in totals[-1].values()), "not finite")
        optimizer.step()
    require(all(bool(weight.isfinite().all()) for weight in weights), "not finite")
    require(any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True)), "nothing moved")
    return totals


def starts_at(totals: list[dict[str, float]], expected: float, name: str = "loss") -> None:
    found = totals[0][name]
    require(abs(found - expected) <= 1e-5 * max(1.0, abs(expected)), f"starts at {found:.6f}, not at {expected:.6f}")


def sft(trial: Trial) -> str:
    """Starts at −log p a token of a plain forward."""
    module, batch = tiny.build(SFT(Base(trial.folder))), tiny.supervised()
    expected = -float(plain_logprobs(plain(trial.folder), batch.sequences).mean())
    starts_at(two_steps(module, batch), expected)
    return YES


def read_back(trial: Trial) -> str:
    """What two steps of SFT left, by plain transformers."""
    module = tiny.build(SFT(Base(trial.folder)))
    two_steps(module, tiny.supervised())
    trained = module.trained_model.eval()
    save_hf(module, trial.place / "sft")
    other = plain(str(trial.place / "sft"))
    with torch.no_grad():
        for row in rows_of(tiny.sequences(tiny.RAGGED)):
            ours, theirs = trained(input_ids=row).logits, other(input_ids=row).logits  # type: ignore[operator]
            gap = float((ours - theirs).abs().max() / ours.abs().max())
            require(gap <= 2e-6, f"logits off by {gap:.1e} of the largest")
    return YES


def dpo(trial: Trial) -> str:
    """Starts at ln 2."""
    starts_at(two_steps(tiny.build(DPO(Base(trial.folder), DPOLoss(beta=0.1))), tiny.preferences()), math.log(2))
    return YES


def reward(trial: Trial) -> str:
    """Starts at the loss of transformers' own scores, a row at a time; saved and loaded, the scores are equal."""
    module, batch = tiny.build(RewardModel(Base(trial.folder))), tiny.preferences()
    module.scorer.eval()
    classifier = unwrapped(module.scorer)
    with torch.no_grad():
        sides = [
            torch.cat([classifier(input_ids=row).logits[:, 0] for row in rows_of(side)])
            for side in (batch.chosen, batch.rejected)
        ]
    module.set_train_mode()
    starts_at(two_steps(module, batch), -float(nn.functional.logsigmoid(sides[0] - sides[1]).mean()))
    save_hf(module, trial.place / "reward")
    module.scorer.eval()
    loaded = load_scorer(Base(str(trial.place / "reward")), trained=True)
    scores = [score_sequences(model, batch.sides(), tiny.EVERYTHING) for model in (module.scorer, loaded)]
    gap = float((scores[0] - scores[1]).abs().max())
    require(gap <= ROUNDING, f"loaded again, scores are off by {gap:.1e}")
    return "own head" if type(classifier).forward.__module__.startswith("rlhf_lit.") else YES


def ppo(trial: Trial) -> str:
    """The ratio starts at 1 for every token, and the sampler's log-probs are those of the training forward."""
    module = tiny.make_ppo(Base(trial.folder))
    experience = module.rollout(tiny.prompts(), 0)
    gap = float(module.rollout_metrics["rollout/sampler_gap"])
    totals = two_steps(module, experience)
    starts_at(totals, 1.0, "policy/ratio_mean")
    starts_at(totals, 0.0, "policy/approxkl")
    require(gap <= 1e-4, f"sampled log-probs are off by {gap:.2g} nats")
    return YES


def lora(trial: Trial) -> str:
    """Adapters on all linear layers; saved and loaded, the log-probs are equal."""
    module = tiny.build(SFT(Base(trial.folder, lora=LoRA(rank=2))))
    two_steps(module, tiny.supervised())
    save_hf(module, trial.place / "lora")
    sequences = tiny.sequences(tiny.RAGGED)
    models = (module.trained_model.eval(), load_causal_lm(Base(str(trial.place / "lora"))))
    with torch.no_grad():
        ours, theirs = (token_logprobs(model, sequences) for model in models)
    gap = float((ours - theirs).abs().max())
    require(gap <= ROUNDING, f"loaded again, log-probs are off by {gap:.1e}")
    return YES


def four_bits(trial: Trial) -> str:
    """Adapters on a base in nf4; how much of the layers is held in 4 bits."""
    module = tiny.build(SFT(Base(trial.folder, lora=LoRA(rank=2), quantization=NF4)))
    two_steps(module, tiny.supervised())
    inner = unwrapped(module.trained_model)
    apart = {id(inner.get_output_embeddings().weight)}
    apart |= {id(part.weight) for part in inner.modules() if isinstance(part, nn.Embedding)}
    kept = {
        name: w for name, w in inner.named_parameters() if ".lora_" not in name and w.ndim > 1 and id(w) not in apart
    }
    packed = sum(w.quant_state.shape.numel() for w in kept.values() if hasattr(w, "quant_state"))
    wide = sum(w.numel() for w in kept.values() if not hasattr(w, "quant_state"))
    return YES if packed >= 9 * wide else f"{100 * packed / (packed + wide):.0f} % of the layers"


COLUMNS: dict[str, Callable[[Trial], str]] = {
    "rows": layout,
    "log-probs": logprobs,
    "greedy": greedy,
    "SFT": sft,
    "DPO": dpo,
    "reward model": reward,
    "PPO": ppo,
    "LoRA": lora,
    "4-bit": four_bits,
    "read back": read_back,
}


@dataclass(frozen=True)
class Row:
    """A family's cells, and what the refusals among them say.

    Attributes:
        cells: column → words.
        refusals: column → the line that a user is shown.
    """

    kind: str
    cells: dict[str, str]
    refusals: dict[str, str]


def row_of(kind: str) -> Row:
    """Try one family. Whatever is no ``UserError`` of this package and no number out of place is raised."""
    cells, refusals = {}, {}
    with tempfile.TemporaryDirectory() as place:
        trial = Trial(kind, build(kind, Path(place) / kind), Path(place))
        for column, attempt in COLUMNS.items():
            torch.manual_seed(0)
            try:
                cells[column] = attempt(trial)
            except Fault as fault:
                cells[column] = f"no: {fault}"
            except UserError as error:
                cells[column] = "refused"
                refusals[column] = re.sub(r"'?/\S*?/(\w[\w.-]*)'?(?=[\s,:;]|$)", r"\1", str(error))
            gc.collect()
    return Row(kind, cells, refusals)


def markdown(rows: list[Row]) -> str:
    """The table, and the lines of its refusals below."""
    notes: dict[str, int] = {}
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = []
        for column, words in row.cells.items():
            line = row.refusals.get(column)
            cells.append(words if line is None else f"{words} ({notes.setdefault(line, len(notes) + 1)})")
        lines.append(f"| {FAMILIES[row.kind][0]} (`{row.kind}`) | {' | '.join(cells)} |")
    said = [f"{number}. {line}" for line, number in notes.items()]
    return "\n".join([*lines, "", "What a refusal says:", "", *said]) + "\n"


HEAD, TAIL = "<!-- table: python tests/families/family_table.py -->\n", "<!-- end of the table -->\n"


def page_with(table: str) -> str:
    """docs/models.md with this table in the place of its own."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(HEAD)
    return before + HEAD + table + TAIL + rest.partition(TAIL)[2]


def main(kinds: list[str]) -> None:
    rows = []
    for kind in kinds or FAMILIES:
        rows.append(row_of(kind))
        print(kind, *rows[-1].cells.values(), sep=" | ", file=sys.stderr, flush=True)
    if kinds:
        print(markdown(rows))
    else:
        PAGE.write_text(page_with(markdown(rows)), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
