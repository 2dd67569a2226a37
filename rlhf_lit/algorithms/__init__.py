"""The algorithms."""

import rlhf_lit.rollout.verifiable  # noqa: F401 - so that configs can name its reward sources by their class alone
from rlhf_lit.algorithms.dpo import DPO
from rlhf_lit.algorithms.grpo import GRPO
from rlhf_lit.algorithms.kto import KTO
from rlhf_lit.algorithms.ppo import PPO
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.algorithms.rloo import RLOO
from rlhf_lit.algorithms.sft import SFT

__all__ = ["DPO", "GRPO", "KTO", "PPO", "RLOO", "SFT", "RewardModel"]
