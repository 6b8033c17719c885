#!/usr/bin/env bash
# Guess:  a `lax.scan` over the stacked bf16 weights of a model's layers needs no more memory than the weights and a layer
#         or two, as in float32. bf16 is the smaller choice.
# Truth:  with JAX 0.10.2, XLA's CPU backend slices no bf16 arrays. It turns the whole stack into fp32 before the loop and
#         slices that: twice the stack's own bytes on top of it. What a loop keeps for its backward pass is a stack as
#         well. The same bits as uint16, turned into bf16 inside the loop, are sliced as they are. With JAX 0.12.0.1
#         (Python 3.12) bf16 is sliced as it is: 0.0 extra bytes.
# Who:    whoever trains or scores in bf16 on a CPU with layers in a scan, and finds that it takes more memory than fp32.
# Seen:   jax 0.10.2 (Python 3.11), on an x86-64 CPU: extra bytes a weight
#         float32 0.1, bfloat16 4.0, bits 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
cat > "$folder/scan.py" <<'PY'
import jax
import jax.numpy as jnp
from jax import lax

layers, dim = 64, 256


def extra_bytes(stored, computed):
    """Of temporary memory, a weight, in a stack of layers that is stored in one type and multiplied in another."""

    def layer(x, weight):
        weight = weight if stored == computed else lax.bitcast_convert_type(weight, computed)
        return jnp.dot(x, weight, preferred_element_type=jnp.float32).astype(computed), None

    stack = jax.ShapeDtypeStruct((layers, dim, dim), stored)
    rows = jax.ShapeDtypeStruct((8, dim), computed)
    program = jax.jit(lambda stack, rows: lax.scan(layer, rows, stack)[0]).lower(stack, rows).compile()
    return program.memory_analysis().temp_size_in_bytes / stack.size


found = [extra_bytes(*types) for types in ((jnp.float32,) * 2, (jnp.bfloat16,) * 2, (jnp.uint16, jnp.bfloat16))]
print("float32 {:.1f}, bfloat16 {:.1f}, bits {:.1f}".format(*found))
PY
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/scan.py")
echo "extra bytes a weight: $seen"
[ "$seen" = "float32 0.1, bfloat16 4.0, bits 0.0" ]
