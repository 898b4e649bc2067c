"""Length control inside stock `model.generate()`, of any Hugging Face decoder.

    from lenvm.engines.generate import length_control

    control = length_control(value_model, {"equal_to": 128})
    output = model.generate(**inputs, do_sample=True, max_new_tokens=200, custom_generate=control)

generate()'s own sampling loop runs, with its arguments (temperature, top_k, top_p, min_p,
penalties, stopping criteria, streamer, num_return_sequences, ...). Rows may each have a control or
none; rows without one get the very tokens that they would get alone. `LengthLogitsProcessor` is
the same as a logits processor, for loops of one's own.

Shape legend: B rows of the batch, R guided ones among them, T tokens so far, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from lenvm.errors import InputError
from lenvm.guidance.candidates import write_back
from lenvm.guidance.request import LengthControl
from lenvm.guidance.session import GuidanceSession, Guided
from lenvm.model.value_model import LengthValueModel

Control = LengthControl | Mapping[str, Any] | str | None
Controls = Control | Sequence[Control]

REPRODUCED = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper")
"""Truncations that candidates are chosen with."""
UNKNOWN = tuple(f"{name}LogitsWarper" for name in ("Typical", "Epsilon", "Eta", "TopH"))
"""Truncations that candidates know nothing of."""


class LengthLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Writes guided log-probabilities into the scores of rows with a control.

    Put it last among the processors, before temperature and truncation: it is told those of the
    loop, chooses candidates with them, and undoes the temperature that the loop applies afterwards.
    One object serves one batch from its first step to its last.
    """

    def __init__(
        self,
        value_model: LengthValueModel,
        controls: Controls,
        *,
        eos_token_ids: Sequence[int],
        max_length: int,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        warpers: LogitsProcessorList | None = None,
    ) -> None:
        """controls: one for all rows, or one for each prompt (None: leave the row alone).

        attention_mask [B, T] tells the prompts' padding. max_length: most tokens of a row, prompt
        included. warpers: temperature and truncation that the loop will not apply itself; they are
        applied here to rows without control.
        """
        self.value_model, self.attention_mask, self.warpers = value_model, attention_mask, warpers
        self.eos_token_ids, self.max_length = tuple(eos_token_ids), max_length
        several = isinstance(controls, Sequence) and not isinstance(controls, str)
        self.controls = [_parse(c) for c in controls] if several else [_parse(controls)]  # type: ignore[union-attr, arg-type]
        self._truncation: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        }
        self.session: GuidanceSession | None = None
        self._rows: dict[int, str] = {}
        self._num_seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, T], scores [B, V] -> scores [B, V]."""
        if self.session is None:
            self.session = self._start(input_ids)
        elif input_ids.shape[1] == self._num_seen + 1:
            self._advance(input_ids[:, -1])
        else:
            raise InputError(
                f"length control follows one batch token by token; got {input_ids.shape[1]} tokens "
                f"after {self._num_seen}; make a new one for every generate()"
            )
        self._num_seen = input_ids.shape[1]
        out = scores.clone() if self.warpers is None else self.warpers(input_ids, scores.clone())
        if not self._rows:
            return out
        rows = torch.tensor(list(self._rows), device=scores.device)
        ids = list(self._rows.values())
        candidates = self.session.step(ids, scores[rows])
        if self.warpers is None:
            self.session.write_back(ids, candidates, out, rows)
        else:
            write_back(candidates, out, rows_R=rows, temperature_R=torch.ones_like(scores[rows, 0]))
        return out

    def remaining(self) -> dict[int, float]:
        """Predicted tokens still to come of each guided row that runs."""
        if self.session is None or not self._rows:
            return {}
        return dict(zip(self._rows, self.session.remaining(list(self._rows.values())), strict=True))

    def _start(self, input_ids: Tensor) -> GuidanceSession:
        num_rows = len(input_ids)
        if num_rows % len(self.controls):
            raise InputError(
                f"{len(self.controls)} controls for {num_rows} rows; give one, or one a prompt"
            )
        each = num_rows // len(self.controls)
        controls = [control for control in self.controls for _ in range(each)]
        mask = torch.ones_like(input_ids) if self.attention_mask is None else self.attention_mask
        if mask.shape[0] not in (num_rows, num_rows // each):
            raise InputError(f"attention_mask has {mask.shape[0]} rows for {num_rows} sequences")
        mask = mask.repeat_interleave(num_rows // mask.shape[0], 0).bool()
        guided = {
            f"row {i}": Guided(
                prompt_token_ids=tuple(input_ids[i][mask[i]].tolist()),
                control=control,
                **self._truncation,
            )
            for i, control in enumerate(controls)
            if control is not None
        }
        widest = max((c.top_k for c in controls if c is not None), default=1)
        session = GuidanceSession.build(
            self.value_model,
            eos_token_ids=self.eos_token_ids,
            count_candidates=True,
            max_requests=max(1, num_rows),
            max_tokens=max(1, num_rows) * (self.max_length + 1),
            max_candidates=max(16, widest),
        )
        if guided:
            session.add(guided)
        self._rows = {int(name.split()[1]): name for name in guided}
        return session

    def _advance(self, tokens_B: Tensor) -> None:
        assert self.session is not None
        drawn = tokens_B.tolist()
        ended = [row for row in self._rows if drawn[row] in self.eos_token_ids]
        if ended:
            self.session.remove([self._rows.pop(row) for row in ended])
        if self._rows:
            self.session.commit(list(self._rows.values()), [drawn[row] for row in self._rows])


def length_control(value_model: LengthValueModel, controls: Controls) -> Callable[..., Any]:
    """What to give to generate() as `custom_generate`. controls: one, or one for each prompt.

    InputError for a bad control, and when run with beams, an assistant, or a truncation (typical_p,
    epsilon, eta, top_h) that the candidates cannot follow.
    """
    if isinstance(controls, Sequence) and not isinstance(controls, str):
        controls = [_parse(control) for control in controls]
    else:
        controls = _parse(controls)  # type: ignore[arg-type]

    def guided_sample(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        mode = str(generation_config.get_generation_mode().value)
        if mode not in {"sample", "greedy_search"}:
            raise InputError(f"length control goes with sampling and greedy search, not {mode}")
        names = [type(processor).__name__ for processor in logits_processor]
        if strange := [name for name in names if name in UNKNOWN]:
            raise InputError(f"length control does not go with {', '.join(strange)}")
        pairs = list(zip(names, logits_processor, strict=True))
        before = LogitsProcessorList(p for name, p in pairs if name not in REPRODUCED)
        warpers = LogitsProcessorList(p for name, p in pairs if name in REPRODUCED)
        eos = generation_config._eos_token_tensor
        before.append(
            LengthLogitsProcessor(
                value_model,
                controls,
                eos_token_ids=[] if eos is None else eos.tolist(),
                max_length=int(generation_config.max_length),
                attention_mask=model_kwargs.get("attention_mask"),
                warpers=warpers,
                **_truncation_of(warpers, bool(generation_config.do_sample)),
            )
        )
        return model._sample(
            input_ids,
            logits_processor=before,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )

    return guided_sample


def _truncation_of(warpers: LogitsProcessorList, do_sample: bool) -> dict[str, Any]:
    found: dict[str, Any] = {} if do_sample else {"temperature": 0.0}
    for warper in warpers:
        if isinstance(warper, logits_process.TemperatureLogitsWarper):
            found["temperature"] = float(warper.temperature)
        elif isinstance(warper, logits_process.TopKLogitsWarper):
            found["top_k"] = int(warper.top_k)
        elif isinstance(warper, logits_process.TopPLogitsWarper):
            found["top_p"] = float(warper.top_p)
        elif isinstance(warper, logits_process.MinPLogitsWarper):
            found["min_p"] = float(warper.min_p)
    return found


def _parse(control: Control) -> LengthControl | None:
    if control is None:
        return None
    return LengthControl.parse(dict(control) if isinstance(control, Mapping) else control)
