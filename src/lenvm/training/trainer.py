"""Trajectories -> a value model: a subclass of transformers.Trainer; no logits, no padding.

With `trainable = "last"` the frozen layers are run once over the data and their output is kept, so
that every epoch costs the upper layers alone.
"""

import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lenvm import returns
from lenvm.data.dataset import IGNORED, PackedDataset, TokenStore, pack, plan_batches
from lenvm.data.images import read_with_images
from lenvm.errors import DataError, TrainingError
from lenvm.files import JsonlWriter, claim, read_json, write_json
from lenvm.model.device import has_fast_bf16, pick_device
from lenvm.model.head import DistributionHead
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.training.attention import use_packed_attention
from lenvm.training.config import TrainingConfig
from lenvm.training.metrics import token_errors
from lenvm.training.objective import sum_loss
from lenvm.training.vision import freeze_tower, prepare_images

Progress = Callable[[str, int, int], None]
"""(stage, done, total)."""


Datasets = dict[str, "torch.utils.data.Dataset[dict[str, Tensor]]"]


@dataclass(frozen=True)
class TrainingResult:
    """What a run did. num_tokens: of an epoch, prompts included; losses are means per state."""

    num_sequences: int
    num_tokens: int
    num_dropped: dict[str, int]
    tokens_per_s: float
    val_loss_first: float
    val_loss_last: float
    gamma: float
    seconds: float


def train(config: TrainingConfig, progress: Progress = lambda *_: None) -> TrainingResult:
    """Train, or continue a run that was killed; a finished one returns its result at once.

    Raises DataError (no usable sequence, another tokenizer), InputError (changed settings) and
    TrainingError (a loss that is not finite) before anything is lost.
    """
    output = Path(config.output)
    paths = [Path(p) for p in config.data]
    fingerprint = {str(p): p.stat().st_size if p.exists() else 0 for p in paths}
    claim(output, "value_model", {**config.model_dump(), "data_bytes": fingerprint})
    result_path = output.with_name(output.name + ".result.json")
    if result_path.exists():
        return TrainingResult(**read_json(result_path))
    stores = _load_stores(paths, config)
    device = pick_device()
    torch.manual_seed(config.seed)  # the fresh head
    model = _build_model(config, stores["train"]).to(device)
    _check_vocabulary(model, stores)
    add_images = None
    for store in stores.values():
        files = prepare_images(model, store.images, store.sequence, trainable=config.trainable)
        add_images = add_images or files
    use_packed_attention(model.backbone)
    trained = _prepare(model, config)
    datasets: Datasets = {
        name: PackedDataset(s, config.batch_tokens, seed=config.seed, add_images=add_images)
        for name, s in stores.items()
    }
    if config.trainable == "last":
        trained = _split_upper(model, config.last_layers)
        datasets = {
            name: _CachedDataset(
                PackedDataset(s, config.batch_tokens, seed=config.seed),
                _run_frozen(model, s, config, progress),
            )
            for name, s in stores.items()
        }
    with JsonlWriter(output.with_name(output.name + ".metrics.jsonl")) as writer:
        trainer = LenVMTrainer(trained, config, datasets, writer, progress)
        start = time.perf_counter()
        seconds = trainer.run()
        seconds = time.perf_counter() - start
    if config.trainable == "lora":
        model.config.base_model = config.backbone
    else:
        model.config.base_model = None
    _restore_attention(model)
    model.save_pretrained(output)
    num_tokens = int(stores["train"].lengths.sum())
    result = TrainingResult(
        num_sequences=len(stores["train"]),
        num_tokens=num_tokens,
        num_dropped=dict(stores["train"].dropped),
        tokens_per_s=num_tokens * config.epochs / seconds,
        val_loss_first=trainer.val_losses[0],
        val_loss_last=trainer.val_losses[-1],
        gamma=model.config.gamma,
        seconds=seconds,
    )
    write_json(result_path, result.__dict__)
    return result


class _Trained(nn.Module):
    """The value model as the Trainer sees it: without a `config` that it would write into."""

    accepts_loss_kwargs = True

    def __init__(self, value_model: LengthValueModel) -> None:
        super().__init__()
        self.value_model = value_model

    def forward(self, **inputs: Tensor) -> Tensor:
        raw: Tensor = self.value_model(**inputs)
        return raw

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.value_model.backbone.gradient_checkpointing_enable(**options)


class LenVMTrainer(Trainer):  # type: ignore[misc]
    """Sums the loss over states and divides by their number in the whole global batch."""

    def __init__(
        self,
        model: LengthValueModel,
        config: TrainingConfig,
        datasets: Datasets,
        writer: JsonlWriter,
        progress: Progress,
    ) -> None:
        steps = math.ceil(
            len(datasets["train"])  # type: ignore[arg-type]
            / config.accumulation
            * config.epochs
        )
        self.lenvm, self.writer, self.val_losses = config, writer, [math.nan]
        super().__init__(
            model=_Trained(model),
            args=_arguments(config, steps),
            train_dataset=datasets["train"],
            eval_dataset=datasets["validation"],
            data_collator=lambda items: items[0],
            callbacks=[_Progress(progress)],
        )
        self.remove_callback(PrinterCallback)

    def run(self) -> float:
        """Train to the end, from the last checkpoint where there is one; returns the seconds."""
        last = (
            get_last_checkpoint(self.args.output_dir)
            if Path(self.args.output_dir).is_dir()
            else None
        )
        start = time.perf_counter()
        if last is None:
            self.evaluate()
        else:
            self._read_val_losses()
        self.train(resume_from_checkpoint=last)
        self.evaluate()
        return time.perf_counter() - start

    def _get_train_sampler(self, *_: Any) -> "_RunSampler":
        return _RunSampler(len(self.train_dataset), self.lenvm.epochs, self.lenvm.seed)

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        """AdamW with the head's own learning rate."""
        if getattr(self, "optimizer", None) is None:
            head = {id(p) for p in self.lenvm_model.head.parameters()}
            live = [p for p in self.model.parameters() if p.requires_grad]
            rate = self.lenvm.learning_rate
            groups = [
                {"params": [p for p in live if id(p) not in head], "lr": rate},
                {
                    "params": [p for p in live if id(p) in head],
                    "lr": self.lenvm.head_learning_rate or rate,
                },
            ]
            self.optimizer = torch.optim.AdamW(
                [g for g in groups if g["params"]],
                betas=(0.9, 0.95),
                weight_decay=self.lenvm.weight_decay,
                fused=torch.cuda.is_available(),
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        raw, remaining, complete = self._states(model, inputs)
        loss = sum_loss(
            self.lenvm_model.head,
            raw,
            remaining,
            complete,
            self.lenvm_model.config.gamma,
            loss=self.lenvm.loss,
        )
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step}; lower learning_rate "
                f"(now {self.lenvm.learning_rate}) or check the data; the last checkpoint is kept"
            )
        count = num_items_in_batch if num_items_in_batch is not None else remaining.numel()
        scale = self.accelerator.num_processes if num_items_in_batch is not None else 1
        return loss * scale / count

    @property
    def lenvm_model(self) -> LengthValueModel:
        model: LengthValueModel = self.accelerator.unwrap_model(self.model).value_model
        return model

    def _states(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Raw outputs, remaining lengths and completeness of the states that count."""
        labels = inputs["labels"][0]
        names = ("labels", "shift_labels", "is_complete")
        raw = model(**{k: v for k, v in inputs.items() if k not in names})[0]
        counted = labels != IGNORED
        return raw[counted], labels[counted], inputs["is_complete"][0][counted]

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation loss per state and errors in tokens, over all ranks' shares."""
        model = self.lenvm_model
        was_training = self.model.training
        self.model.eval()
        rank, world = self.args.process_index, self.args.world_size
        total, lengths, truths = torch.zeros(2, dtype=torch.float64), [], []
        for index in range(rank, len(self.eval_dataset), world):
            inputs = self._prepare_inputs(dict(self.eval_dataset[index]))
            raw, remaining, complete = self._states(self.model, inputs)
            loss = sum_loss(
                model.head, raw, remaining, complete, model.config.gamma, loss=self.lenvm.loss
            )
            total += torch.tensor([loss.item(), remaining.numel()], dtype=torch.float64)
            lengths.append(model.belief(raw).length().cpu())
            truths.append(remaining.cpu())
        total = self.accelerator.reduce(total.to(self.args.device)).cpu()
        self.model.train(was_training)
        metrics = {"eval_loss": (total[0] / total[1]).item()}
        errors = token_errors(torch.cat(lengths), torch.cat(truths))
        metrics |= {f"eval_{name}": value for name, value in errors.items()}
        self.val_losses = [x for x in self.val_losses if not math.isnan(x)] + [metrics["eval_loss"]]
        self.log(metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            self.writer.write({"step": self.state.global_step, **logs})

    def _read_val_losses(self) -> None:
        rows = [json.loads(line) for line in self.writer.path.read_text().splitlines()]
        self.val_losses = [row["eval_loss"] for row in rows if "eval_loss" in row] or [math.nan]


class _RunSampler(torch.utils.data.Sampler[int]):
    """Order of the batches over the whole run, epoch after epoch: a pure function of the seed.

    The Trainer sees one epoch, so that a resumed run skips exactly what was done.
    """

    def __init__(self, size: int, epochs: float, seed: int) -> None:
        self.size, self.total, self.seed = size, math.ceil(size * epochs), seed

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.total, self.size):
            order = list(range(self.size))
            random.Random(f"{self.seed}/{start}").shuffle(order)
            yield from order[: self.total - start]

    def __len__(self) -> int:
        return self.total


class _Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress("train", state.global_step, state.max_steps)


class _CachedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed batches whose input is the frozen layers' output, [tokens of the store, H]."""

    def __init__(self, dataset: PackedDataset, hidden: Tensor) -> None:
        self.dataset, self.hidden = dataset, hidden
        self.store = dataset.store

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.dataset[index]
        del batch["input_ids"]
        offsets = self.store.offsets
        parts = [self.hidden[offsets[i] : offsets[i + 1]] for i in self.dataset.batches[index]]
        batch["inputs_embeds"] = torch.cat(parts).float().unsqueeze(0)
        return batch


def _arguments(config: TrainingConfig, steps: int) -> TrainingArguments:
    output = Path(config.output)
    every = max(1, steps // config.evals)
    return TrainingArguments(
        output_dir=str(output.with_name(output.name + ".state")),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_ratio * steps),
        max_grad_norm=1.0,
        bf16=has_fast_bf16(pick_device()),
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=max(1, steps // 50),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _load_stores(paths: list[Path], config: TrainingConfig) -> dict[str, TokenStore]:
    stores = {}
    for split in ("train", "validation"):
        rows = (t for t in read_with_images(*paths) if t.split == split)
        store = TokenStore.build(rows, max_tokens=config.max_tokens, censoring=config.censoring)
        if not len(store):
            raise DataError(
                f"no usable {split} sequence in {', '.join(config.data)}; dropped: "
                f"{dict(store.dropped) or 'none'}"
            )
        stores[split] = store
    return stores


def _check_vocabulary(model: LengthValueModel, stores: dict[str, TokenStore]) -> None:
    size = model.backbone.get_input_embeddings().num_embeddings
    for store in stores.values():
        if int(store.tokens.max()) >= size:
            raise DataError(
                f"the data holds token {int(store.tokens.max())}, the backbone's vocabulary has "
                f"{size}: the completions were sampled with another tokenizer"
            )


def _build_model(config: TrainingConfig, store: TokenStore) -> LengthValueModel:
    """The value model to train: of `init_from`, else the backbone with a fresh head."""
    if config.init_from is not None:
        return LengthValueModel.from_pretrained(config.init_from, dtype=torch.float32)
    gamma = config.gamma
    if gamma == "auto":
        gamma = returns.compute_gamma(store.completion_lengths.tolist())
    frozen_bf16 = config.trainable == "lora" and torch.cuda.is_available()  # adapters stay fp32
    model = LengthValueModel.build(
        config.backbone,
        LenVMConfig(gamma=gamma, head=config.head),
        dtype=torch.bfloat16 if frozen_bf16 else torch.float32,
    )
    _start_from_marginal(model, store)
    return model


def _start_from_marginal(model: LengthValueModel, store: TokenStore) -> None:
    """Let the fresh head say what is true on average, so that training starts from there."""
    answers = torch.from_numpy(store.completion_lengths)
    remaining = torch.cat([torch.arange(1, int(n) + 1) for n in answers])
    head = model.head
    with torch.no_grad():
        if isinstance(head, DistributionHead):
            counts = torch.bincount(head.bins.index(remaining), minlength=len(head.bins)) + 0.05
            head.summary.bias.copy_(counts.log() - counts.log().mean())
        else:
            u = -returns.length_to_value(remaining, model.config.gamma).mean()
            head.summary.bias.copy_(torch.logit(u))


def _prepare(model: LengthValueModel, config: TrainingConfig) -> LengthValueModel:
    """Freeze, or wrap with LoRA, as configured. A vision tower stays as it is by default."""
    excluded = freeze_tower(model.backbone, train_vision=config.train_vision)
    if config.trainable == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules="all-linear",
            exclude_modules=excluded,
        )
        model.backbone = get_peft_model(model.backbone, lora)
    elif config.trainable != "full":
        model.backbone.requires_grad_(False)
    return model


def _split_upper(model: LengthValueModel, last_layers: int) -> LengthValueModel:
    """A value model of the last layers and the head, sharing their parameters."""
    layers = model.backbone.layers
    if last_layers > len(layers):
        raise TrainingError(f"last_layers is {last_layers}; the backbone has {len(layers)} layers")
    backbone = copy.copy(model.backbone)
    backbone._modules = dict(model.backbone._modules)
    backbone.layers = layers[len(layers) - last_layers :]
    backbone.embed_tokens = nn.Identity()
    upper = copy.copy(model)
    upper._modules = {**model._modules, "backbone": backbone}
    for module in (backbone.layers, backbone.norm, model.head):
        module.requires_grad_(True)
    return upper


@torch.no_grad()
def _run_frozen(
    model: LengthValueModel, store: TokenStore, config: TrainingConfig, progress: Progress
) -> Tensor:
    """Output of the frozen layers for every token of the store: [tokens, H] bf16, on the CPU."""
    layers, norm = model.backbone.layers, model.backbone.norm
    model.backbone.layers = layers[: len(layers) - config.last_layers]
    model.backbone.norm = nn.Identity()
    batches = plan_batches(store.lengths.tolist(), config.batch_tokens, seed=0)
    hidden: Tensor | None = None
    try:
        for done, indices in enumerate(batches):
            batch = pack(store, indices)
            out = model.backbone(
                input_ids=batch["input_ids"].to(layers[0].mlp.down_proj.weight.device),
                position_ids=batch["position_ids"].to(layers[0].mlp.down_proj.weight.device),
                cu_seqlens=batch["cu_seqlens"],
                use_cache=False,
            ).last_hidden_state[0]
            if hidden is None:
                hidden = torch.empty(len(store.tokens), out.shape[-1], dtype=torch.bfloat16)
            for part, index in zip(
                out.split(store.lengths[indices].tolist()), indices, strict=True
            ):
                hidden[store.offsets[index] : store.offsets[index + 1]] = part.to(torch.bfloat16)
            progress("frozen layers", done + 1, len(batches))
    finally:
        model.backbone.layers, model.backbone.norm = layers, norm
    assert hidden is not None
    return hidden


def _restore_attention(model: LengthValueModel) -> None:
    for config in (model.backbone.config, model.backbone.config.get_text_config()):
        config._attn_implementation = "sdpa"
