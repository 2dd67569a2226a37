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

Task = Literal["sft", "reward", "dpo", "ppo"]
TASKS: tuple[Task, ...] = get_args(Task)
BETA = 0.1
MINIBATCHES, PPO_EPOCHS, NEW_TOKENS, KL_COEFFICIENT = (
    4,
    4,
    53,
    0.05,
)  # of a rollout, TRL's defaults but for the minibatches
# Llama shapes: hidden, intermediate, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "7m": (256, 704, 6, 4, 4, 8192),
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
}
VOCABULARY = 8192  # of the tokenizer, at most; larger embeddings hold rows that no text uses


@dataclass(frozen=True)
class Workload:
    """One comparison.

    Attributes:
        task: what is trained.
        folder: where model, rows and results stand.
        pairs: a file of preference pairs; SFT learns the chosen side.
        shape: of ``SHAPES``.
        steps: optimizer steps that are timed; of PPO, rollouts with all their updates.
        warm_up: as many before them.
        batch_size: rows, pairs or episodes of an optimizer step.
        max_length: longest sequence, of PPO longest prompt; longer ones are left out.
        micro_batch_tokens: of our side; no result depends on it.
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
    micro_batch_tokens: int = 1024
    learning_rate: float = 1e-4
    device: str = "cpu"
    precision: str = "32-true"

    @property
    def model(self) -> str:
        """The model's folder."""
        return str(Path(self.folder, f"model_{self.shape}"))

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

    def amount(self) -> int:
        """What the timed steps process: real tokens, both sides of a pair counted; of PPO, episodes."""
        if self.task == "ppo":
            return self.steps * self.rollout_size
        timed = self.read_batches()[self.warm_up :]
        return sum(len(side["tokens"]) for batch in timed for row in batch for side in row.values())


@dataclass(frozen=True)
class Measured:
    """What one side did in one process.

    Attributes:
        seconds: of the timed steps together.
        losses: of every step; none of PPO, whose two sides draw responses of their own.
        peak: bytes: on a CPU the largest resident set of the process, on a GPU the allocator's peak.
    """

    seconds: float
    losses: list[float]
    peak: int


def peak_bytes(device: str) -> int:
    """Of this process, so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save_model(workload: Workload) -> None:
    """A Llama with random weights, and a byte-level BPE tokenizer trained on the file itself."""
    import datasets
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[workload.shape]
    rows = datasets.load_dataset("json", data_files=workload.pairs, split="train")
    texts = (text for side in ("chosen", "rejected") for text in rows[side])
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    torch.manual_seed(0)
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
    LlamaForCausalLM(config).save_pretrained(workload.model)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(workload.reward)
    for folder in (workload.model, workload.reward):
        tokenizer.save_pretrained(folder)
