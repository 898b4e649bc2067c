"""Where predictions come from: a value model in this process, or a server's value endpoints.

A `Predictor` reads token sequences and says what it believes at some of their positions. Beliefs
are plain numbers: `value` (V), `length` (the point prediction in tokens), and, where the head knows
them, `mean`, `geometric_mean` and `quantiles` ({"0.025": tokens, ...}).
"""

import asyncio
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lenvm.data.dataset import Sequences, TokenStore
from lenvm.errors import EndpointError, InputError
from lenvm.model.head import DistributionBelief
from lenvm.model.value_model import LengthValueModel

Belief = dict[str, Any]
NUMBERS = ("value", "length", "mean", "geometric_mean")
"""Of a belief, besides its quantiles."""
LEVELS = tuple(round(0.025 * i, 3) for i in range(1, 40))


class Predictor(Protocol):
    """What length-prediction asks of a value model."""

    @property
    def name(self) -> str: ...

    @property
    def gamma(self) -> float: ...

    @property
    def head(self) -> str: ...

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        images: Sequence[Sequence[str]],
    ) -> list[list[Belief]]:
        """Beliefs after the tokens at `positions` (indices into each sequence); images: the image
        files of each, whose placeholders must all be there."""
        ...


class ValueModelPredictor:
    """A `LengthValueModel` in this process. `name` is what results call it; levels: the quantiles
    that are told, none leaves out the mean too."""

    def __init__(
        self,
        model: LengthValueModel,
        name: str,
        *,
        batch_tokens: int = 8192,
        levels: Sequence[float] = LEVELS,
    ) -> None:
        self.model, self.name, self.batch_tokens, self.levels = model, name, batch_tokens, levels

    def check_files(self, files: Sequence[Path]) -> None:
        """DataError where trajectories were sampled with another tokenizer than the value model's,
        as training refuses them: their ids may well lie inside the vocabulary."""
        size = self.model.backbone.get_input_embeddings().num_embeddings
        for file in files:
            with _open_store(file) as store:
                every = Sequences.select([store], None, max_tokens=2**31, censoring="one_sided")
                every.check_vocabulary(size)
                if self.model.tokenizer is not None:
                    store.check_tokenizer(self.model.tokenizer, self.name)

    @property
    def gamma(self) -> float:
        return self.model.config.gamma

    @property
    def head(self) -> str:
        return self.model.config.head

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        images: Sequence[Sequence[str]] | None = None,
    ) -> list[list[Belief]]:
        import torch

        found = self.model.read(sequences, images=images, batch_tokens=self.batch_tokens)
        picked = [raw[list(p)] for raw, p in zip(found, positions, strict=True)]
        flat = self._beliefs(torch.cat(picked)) if picked else []
        ends = torch.tensor([len(p) for p in positions]).cumsum(0).tolist()
        return [flat[end - len(p) : end] for p, end in zip(positions, ends, strict=True)]

    def _beliefs(self, raw: Any) -> list[Belief]:
        """raw [N, D] -> N beliefs."""
        import torch

        belief = self.model.belief(raw)
        rows: list[Belief] = [
            {"value": v, "length": n}
            for v, n in zip(belief.value().tolist(), belief.length().tolist(), strict=True)
        ]
        if not belief.has_distribution or not self.levels:
            return rows
        assert isinstance(belief, DistributionBelief)
        means = torch.stack([belief.mean(), belief.geometric_mean()], -1).tolist()
        table = torch.stack([belief.quantile(q) for q in self.levels], -1).tolist()
        for row, (mean, geometric), quantiles in zip(rows, means, table, strict=True):
            row |= {"mean": mean, "geometric_mean": geometric}
            row["quantiles"] = {str(q): n for q, n in zip(self.levels, quantiles, strict=True)}
        return rows


@contextmanager
def _open_store(path: Path) -> Iterator[TokenStore]:
    """The tokens of a trajectory file, beside it as training leaves them; where that folder cannot
    be written to, for this time in another one."""
    if os.access(path.parent, os.W_OK):
        yield TokenStore.load(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / path.name
        link.symlink_to(path.resolve())
        yield dataclasses.replace(TokenStore.load(link), path=path)


class EndpointPredictor:
    """A server's `/v1/length/values`: `{"token_ids": [[...]], "positions": [[...]]}` ->
    `{"gamma", "head", "model", "values": [[{belief numbers}, ...], ...]}`."""

    def __init__(self, url: str, *, api_key: str = "none", timeout_s: float = 600.0) -> None:
        self.url, self._api_key, self._timeout_s = url.rstrip("/"), api_key, timeout_s
        about = self._post([[0]], [[0]])
        self.name, self.gamma, self.head = about["model"], float(about["gamma"]), about["head"]

    def read(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        images: Sequence[Sequence[str]] | None = None,
    ) -> list[list[Belief]]:
        if images is not None and any(images):
            raise InputError(
                "prompts with images are predicted in this process: --lenvm, not --endpoint"
            )
        reply = self._post([list(s) for s in sequences], [list(p) for p in positions])
        return [[to_belief(numbers) for numbers in row] for row in reply["values"]]

    def _post(self, token_ids: list[list[int]], positions: list[list[int]]) -> dict[str, Any]:
        body = {"token_ids": token_ids, "positions": positions}
        reply = asyncio.run(self._send(body))
        missing = [k for k in ("gamma", "head", "model", "values") if k not in reply]
        if missing or [len(r) for r in reply["values"]] != [len(p) for p in positions]:
            raise EndpointError(
                f"{self.url}/length/values gives no values for what was asked"
                + (f": {', '.join(missing)} missing" if missing else "")
            )
        return reply

    async def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        import openai

        from lenvm.evals.client import open_client

        async with open_client(self.url, self._api_key, self._timeout_s, 2) as client:
            try:
                return dict(await client.post("/length/values", body=body, cast_to=object))
            except openai.APIConnectionError as error:
                raise EndpointError(f"{self.url} does not answer: {error.__cause__}") from None
            except (openai.APIStatusError, ValueError, TypeError) as error:
                raise EndpointError(f"{self.url}/length/values failed: {error}") from None


def to_belief(numbers: dict[str, Any]) -> Belief:
    """Belief of a server's numbers: `p10`, `p50`, `p90` become quantiles."""
    belief: Belief = {k: numbers[k] for k in NUMBERS if k in numbers}
    quantiles = {
        str(int(k[1:]) / 100): v for k, v in numbers.items() if k[:1] == "p" and k[1:].isdigit()
    }
    quantiles |= numbers.get("quantiles", {})
    return belief | ({"quantiles": quantiles} if quantiles else {})
