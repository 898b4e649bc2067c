"""Truth before timing: what a guided engine answers, against the rules themselves.

Each check returns a record with `ok` and the figures behind it. `ask(requests)` is the engine:
[{"prompt": ids, "params": sampling parameters}] -> per request a list of completions.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import torch

Ask = Callable[[list[dict[str, Any]]], list[Any]]
GENERATED = 96
TOKENS = [1000, 40_000]
"""Prompts are made of these."""


def use_vocabulary(size: int) -> None:
    TOKENS[:] = [size // 10, size - size // 10]


def prompts(count: int, seed: int = 0, low: int = 20, high: int = 200) -> list[list[int]]:
    source = random.Random(seed)
    return [
        [source.randrange(*TOKENS) for _ in range(source.randrange(low, high))]
        for _ in range(count)
    ]


class Dialect:
    """How an engine names the parameters."""

    def __init__(self, engine: str) -> None:
        self.engine = engine

    def params(self, num_tokens: int, control: dict[str, Any] | None = None, **other: Any) -> Any:
        own: dict[str, Any] = {"temperature": other.pop("temperature", 0.0), **other}
        own["max_tokens" if self.engine == "vllm" else "max_new_tokens"] = num_tokens
        if control is not None and self.engine == "vllm":
            own["extra_args"] = {"lenvm": json.dumps(control)}
        elif control is not None:
            own["custom_params"] = {"lenvm": control}
        if self.engine == "sglang":
            own.pop("seed", None)
        return own


def check_untouched(ask: Ask, stock: Ask, dialect: Dialect) -> dict[str, Any]:
    """Rows without control: the same tokens as the stock engine's, alone and beside guided rows."""
    mine, others = prompts(8, 1), prompts(8, 2)
    plain = dialect.params(GENERATED, ignore_eos=True)
    hard = {"equal_to": 60, "rule": "hard", "top_k": 8}
    guided = dialect.params(GENERATED, hard, ignore_eos=True)

    def run(engine: Ask, beside: Any) -> list[list[int]]:
        requests = [{"prompt": p, "params": plain} for p in mine]
        requests += [{"prompt": p, "params": beside} for p in others]
        return [o[0]["tokens"] for o in engine(requests)[:8]]

    reference = run(stock, plain)
    alone, mixed, again = run(ask, plain), run(ask, guided), run(stock, plain)
    same = {
        "stock_again": _same(reference, again),
        "plugin_unguided": _same(reference, alone),
        "plugin_beside_guided": _same(alone, mixed),
    }
    # bf16 ties may fall either way between two runs of the stock engine itself
    return {"ok": same["plugin_beside_guided"] >= min(1.0, same["stock_again"]), **same}


def check_lengths(
    ask: Ask, dialect: Dialect, rules: tuple[str, ...], count: int = 64
) -> dict[str, Any]:
    """A strict goal is kept exactly by every rule, through preemption."""
    targets = [20 + 3 * i for i in range(count)]
    requests = [
        {
            "prompt": p,
            "params": dialect.params(
                400,
                {"equal_to": t, "rule": rules[t % len(rules)], "strict": True, "top_k": 8},
                temperature=1.0,
            ),
        }
        for p, t in zip(prompts(count, 3), targets, strict=True)
    ]
    lengths = [len(o[0]["tokens"]) for o in ask(requests)]
    off = [(t, n) for t, n in zip(targets, lengths, strict=True) if t != n]
    return {"ok": not off, "requests": count, "off": off[:10], "num_off": len(off)}


def check_rule(
    ask: Ask, dialect: Dialect, generator: Any, session: Any, count: int = 8
) -> dict[str, Any]:
    """Greedy, hard rule: at every prefix of the engine's answer, our own choice from plain
    Hugging Face logits. They part only where bf16 rounding reorders."""
    from lenvm.guidance.request import LengthControl
    from lenvm.guidance.session import Guided

    control = {"equal_to": 200, "rule": "hard", "top_k": 8}
    mine = prompts(count, 4)
    params = dialect.params(GENERATED, control, ignore_eos=True)
    answers = [o[0]["tokens"] for o in ask([{"prompt": p, "params": params} for p in mine])]
    agree = total = 0
    for prompt, tokens in zip(mine, answers, strict=True):
        ids = torch.tensor([[*prompt, *tokens]], device=generator.device)
        with torch.inference_mode():
            logits = generator(ids).logits[0, len(prompt) - 1 : -1].float()
        guided = Guided(prompt, LengthControl.parse(control), temperature=0.0)
        session.add({"r": guided})
        for step, token in enumerate(tokens):
            chosen = session.step(["r"], logits[step : step + 1])
            own = int(chosen.ids[0, chosen.log_probs[0].argmax()])
            agree, total = agree + (own == token), total + 1
            session.commit(["r"], [token])
        session.remove(["r"])
    return {"ok": agree / total > 0.9, "agreement": agree / total, "tokens": total}


def check_distribution(
    ask: Ask, dialect: Dialect, generator: Any, session: Any, count: int = 3000
) -> dict[str, Any]:
    """First tokens of many requests against the rule's distribution: chi-square. The generator's
    log-probabilities are the engine's own where it tells them: others differ in bf16."""
    from lenvm.guidance.request import LengthControl
    from lenvm.guidance.session import Guided

    control = {"tilt": 3.0, "top_k": 8, "top_p": 0.95}
    prompt = prompts(1, 5, 40, 41)[0]
    params = dialect.params(1, control, temperature=1.0, ignore_eos=True)
    answers = ask([{"prompt": prompt, "params": params}] * count)
    own = {"logprobs" if dialect.engine == "vllm" else "top_logprobs": 20}
    plain = ask([{"prompt": prompt, "params": dialect.params(1, ignore_eos=True, **own)}])
    counts: dict[int, int] = {}
    for answer in answers:
        token = answer[0]["tokens"][0]
        counts[token] = counts.get(token, 0) + 1
    with torch.inference_mode():
        logits = generator(torch.tensor([prompt], device=generator.device)).logits[:, -1].float()
    logits = logits.log_softmax(-1)
    first = plain[0][0].get("first") or {}
    for token, log_prob in first.items():
        logits[0, int(token)] = log_prob
    session.add({"r": Guided(prompt, LengthControl.parse(control), temperature=1.0)})
    chosen = session.step(["r"], logits)
    session.remove(["r"])
    probs = dict(zip(chosen.ids[0].tolist(), chosen.log_probs[0].exp().tolist(), strict=True))
    probs.pop(-1, None)
    outside = sum(n for token, n in counts.items() if token not in probs)
    cells = [(counts.get(t, 0), p * count) for t, p in probs.items() if p * count >= 5]
    chi2 = sum((n - e) ** 2 / e for n, e in cells)
    degrees = max(1, len(cells) - 1)
    half = torch.tensor([degrees / 2, chi2 / 2], dtype=torch.float64)
    p_value = float(torch.special.gammaincc(half[0], half[1]))
    distance = 0.5 * sum(abs(counts.get(t, 0) / count - p) for t, p in probs.items())
    return {
        "ok": outside <= 0.01 * count and (p_value > 1e-3 or distance < 0.04),
        "chi2": chi2,
        "degrees": degrees,
        "p_value": p_value,
        "outside": outside,
        "total_variation": distance,
        "requests": count,
        "log_probs_of": "the engine" if first else "Hugging Face",
    }


def check_faults(ask: Ask, dialect: Dialect) -> dict[str, Any]:
    """A rule that raises ends its own request; a bad control is refused; the others go on."""
    mine = prompts(6, 6)
    good = dialect.params(50, {"equal_to": 40, "rule": "soft", "top_k": 8}, temperature=1.0)
    bad = dialect.params(50, {"equal_to": 40, "rule": "explode", "top_k": 8}, temperature=1.0)
    answers = ask([{"prompt": p, "params": bad if i == 2 else good} for i, p in enumerate(mine)])
    answers += [answers[0]] * (len(mine) - len(answers))  # one error for all
    lengths = [0 if "error" in a else len(a[0]["tokens"]) for a in answers]
    refused = ask([{"prompt": mine[0], "params": dialect.params(8, {"equal_to": 0})}])[0]
    after = ask([{"prompt": mine[0], "params": good}])[0]
    fine = all(n == 40 for i, n in enumerate(lengths) if i != 2) and lengths[2] < 40
    refusal = refused["error"] if isinstance(refused, dict) else None
    return {
        "ok": fine and bool(refusal) and "error" not in after and len(after[0]["tokens"]) == 40,
        "lengths": lengths,
        "failed": answers[2],
        "refusal": refusal,
    }


def _same(left: list[list[int]], right: list[list[int]]) -> float:
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(left)
