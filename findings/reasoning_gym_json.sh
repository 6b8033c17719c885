#!/usr/bin/env bash
# Guess:  a puzzle of reasoning-gym is plain data: written to JSONL (or Parquet) and read back, its own answer still gets
#         the full score from the data set's scorer.
# Truth:  the puzzles of arc_agi and rearc hold their grids as tuples of tuples. JSON makes lists of them, the scorer
#         compares tuples with lists, and the right answer gets 0.05, the score of any other grid. Nothing is raised: a
#         policy that learns from stored rows is paid alike for right and wrong answers.
# Who:    whoever stores prompts with their puzzles once and trains from the file (RL with verifiable rewards).
# Seen:   reasoning-gym 0.1.25, Python 3.11:
#         arc_agi: own answer 1.0, after JSON 0.05
#         rearc: own answer 1.0, after JSON 0.05
#         chain_sum: own answer 1.0, after JSON 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "reasoning-gym==0.1.25"
cat > "$folder/puzzles.py" <<'PY'
import json

import reasoning_gym

found = {}
for task in ("arc_agi", "rearc", "chain_sum"):
    puzzles = reasoning_gym.create_dataset(task, size=3, seed=0)
    score = lambda puzzle: puzzles.score_answer(puzzle["answer"], puzzle)
    found[task] = [(score(p), score(json.loads(json.dumps(p)))) for p in puzzles]
    before, after = found[task][0]
    print(f"{task}: own answer {before}, after JSON {after}")
assert all(pair == (1.0, 0.05) for task in ("arc_agi", "rearc") for pair in found[task]), found
assert all(pair == (1.0, 1.0) for pair in found["chain_sum"]), found
print("as described")
PY
"$folder/venv/bin/python" "$folder/puzzles.py"
