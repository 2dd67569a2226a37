"""What both sides of a comparison work on: one model, one file, the same batches in the same order.

The model is built from a config with random weights and saved once. Rows are tokenised by our data modules; the batches
that our run has seen are written down as token ids and handed to the peer, so that no difference of templates,
tokenizers or shuffling enters the numbers.
"""

from __future__ import annotations

import json
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Task = Literal["sft", "reward", "dpo", "ppo", "generate"]
TASKS: tuple[Task, ...] = get_args(Task)
BETA = 0.1
# Of a rollout, TRL's defaults but for the minibatches.
MINIBATCHES, PPO_EPOCHS, NEW_TOKENS, KL_COEFFICIENT = 4, 4, 53, 0.05
# `generate`: longest answer, and how many of the vocabulary's tokens end one: random weights draw all of them alike, so
# answers end by themselves after 32 tokens on average.
LONGEST, STOP_TOKENS, SAMPLES = 128, tuple(range(100, 100 + 8192 // 32)), 8
# Llama shapes: hidden, intermediate, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "2m": (128, 352, 5, 2, 2, 8192),
    "7m": (256, 704, 6, 4, 4, 8192),
    "18m": (384, 1056, 8, 6, 6, 8192),
    "50m": (640, 1760, 9, 10, 10, 8192),
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
}
VOCABULARY = 8192  # of the tokenizer, at most; larger embeddings hold rows that no text uses


@dataclass(frozen=True)
class Workload:
    """One comparison.

    Attributes:
        task: what is trained.
        folder: where model, rows and results stand.
        pairs: a file of preference pairs; SFT learns the chosen side.
        shape: of ``SHAPES``, or six numbers in their order: `128-352-2-2-2-32768`.
        steps: optimizer steps that are timed; of PPO, rollouts with all their updates; of `generate`, batches.
        warm_up: as many before them.
        batch_size: rows, pairs or episodes of an optimizer step.
        max_length: longest sequence, of PPO longest prompt; longer ones are left out.
        row_tokens: of SFT and DPO, instead of the file's rows: so many random tokens each, half of them the response.
        micro_batch_tokens: of our side; no result depends on it.
        peer_rows: of the peer's side, rows or pairs that go through at once; none: the whole batch.
        qlora: of SFT, adapters on a base in 4 bits, activations recomputed; both sides.
        learning_rate: constant.
        device: cpu or cuda.
        precision: Lightning's name, 32-true or bf16-mixed.
    """

    task: Task
    folder: str
    pairs: str
    shape: str = "7m"
    steps: int = 12
    warm_up: int = 2
    batch_size: int = 8
    max_length: int = 512
    row_tokens: int | None = None
    micro_batch_tokens: int = 1024
    peer_rows: int | None = None
    qlora: bool = False
    learning_rate: float = 1e-4
    device: str = "cpu"
    precision: str = "32-true"

    @property
    def model(self) -> str:
        """The model's folder."""
        return str(Path(self.folder, f"model_{self.shape}"))

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Hidden, intermediate, layers, heads, key-value heads, vocabulary."""
        return SHAPES.get(self.shape) or tuple(int(number) for number in self.shape.split("-"))

    @property
    def weights(self) -> int:
        """How many the model has: embeddings, which are the LM head too; in each layer attention, MLP, two norms."""
        hidden, intermediate, layers, heads, kv_heads, vocabulary = self.dimensions
        attention = 2 * hidden * hidden * (heads + kv_heads) // heads
        return vocabulary * hidden + layers * (attention + 3 * hidden * intermediate + 2 * hidden) + hidden

    @property
    def products_per_token(self) -> int | None:
        """FLOP of a token of SFT or DPO by the usual count, 2 for each weight and pass: one forward, two backward.

        Adapters alone need no gradient of the base's weights; DPO's reference goes forward. What is saved (LM head of
        prompt tokens, prompts that pairs share) is counted, and what is done again (recomputed activations) is not.
        """
        passes = {"sft": 2 if self.qlora else 3, "dpo": 4}.get(self.task)
        return passes and 2 * passes * self.weights

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Of weights that do not train: sampling, and a base under adapters."""
        return "float32" if self.precision == "32-true" else "bfloat16"

    @property
    def reward(self) -> str:
        """PPO's reward model, of the same shape."""
        return f"{self.model}_reward"

    @property
    def rollout_size(self) -> int:
        """Episodes of a rollout."""
        return MINIBATCHES * self.batch_size

    @property
    def batches(self) -> Path:
        """The batches as token ids: a list of rows for each step."""
        return Path(self.folder, f"batches_{self.task}.json")

    @property
    def head(self) -> Path:
        """A reward model's head, as our run has drawn it."""
        return Path(self.folder, "head.pt")

    @property
    def all_steps(self) -> int:
        """The untimed ones included."""
        return self.warm_up + self.steps

    def save(self) -> Path:
        """For another process."""
        file = Path(self.folder, "workload.json")
        file.write_text(json.dumps(asdict(self)))
        return file

    @classmethod
    def load(cls, file: str) -> Workload:
        """What ``save`` wrote."""
        return cls(**json.loads(Path(file).read_text()))

    def read_batches(self) -> list[list[dict[str, Any]]]:
        """Rows by step: `tokens` and `mask`, or the same of `chosen` and `rejected`."""
        found: list[list[dict[str, Any]]] = json.loads(self.batches.read_text())
        return found

    def amount(self, batches: list[list[dict[str, Any]]]) -> int:
        """What the timed ones of these batches hold; of PPO, the episodes of the timed rollouts."""
        if self.task == "ppo":
            return self.steps * self.rollout_size
        return sum(len(side["tokens"]) for batch in batches[self.warm_up :] for row in batch for side in row.values())


@dataclass(frozen=True)
class Measured:
    """What one side did in one process.

    Attributes:
        seconds: of the timed steps together.
        amount: what they processed: real tokens, both sides of a pair counted; of PPO episodes, of `generate` new ones.
        losses: of every step, where both sides saw the same batches.
        peak: bytes: on a CPU the largest resident set of the process, on a GPU the allocator's peak.
    """

    seconds: float
    amount: int
    losses: list[float]
    peak: int

    @property
    def rate(self) -> float:
        """Per second."""
        return self.amount / self.seconds


def peak_bytes(device: str) -> int:
    """Of this process, so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_rows(workload: Workload) -> list[list[int]]:
    """As many rows of ``row_tokens`` as the run sees; of DPO half as long again: prompt, chosen, rejected response.

    Of the whole vocabulary, but for the three special tokens.
    """
    assert workload.row_tokens is not None
    count, width = workload.all_steps * workload.batch_size, workload.row_tokens
    width += width // 2 if workload.task == "dpo" else 0
    generator = torch.Generator().manual_seed(0)
    rows: list[list[int]] = torch.randint(3, workload.dimensions[-1], (count, width), generator=generator).tolist()
    return rows


def save_model(workload: Workload) -> None:
    """A Llama with random weights, and a byte-level BPE tokenizer trained on the file itself; for PPO a scorer too."""
    folders = [workload.model] + ([workload.reward] if workload.task == "ppo" else [])
    if all(Path(folder, "config.json").exists() for folder in folders):
        return
    import datasets
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads, kv_heads, vocabulary = workload.dimensions
    rows = datasets.load_dataset("json", data_files=workload.pairs, split="train")
    texts = (text for side in ("chosen", "rejected") for text in rows[side])
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    for folder, kind in zip(folders, (LlamaForCausalLM, LlamaForSequenceClassification), strict=False):
        config.num_labels = 2 if kind is LlamaForCausalLM else 1  # the library's default, or one score
        torch.manual_seed(0)
        with torch.device(workload.device):
            kind._from_config(
                config, dtype=getattr(torch, workload.dtype if workload.qlora else "float32")
            ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def prompt_batches(workload: Workload, setting: str) -> list[list[list[int]]]:
    """`generate`: the file's prompts as token ids, by batch; with the setting `samples` an eighth of them, each eight
    times."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    rows = datasets.load_dataset("json", data_files=workload.pairs, split="train")
    texts = [chosen[: chosen.rindex("Assistant:") + len("Assistant:")] for chosen in rows["chosen"]]
    prompts = [tokens for tokens in tokenizer(texts).input_ids if len(tokens) <= workload.max_length]
    times = SAMPLES if setting == "samples" else 1
    each = workload.batch_size // times
    batches = [prompts[i * each : (i + 1) * each] for i in range(workload.all_steps)]
    return [[prompt for prompt in batch for _ in range(times)] for batch in batches]
