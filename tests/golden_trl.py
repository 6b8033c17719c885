"""Losses and gradients of TRL's GRPOTrainer for the variants that grpo.py has too, on the same random log-probs.

pip install trl==1.16.0                      # in an environment of its own
python tests/golden_trl.py                   # writes golden/trl.json; test_grpo.py compares

`_compute_loss` is called by itself, on a stand-in for the trainer: no model, what the policy says is given.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "golden" / "trl.json"
BETA, LENGTHS, T = 0.1, (5, 3, 1, 4, 2, 5), 5
VARIANTS = {  # name: TRL's loss_type, level of the ratio, corrected KL, epsilons (CISPO's upper one counts from 0)
    "token": ("dapo", "token", True, 0.2, 0.28),
    "token, plain k3": ("dapo", "token", False, 0.2, 0.2),
    "sequence": ("grpo", "token", True, 0.2, 0.2),
    "constant": ("dr_grpo", "token", True, 0.2, 0.2),
    "gspo, plain k3": ("grpo", "sequence", False, 0.02, 0.03),
    "cispo": ("cispo", "token", True, 0.2, 1.5),
}


def inputs() -> dict:
    """Log-probs (6, 5) of policy, old policy and reference, advantages (6,), a mask (6, 5)."""
    rng = np.random.default_rng(0)
    new = np.log(rng.uniform(0.05, 0.95, (len(LENGTHS), T)))
    old, ref = new + rng.normal(0, 0.3, new.shape), new + rng.normal(0, 0.4, new.shape)
    mask = np.array([[int(t < n) for t in range(T)] for n in LENGTHS])
    return dict(new=new, old=old, ref=ref, advantages=rng.normal(size=len(LENGTHS)), mask=mask)


def trainer(say, loss_type, level, corrected, low, high):
    """What `_compute_loss` reads of a trainer."""
    one = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    args = SimpleNamespace(use_bias_correction_kl=corrected, delta=None, steps_per_generation=1)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=say, loss_type=loss_type, importance_sampling_level=level, args=args,
        epsilon_low=low, epsilon_high=high, beta=BETA, max_completion_length=T, accelerator=one,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, num_generations=3,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, use_adaptive_entropy=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip


def loss_of(variant) -> dict:
    import torch
    from trl import GRPOTrainer

    x = {name: torch.tensor(value) for name, value in inputs().items()}
    new, ids = x["new"].requires_grad_(), torch.zeros(len(LENGTHS), T, dtype=torch.long)
    batch = dict(
        prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=x["mask"], advantages=x["advantages"],
        old_per_token_logps=x["old"], ref_per_token_logps=x["ref"], num_items_in_batch=x["mask"].sum(),
    )  # fmt: skip
    peer = trainer(lambda *_, **__: (new, torch.zeros_like(new), None), *variant)
    loss = GRPOTrainer._compute_loss(peer, None, batch)
    loss.backward()
    return dict(loss=loss.item(), gradient=new.grad.tolist())


if __name__ == "__main__":
    import trl

    found = {"trl": trl.__version__} | {name: loss_of(variant) for name, variant in VARIANTS.items()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {GOLDEN}")
