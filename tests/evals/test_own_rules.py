"""A rule of one's own, installed as docs/control.md says, in every place that takes one."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from lenvm.cli._engine_generator import EngineGenerator
from lenvm.cli._eval_options import parse_control_settings
from lenvm.engines.request import Request
from lenvm.engines.sampling import SamplingParams
from lenvm.errors import InputError
from lenvm.evals.arms import Arm, parse_arms
from lenvm.evals.generator import Sampling
from lenvm.evals.lifebench.arms import KINDS
from lenvm.evals.lifebench.run import LifebenchConfig, regrade_lifebench, run_lifebench
from lenvm.evals.tradeoff.arms import KINDS as TRADEOFF_KINDS
from lenvm.evals.tradeoff.run import TradeoffConfig, run_tradeoff
from lenvm.guidance.candidates import Candidates
from lenvm.guidance.params import Asked, RuleParams
from lenvm.guidance.request import LengthControl, installed_rules
from lenvm.guidance.rules import apply_rules, find_rule
from lenvm.model.head import ScalarBelief
from lenvm.returns import length_to_logit
from serving import tiny_engine

PAGE = Path(__file__).parents[2] / "docs" / "control.md"


def forget() -> None:
    installed_rules.cache_clear()
    find_rule.cache_clear()
    sys.modules.pop("my_rules", None)


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The package of the docs, as pip leaves it: a module and its metadata; and two broken ones."""
    section = PAGE.read_text().partition("## A rule of your own")[2].partition("\n## ")[0]
    project = tomllib.loads(section.partition("```toml\n")[2].partition("```")[0])["project"]
    code = section.partition("```python\n")[2].partition("```")[0]
    site = tmp_path / "site"
    about = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    (site / "my_rules.py").write_text(code)
    (about / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    entries = project["entry-points"]["lenvm.rules"] | {"nomod": "no_such_module:rule"}
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (about / "entry_points.txt").write_text("[lenvm.rules]\n" + lines)
    monkeypatch.syspath_prepend(str(site))
    forget()
    yield site
    monkeypatch.undo()
    forget()


def test_the_rule_of_the_docs_moves_answers_towards_its_goal(installed):
    """strict off: the rule alone decides; without strength it is the generator."""
    engine = tiny_engine()

    def lengths(rule: str, strength: float) -> list[int]:
        control = LengthControl.parse(
            {"equal_to": 12, "strict": False, "rule": rule, "strength": strength, "top_k": 64}
        )
        requests = [
            Request(str(i), (4, 7, 5), SamplingParams(seed=i, max_tokens=64), control)
            for i in range(8)
        ]
        done = sorted(engine.generate(requests), key=lambda c: int(c.request.id))
        assert [c.error for c in done] == [None] * 8
        return [len(c.token_ids) for c in done]

    free = lengths("mine", 0.0)
    assert lengths("soft", 0.0) == free
    assert lengths("mine", 10_000.0) != free


def test_the_rule_of_the_docs_is_its_formula(installed):
    """Candidates that leave 0, 10 and 40 tokens, a goal of 11 with the next one counted."""
    gamma = 0.98
    candidates = Candidates(
        ids=torch.tensor([[2, 5, 6]]),
        log_probs=torch.log(torch.tensor([[0.5, 0.3, 0.2]])),
        mask=torch.ones(1, 3, dtype=torch.bool),
        is_ending=torch.tensor([[True, False, False]]),
    )
    rest = torch.tensor([[1.0, 10.0, 40.0]])
    belief = ScalarBelief(length_to_logit(rest, gamma), gamma).with_terminal(candidates.is_ending)
    control = LengthControl.parse({"equal_to": 11, "rule": "mine", "strength": 50.0})
    params = RuleParams.build([Asked.read(control, has_distribution=False, gamma=gamma)], [0])
    u = 1 - gamma ** torch.tensor([[0.0, 10.0, 40.0]])
    expected = candidates.log_probs - 50 * (u - (1 - gamma**10)) ** 2
    found = find_rule("mine")(candidates, belief, params)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    guided = apply_rules(candidates, belief, params)
    assert guided.argmax() == 1  # the candidate that meets the goal
    assert (belief.value()[0, 1:] < 0).all()
    assert belief.value()[0, 1] > belief.value()[0, 2]  # more negative: longer


def test_an_arm_names_a_rule_of_ones_own_beside_ours(installed, tmp_path):
    row = {"category": "qa", "type": "t", "lang": "en", "raw_data": ""}
    task = "w7 w8 {word_count_type} {word_count} words"
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"id": i, "task": task, **row}) + "\n" for i in range(2)))
    names = ["prompt", "mine", "mine:50", "mine:50 tolerance=0.25", "expected", "soft:50"]
    config = LifebenchConfig(
        path,
        tuple(parse_arms(names, KINDS)),
        constraints=("equal_to", "at_most"),
        targets=(8,),
        max_tokens=24,
        sampling=Sampling(top_p=1.0, top_k=16, seed=0),
    )
    generator = EngineGenerator(tiny_engine(), "tiny")
    summary = run_lifebench(config, generator, tmp_path / "out")
    assert (summary["num_failed"], summary["notes"]) == (0, [])
    arms = {a["arm"]: a for a in summary["arms"]}
    assert list(arms) == names
    assert arms["mine:50"]["label"] == "own rule mine, strength 50"
    assert (arms["mine:50"]["family"], arms["mine:50"]["parameter"]) == ("mine", 50)
    assert arms["mine"]["equal_to"]["deviation"]["value"] == 0  # the promise is kept around it
    (installed / "my_rules.py").unlink()
    forget()
    assert regrade_lifebench(tmp_path / "out") == summary  # nor need it be there to grade again


def test_a_limit_of_the_trade_off_takes_any_rule(installed, tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "w7 w8", "answer": "2"}\n{"question": "w9", "answer": "3"}\n')
    names = ["prompt", "at_most:9", "at_most:9 rule=mine strength=50", "at_most:9 rule=hard"]
    names.append("at_most:9 evidence=5")
    arms = tuple(parse_arms(names, TRADEOFF_KINDS))
    config = TradeoffConfig(str(path), arms, num_samples=1, max_tokens=24)
    summary = run_tradeoff(config, EngineGenerator(tiny_engine(), "tiny"), tmp_path / "out")
    assert [a["arm"] for a in summary["arms"]] == names
    assert (summary["num_failed"], [a["skipped"] for a in summary["arms"]]) == (0, [None] * 5)
    assert Arm.read(names[2]) == arms[2]


@pytest.mark.parametrize(
    ("text", "kinds", "message"),
    [
        ("other", KINDS, "installed rules of your own .*mine, nomod; docs/control.md"),
        ("nomod", KINDS, "rule 'nomod' is installed .* cannot be loaded: ModuleNotFound.*repair"),
        ("soft rule=mine", KINDS, "'soft' is a rule itself; .* --arm mine"),
        ("mine:x", KINDS, "'x' is not a number"),
        ("mine rule=soft", KINDS, "no field=value"),
        ("mine:3 strength=4", KINDS, "no field=value"),
        ("mine evidence=4", KINDS, "no field=value"),
        ("mine:50", TRADEOFF_KINDS, "at_most:200 rule=mine"),
        ("at_most:9 rule=nomod", TRADEOFF_KINDS, "cannot be loaded"),
        ("at_most:9 rule=none such", TRADEOFF_KINDS, "no field=value"),
        ("at_most:9 rule=other", TRADEOFF_KINDS, "installed rules: mine, nomod"),
        ("tilt:9 rule=mine", TRADEOFF_KINDS, "no field=value"),
    ],
)
def test_what_is_no_arm_is_said(installed, text, kinds, message):
    with pytest.raises(InputError, match=message):
        Arm.parse(text, kinds)


def test_the_settings_of_all_arms_name_no_rule():
    with pytest.raises(InputError, match=r"an arm names its rule: --arm mine in lifebench"):
        parse_control_settings('{"rule": "mine"}')
