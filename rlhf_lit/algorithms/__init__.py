"""The algorithms."""

# So that configs can name their reward sources by the class alone.
import rlhf_lit.rollout.choice_reward
import rlhf_lit.rollout.instruction_reward
import rlhf_lit.rollout.math_reward
import rlhf_lit.rollout.reasoning_gym
import rlhf_lit.rollout.verifiable  # noqa: F401
from rlhf_lit.algorithms.dpo import DPO
from rlhf_lit.algorithms.grpo import GRPO
from rlhf_lit.algorithms.kto import KTO
from rlhf_lit.algorithms.ppo import PPO
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.algorithms.rloo import RLOO
from rlhf_lit.algorithms.sft import SFT

__all__ = ["DPO", "GRPO", "KTO", "PPO", "RLOO", "SFT", "RewardModel"]
