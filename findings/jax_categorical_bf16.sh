#!/usr/bin/env bash
# Guess:  jax.random.categorical draws from softmax(logits) in whatever float type the logits are: bf16 logits cost
#         their own rounding, which moves a probability of 0.900 to 0.898.
# Truth:  its Gumbel noise is made in the type of the logits too. In bf16 that is 128 different values, none above 4.9:
#         unlikely tokens are never drawn, and of those that tie the lowest id wins. Of 999 tokens that share a tenth,
#         689 never come in 100,000 draws; together they come in 0.8% of them. Of 1,000 equal tokens the first 100 take
#         half. mode="high", the documented cure for rare events, is off the other way. logits.astype(jnp.float32) is
#         right. The documentation speaks of a bias in float32 alone, below probabilities of 1e-7.
# Who:    whoever samples answers from bf16 logits (what the head of a bf16 model returns) and takes log_softmax of the
#         same logits for their log-probs: the policy explores less than it seems to, and ratios and KL are of a
#         distribution that nobody drew from.
# Seen:   jax 0.10.2 (Python 3.11), on an x86-64 CPU, 100,000 draws:
#         float32:             likely token 0.900, never drawn   0 of 999; first 100 of 1,000 equal 0.10
#         bfloat16:            likely token 0.992, never drawn 689 of 999; first 100 of 1,000 equal 0.55
#         bfloat16, mode high: likely token 0.871, never drawn   0 of 999; first 100 of 1,000 equal 0.10
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
cat > "$folder/draw.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

one_likely = jnp.log(jnp.array([0.9] + [0.1 / 999] * 999))  # rounded to bf16 they stand for 0.898
equal = jnp.zeros(1000)


def shares(logits, mode):
    """How often each token is drawn (1000,)."""
    draws = jax.random.categorical(jax.random.key(0), logits, shape=(100_000,), mode=mode)
    return np.bincount(np.asarray(draws), minlength=1000) / len(draws)


found = {}
for name, dtype, mode in (("float32", jnp.float32, "low"), ("bfloat16", jnp.bfloat16, "low"),
                          ("bfloat16, mode high", jnp.bfloat16, "high")):
    asked = jax.nn.softmax(one_likely.astype(dtype).astype(jnp.float32))
    assert abs(asked[0] - 0.9) < 5e-3, asked[0]  # what the rounded logits stand for
    drawn, flat = shares(one_likely.astype(dtype), mode), shares(equal.astype(dtype), mode)
    found[name] = drawn[0], (drawn == 0).sum(), flat[:100].sum()
    print("{:20} likely token {:.3f}, never drawn {:3d} of 999; first 100 of 1,000 equal {:.2f}".format(
        name + ":", *found[name]))
likely, never, first = found["float32"]
assert abs(likely - 0.9) < 0.005 and never == 0 and abs(first - 0.1) < 0.01
likely, never, first = found["bfloat16"]
assert likely > 0.98 and never > 500 and first > 0.4
assert abs(found["bfloat16, mode high"][0] - 0.9) > 0.02
print("as described")
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/draw.py"
