#!/usr/bin/env bash
# Guess:  on one CPU, in float32 and with one thread of control, the log-probs of an answer do not depend on which other
#         answers are computed beside it: the first ratio of PPO, policy / old policy, is exactly 1.
# Truth:  with JAX 0.10 to 0.12, four rows computed alone differ in their last digits from the same four rows of a batch
#         of eight: XLA's CPU backend hands fused products to YNNPACK, which splits its sums by the size of the batch.
#         With the flag --xla_cpu_experimental_ynn_fusion_type= (empty) the rows are equal to the bit.
# Who:    whoever holds a minibatch against its rollout bit by bit (a first ratio of 1, a resumed run, a test that
#         batching changes nothing). In bf16, or over many tokens, the same effect is larger.
# Seen:   jax 0.12.0.1 (Python 3.12 or later) or 0.10.2 (Python 3.11), on an x86-64 CPU:
#         as it comes: rows equal False
#         without YNNPACK fusions: rows equal True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
version=$(python3 -c 'import sys; print("0.12.0.1" if sys.version_info >= (3, 12) else "0.10.2")')
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==$version" "jaxlib==$version"
cat > "$folder/rows.py" <<'PY'
import jax
import jax.numpy as jnp

dim, words, length = 64, 64, 8
keys = jax.random.split(jax.random.key(0), 3)
table = jax.random.normal(keys[0], (words, dim))
layer = jax.random.normal(keys[1], (dim, 2 * dim)) / 4
tokens = jax.random.randint(keys[2], (8, length), 0, words)


@jax.jit
def logprobs(tokens):
    x = table[tokens]
    for _ in range(2):
        x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        x = x + jax.nn.silu(x @ layer) @ layer.T
    return jax.nn.log_softmax(x @ table.T)


print("rows equal", bool((logprobs(tokens)[:4] == logprobs(tokens[:4])).all()))
PY
export JAX_PLATFORMS=cpu
plain=$("$folder/venv/bin/python" "$folder/rows.py")
exact=$(XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= "$folder/venv/bin/python" "$folder/rows.py")
echo "as it comes: $plain"
echo "without YNNPACK fusions: $exact"
[ "$plain" = "rows equal False" ] && [ "$exact" = "rows equal True" ]
