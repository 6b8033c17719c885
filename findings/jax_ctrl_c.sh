#!/usr/bin/env bash
# Guess:  a program that waits for a JAX array hears Ctrl-C as one that sleeps or reads a file does: its handler runs at
#         once, or KeyboardInterrupt ends the wait.
# Truth:  with JAX 0.10 to 0.12, nothing of Python runs until the array is computed: np.asarray(x) and
#         x.block_until_ready() wait without asking for signals. A step of half a minute neither says that it heard nor
#         lets a second Ctrl-C end it; only SIGKILL does. `signal.set_wakeup_fd` and a thread that reads from it hear
#         the same signal at once.
# Who:    whoever saves a run when it is told to stop (Ctrl-C, a cluster's SIGTERM with so many seconds' grace).
# Seen:   jax 0.12.0.1 (Python 3.12 or later) or 0.10.2 (Python 3.11), on an x86-64 CPU:
#         a wait of 3.4 s, interrupted after 1.0 s: the handler ran after 3.4 s, the thread heard it after 1.0 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
version=$(python3 -c 'import sys; print("0.12.0.1" if sys.version_info >= (3, 12) else "0.10.2")')
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==$version" "jaxlib==$version"
cat > "$folder/wait.py" <<'PY'
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

work = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x))
x, heard = jnp.ones((1000, 1000)), {}
np.asarray(work(x, 1))
begin = time.time()
np.asarray(work(x, 20))
count = int(20 * 6 / (time.time() - begin))  # about six seconds of work

signal.signal(signal.SIGINT, lambda number, frame: heard.setdefault("handler", time.time() - begin))
read, write = os.pipe()
os.set_blocking(write, False)
signal.set_wakeup_fd(write)
note = lambda: os.read(read, 1) and heard.setdefault("thread", time.time() - begin)
threading.Thread(target=note, daemon=True).start()
begin = time.time()
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
np.asarray(work(x, count))
end = time.time() - begin
time.sleep(0.1)
print(f"a wait of {end:.1f} s, interrupted after 1.0 s: the handler ran after {heard['handler']:.1f} s, "
      f"the thread heard it after {heard['thread']:.1f} s")
late = end > 2.5 and heard["handler"] > end - 0.5 and heard["thread"] < 1 + (end - 1) / 2
raise SystemExit(0 if late else 1)
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/wait.py"
