#!/usr/bin/env bash
# Guess:  math-verify says of two plain numbers whether they are equal: the base of a numeral counts, and so do a
#         number's digits, however small it is.
# Truth:  a base in the index is dropped: 17 in base 8 is 17. So 17 in base 9 is judged right for it, and 15, which it
#         is, wrong. And a decimal is rounded to six places after the point, not to six digits: Planck's constant equals
#         the reduced one, and the charge of an electron its negative. Not always: 2.5e-8 and 7.5e-8, written alike,
#         differ. Larger float_rounding and numeric_precision, which verify takes, mend the second; none of verify's
#         arguments concerns the first.
# Who:    whoever takes math-verify for a reward or an evaluation where answers are in bases (number theory of MATH) or
#         in SI units (physics): a policy is paid for a wrong base or constant, and not for a right conversion.
# Seen:   math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0, Python 3.11 (right answer, given: judged):
#         17_8, 17_9: True, wrongly
#         17_8, 15: False, wrongly
#         6.63 \times 10^{-34}, 1.05 \times 10^{-34}: True, wrongly
#         1.60 \times 10^{-19}, -1.60 \times 10^{-19}: True, wrongly
#         2.5 \times 10^{-8}, 7.5 \times 10^{-8}: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
cat > "$folder/judge.py" <<'PY'
from math_verify import parse, verify

power = lambda number, exponent: rf"{number} \times 10^{{{exponent}}}"
cases = [  # the right answer, the given one, are they equal, what is judged
    ("17_8", "17_9", False, True),
    ("17_8", "15", True, False),
    (power("6.63", -34), power("1.05", -34), False, True),
    (power("1.60", -19), power("-1.60", -19), False, True),
    (power("2.5", -8), power("7.5", -8), False, False),
]
for right, given, equal, expected in cases:
    gold, answer = parse(f"${right}$"), parse(rf"\boxed{{{given}}}")
    judged = verify(gold, answer)
    print(f"{right}, {given}: {judged}" + ("" if judged == equal else ", wrongly"))
    assert judged == expected, (gold, answer)
    if "times" in right:
        assert verify(gold, answer, float_rounding=40, numeric_precision=60) == equal, (gold, answer)
print("as described")
PY
"$folder/venv/bin/python" "$folder/judge.py"
