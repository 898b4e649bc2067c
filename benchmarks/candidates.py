"""How many candidates real text leaves: tokens that pass top-k 15 and a top-p, by domain.

    python benchmarks/candidates.py qwen2.5-coder-0.5b.gguf LAB/tokens/coder05-heldout

A guided step scores that many per row. Over the generator's own unguided answers (T = 1); a folder
of tokens is what `recipes/results` samples.
"""

import argparse
import json
import platform
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

TOP_K = 15
TOP_PS = (1.0, 0.999, 0.99)


def read_answers(folder: Path, count: int, longest: int) -> list[tuple[str, list[int], list[int]]]:
    """(domain, prompt, answer) of answers chosen at random, none over `longest` tokens."""
    from lenvm.files import read_jsonl

    prompts = [row for _, row in read_jsonl(folder / "prompts.jsonl")]
    completions = [row for _, row in read_jsonl(folder / "completions.jsonl")]
    tokens = np.fromfile(folder / "tokens.u32", "<u4")
    ends = np.cumsum([row["n"] for row in completions])
    found = []
    for i in np.random.default_rng(0).permutation(len(completions)):
        row = completions[i]
        if row["n"] > longest:
            continue
        prompt = prompts[row["p"]]
        answer = tokens[ends[i] - row["n"] : ends[i]].tolist()
        found.append((prompt["domain"], prompt["ids"], answer))
        if len(found) == count:
            break
    return found


@torch.inference_mode()
def count_candidates(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[top-p, tokens of the answer] candidates of each."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    mass = logits.softmax(-1).topk(TOP_K, -1).values
    before = mass.cumsum(-1) - mass
    return torch.stack([((before < p) | (p >= 1)).sum(-1) for p in TOP_PS]).cpu()


def main() -> None:
    from transformers import AutoModelForCausalLM

    from lenvm.files import write_json
    from lenvm.model.bundled import resolve_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("generator")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--answers", type=int, default=90)
    parser.add_argument("--longest", type=int, default=600)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/candidates.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(arguments.generator), dtype=torch.bfloat16
    ).to(device)
    counts: dict[str, list[torch.Tensor]] = defaultdict(list)
    for domain, prompt, answer in read_answers(
        arguments.tokens, arguments.answers, arguments.longest
    ):
        counts[domain].append(count_candidates(model, prompt, answer))
    domains = {}
    for domain, parts in sorted(counts.items()):
        every = torch.cat(parts, 1).float()
        means = every.mean(1).tolist()
        domains[domain] = {
            "answers": len(parts),
            "tokens": every.shape[1],
            "candidates": dict(zip(map(str, TOP_PS), means, strict=True)),
            "single": dict(
                zip(map(str, TOP_PS), (every == 1).float().mean(1).tolist(), strict=True)
            ),
        }
    write_json(
        arguments.out,
        {
            "command": " ".join(["python", *sys.argv]),
            "commit": arguments.commit,
            "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "generator": Path(arguments.generator).name,
            "top_k": TOP_K,
            "domains": domains,
        },
    )
    print(json.dumps(domains, indent=1))


if __name__ == "__main__":
    main()
