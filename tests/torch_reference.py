"""DPO written out in torch, as plainly as possible: the judge of our step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from drift_jax.config import TrainConfig
from drift_jax.data.pairs import TokenizedPair


def torch_reference(
    model_dir: Path, pairs: Sequence[TokenizedPair], ref_logps: np.ndarray, config: TrainConfig
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """DPO + alpha * NLL in float64, one sequence at a time, without padding or batching.

    Returns:
      Metrics under TRL's names, and the gradient of every tensor under its Hugging Face name.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    c, log_sigmoid = config, torch.nn.functional.logsigmoid
    losses, nll, tokens, rewards = [], 0.0, 0, []
    for pair, ref in zip(pairs, ref_logps.astype(np.float32).astype(np.float64), strict=True):
        logps = []
        for completion in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, completion]).astype(np.int64))
            predicted = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(-1, ids[1:, None])[:, 0]
            logps.append(predicted[len(pair.prompt_ids) - 1 :])
        nll, tokens = nll - logps[0].sum(), tokens + len(logps[0])
        reward = [c.beta * (logp.sum() - r) for logp, r in zip(logps, ref, strict=True)]
        h = reward[0] - reward[1]
        losses.append(-log_sigmoid(h) * (1 - c.label_smoothing) - log_sigmoid(-h) * c.label_smoothing)
        rewards.append([float(r.detach()) for r in reward])
    loss = torch.stack(losses).mean() + c.rpo_alpha * nll / tokens
    loss.backward()
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    chosen, rejected = np.array(rewards).T
    metrics = {"loss": float(loss.detach()), "nll_loss": float(nll.detach()) / tokens}
    metrics |= {"rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
    metrics |= {"rewards/margins": (chosen - rejected).mean(), "rewards/accuracies": (chosen > rejected).mean()}
    return metrics, grads
