"""What is foretold from prompts alone: the belief at their end, and `shortest` as a limit.

The scorer's own model foretells; where that is a guide, the predictor does, in a forward of its own
that is paid only where somebody asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lenvm.guidance.params import Guided
from lenvm.guidance.scoring import Predictor, Scorer
from lenvm.model.head import LengthBelief

Place = tuple[LengthBelief, int]
"""A belief over several requests, and one's row in it."""


@dataclass(frozen=True)
class PromptReader:
    """`predictor` None: the scorer's own model foretells."""

    scorer: Scorer
    predictor: Predictor | None = None

    def read(self, requests: Mapping[str, Guided]) -> dict[str, Place]:
        """The belief at the end of each prompt, whatever was generated since. A predictor reads
        all in one call, each once; the scorer one by one, for which it has room."""
        reader = self.predictor or self.scorer
        prompts = {
            r: prefix_of(replace(guided, generated_token_ids=()), reader)
            for r, guided in requests.items()
        }
        if self.predictor is None:
            return {r: (self._probe(prompt), 0) for r, prompt in prompts.items()}
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts.values()))}
        belief = self.predictor.read_ends(list(rows))
        return {r: (belief, rows[prompt]) for r, prompt in prompts.items()}

    def _probe(self, prompt: tuple[int, ...]) -> LengthBelief:
        probe = "\0prompt"  # no request's id
        belief = self.scorer.add({probe: list(prompt)})
        self.scorer.remove([probe])
        return belief

    def resolve(
        self, requests: Mapping[str, Guided], here: Mapping[str, Place]
    ) -> tuple[dict[str, Guided], dict[str, Place]]:
        """`shortest` as a limit, from the length predicted at the prompt's end; and what was read.

        here: the scorer's belief where each request stands. A resumed one stands further on, so
        that its prompt is read again.
        """
        asking = {r: g for r, g in requests.items() if asks_prediction(g)}
        again = {
            r: guided
            for r, guided in asking.items()
            if self.predictor is not None or guided.generated_token_ids
        }
        read = self.read(again) if again else {}
        resolved = dict(requests)
        quantiles: dict[tuple[int, float], list[float]] = {}
        for request_id, guided in asking.items():
            belief, row = read.get(request_id) or here[request_id]
            control = guided.control
            assert control is not None
            assert control.shortest is not None
            key = id(belief), control.shortest
            if key not in quantiles:
                quantiles[key] = belief.quantile(control.shortest).tolist()
            limited = control.resolve(quantiles[key][row])
            resolved[request_id] = replace(guided, control=limited)
        return resolved, read


def asks_prediction(guided: Guided) -> bool:
    """Its control is a share of the predicted length."""
    return guided.control is not None and guided.control.shortest is not None


def prefix_of(guided: Guided, reader: Predictor | Scorer) -> tuple[int, ...]:
    """What a value model reads of a request: its control, maybe, and its tokens."""
    control = guided.control
    asked = None if control is None else control.model_dump(exclude_defaults=True)
    before = reader.encode_control(asked)
    return (*before, *guided.prompt_token_ids, *guided.generated_token_ids)
