"""The training loop: a subclass of transformers.Trainer, whose accelerate engine brings DDP, FSDP2
and DeepSpeed.

One item of the data set is a whole optimizer step, so the global mean is exact: the denominator is
known before the first micro batch, whatever the accumulation and the number of processes.
"""

import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available, is_wandb_available

from lenvm.data.dataset import Array
from lenvm.errors import DataError, InputError, TrainingError
from lenvm.files import JsonlWriter, explaining, write_text
from lenvm.model.value_model import LengthValueModel
from lenvm.training.config import TrainingConfig
from lenvm.training.evaluation import Evaluation
from lenvm.training.model import JOINED, LAYERS_A_PART, PackedModel, keep_whole
from lenvm.training.objective import Objective, States
from lenvm.training.steps import Packer, RunSteps, Step, count

Progress = Callable[[str, int, int], None]
"""(stage, done, total)."""
COMPLETE = "complete"
"""File that a whole checkpoint holds: it is written last."""
MODEL, OPTIMIZER, SCHEDULER = "model.safetensors", "optimizer.pt", "scheduler.pt"
"""Files of a checkpoint, as transformers names them."""


class LenVMTrainer(Trainer):  # type: ignore[misc]
    """Sums the loss over states and divides by their number in the whole global batch."""

    def __init__(
        self,
        model: LengthValueModel,
        config: TrainingConfig,
        args: TrainingArguments,
        objective: Objective,
        steps: RunSteps,
        packers: dict[str, Packer],
        validation: list[Array],
        progress: Progress,
    ) -> None:
        self.lenvm, self.objective = config, objective
        self.writer: JsonlWriter | None = None
        self.packers, self.validation = packers, validation
        self.val_losses: list[float] = []
        self.clock = Clock()
        self.seconds_before = 0.0
        """Of the run's earlier legs."""
        self._pending: deque[tuple[int, Tensor, Any]] = deque()
        super().__init__(
            model=PackedModel(model),
            args=args,
            train_dataset=steps,
            eval_dataset=[],
            callbacks=[_EveryStep(self, progress)],
        )
        self.remove_callback(PrinterCallback)
        if self.is_fsdp_enabled:
            # fp32 weights under autocast, as on one GPU. accelerate's policy would round the head,
            # its output and the reduced gradients to bf16
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self._is_whole = self._fits_whole()
        """ZeRO-3 keeps the weights whole on each process."""
        if self._is_whole:
            keep_whole(self.model, self.accelerator.state.deepspeed_plugin.deepspeed_config)

    # data

    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_size=1, shuffle=False, collate_fn=lambda items: items[0]
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Step], *_: Any) -> tuple[list[Step], None]:
        return [next(epoch_iterator)], None

    def floating_point_ops(self, inputs: Step) -> int:
        """Not counted here: benchmarks/training.py does."""
        return 0

    # a step

    def training_step(self, model: nn.Module, inputs: Step, *_: Any) -> Tensor:
        """All micro batches of an optimizer step; the loss as this process's share x processes."""
        model.train()
        scale = self.args.world_size / inputs.denominator  # gradients are averaged over processes
        total = torch.zeros((), device=self.args.device)
        if self._is_whole:
            self._step_whole(model, inputs, scale, total)
            return self._count(inputs, total)
        for number, rows in enumerate(inputs.micro_batches):
            is_last = number == len(inputs.micro_batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            if isinstance(model, FSDPModule) and not self._reshards:
                model.set_reshard_after_backward(is_last)
            with nullcontext() if is_last else self._unsynchronised(model):
                loss = self._sum(model, rows) * scale
                self.accelerator.backward(loss)
            total += loss.detach()
        return self._count(inputs, total)

    def _step_whole(self, engine: Any, inputs: Step, scale: float, total: Tensor) -> None:
        """DeepSpeed's, with gradients reduced once: they too stay whole during a step, and each
        part's is sent while the last micro batch's backward goes on to the parts before it."""
        optimizer = engine.optimizer
        with engine.coalesce_grad_reduction():
            for number, rows in enumerate(inputs.micro_batches):
                is_last = number == len(inputs.micro_batches) - 1
                # the hooks of DeepSpeed's parameters look at it; its own context would let them
                # reduce nothing before its end, which has no backward left to go on beside
                optimizer._coalesce_grad_reduction = not is_last
                engine.set_gradient_accumulation_boundary(is_last)
                loss = self._sum(engine, rows) * scale
                engine.backward(loss)  # accelerate's would take the optimizer's step
                total += loss.detach()
            # the part that still waits for a next one: the context's end takes it for not begun
            optimizer.overlapping_partition_gradients_reduce_epilogue()
        engine.set_gradient_accumulation_boundary(True)
        engine.step()

    def _count(self, inputs: Step, loss: Tensor) -> Tensor:
        self._watch(loss)
        self.clock.tokens += inputs.num_tokens
        return loss

    def _sum(self, model: nn.Module, rows: Array) -> Tensor:
        batch = self.packers["train"](rows)
        with self.accelerator.autocast():
            raw = model(batch)
        value_model = self.value_model
        loss = self.objective.sum(value_model.head, raw, States.of(batch), value_model.config.gamma)
        return loss if batch.counts else loss * 0.0

    def _unsynchronised(self, model: nn.Module) -> AbstractContextManager[None]:
        if self.is_deepspeed_enabled:  # its engine is told by the accelerator
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(model=model)
        return context

    def _fits_whole(self) -> bool:
        """Whether ZeRO-3 may hold all weights at once, by `stage3_max_live_parameters` and where
        none are offloaded, and the model lets them be joined: a vision tower asks its parameters
        for their type."""
        if not self.is_deepspeed_enabled or self.value_model.images is not None:
            return False
        plugin = self.accelerator.state.deepspeed_plugin
        zero = plugin.deepspeed_config["zero_optimization"]
        most = float(zero.get("stage3_max_live_parameters", 1e9))  # DeepSpeed's default
        is_offloaded = (zero.get("offload_param") or {}).get("device", "none") != "none"
        size = sum(p.numel() for p in self.model.parameters())
        return bool(plugin.zero_stage == 3 and size <= most and not is_offloaded)

    @property
    def _reshards(self) -> bool:
        """Whether FSDP2 frees weights after each use, not only at the end of a step."""
        return bool(self.accelerator.state.fsdp_plugin.reshard_after_forward)

    def _watch(self, loss: Tensor) -> None:
        """Remember a loss, and look at those two steps old (at the first one at once): the device
        is never waited for."""
        event = None
        if loss.is_cuda:
            loss = torch.empty((), pin_memory=True).copy_(loss, non_blocking=True)
            event = torch.Event("cuda")
            event.record()
        self._pending.append((self.state.global_step, loss, event))
        self.check_pending(keep=2 if event is not None and self.clock.tokens else 0)

    def check_pending(self, keep: int = 0) -> None:
        """TrainingError where one of the losses, but for the last `keep`, is not finite."""
        while len(self._pending) > keep:
            step, loss, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {step}; lower learning_rate (now "
                    f"{self.lenvm.learning_rate}) or check the data; the last checkpoint is kept"
                )

    @property
    def value_model(self) -> LengthValueModel:
        model: LengthValueModel = self.accelerator.unwrap_model(self.model).value_model
        return model

    # optimizer

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        """AdamW with the head's own learning rate."""
        if getattr(self, "optimizer", None) is None:
            live = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            rate = self.lenvm.learning_rate
            of_head = ("value_model.head.", f"{JOINED}head")
            head = [p for n, p in live if n.startswith(of_head)]
            rest = [p for n, p in live if not n.startswith(of_head)]
            groups = [
                {"params": rest, "lr": rate},
                {"params": head, "lr": self.lenvm.head_learning_rate or rate},
            ]
            self.optimizer = torch.optim.AdamW(
                [g for g in groups if g["params"]],
                betas=(0.9, 0.95),
                weight_decay=self.lenvm.weight_decay,
                fused=torch.cuda.is_available(),
            )
        return self.optimizer

    # evaluation

    @torch.no_grad()
    def evaluate(self, *_: Any, of_step: int | None = None, **__: Any) -> dict[str, Any]:
        """Metrics of the validation split, the same on every process. of_step: whose weights they
        are, where not the last step's."""
        self.check_pending()
        began = time.perf_counter()
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        model = self.model_wrapped if sharded else self.model
        value_model, packer = self.value_model, self.packers["validation"]
        gamma = value_model.config.gamma
        scores = Evaluation(packer.sequences, gamma, self.args.device)
        objective = replace(self.objective, prompt_weight=1)  # comparable among runs
        was_training = model.training
        model.eval()
        for rows in self.validation:
            batch = packer(rows)
            with self.accelerator.autocast():
                raw = model(batch)
            states = States.of(batch)
            loss = objective.sum(value_model.head, raw, states, gamma)
            weight = count(objective, packer.sequences, rows)
            scores.add(batch, states, value_model.belief(raw), loss, weight)
        model.train(was_training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a checkpoint is not read into gathered weights
        metrics = scores.metrics(lambda flat: self.accelerator.reduce(flat, "sum"))
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        if not math.isfinite(metrics["eval_loss"]):
            raise TrainingError(
                f"the validation loss is {metrics['eval_loss']} at step {self.state.global_step}; "
                "check the data and the weights that training starts from"
            )
        self.val_losses.append(metrics["eval_loss"])
        seconds = time.perf_counter() - began
        self.clock.other += seconds
        about = {} if of_step is None else {"of_step": of_step}
        self.log({**metrics, "eval_seconds": seconds, **about})
        self.control.should_evaluate = False  # else the end of the epoch evaluates once more
        return metrics

    def seconds(self) -> float:
        """Of the whole run: earlier legs up to the checkpoint that this one goes on from."""
        return self.seconds_before + self.clock.seconds()

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "train_runtime" in logs:
            # transformers' summary: it takes a step for a sample, and the last leg for the run
            logs = {"train_seconds": self.seconds(), "tokens_per_s": self.clock.tokens_per_s()}
        if "loss" in logs:
            logs = {**logs, "tokens_per_s": self.clock.tokens_per_s()}
        numbers = {k: v for k, v in logs.items() if not isinstance(v, list)}  # what trackers take
        super().log(numbers, *args, **kwargs)
        if self.writer is not None:
            self.writer.write({"step": self.state.global_step, **logs})

    # checkpoints: whole tensors under the parameters' names, so that one process, DDP and FSDP2 go
    # on from each other's. DeepSpeed's engine has its own

    @property
    def layout(self) -> str:
        """What may go on from a checkpoint of this run."""
        if not self.is_deepspeed_enabled:
            return "any but DeepSpeed"
        stage = self.accelerator.state.deepspeed_plugin.zero_stage
        parts = f", joined in parts of {LAYERS_A_PART} layers" if self._is_whole else ""
        return f"DeepSpeed ZeRO-{stage} on {self.args.world_size} processes{parts}"

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[no-any-return]
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model_wrapped, self._plain_optimizer, options=options)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[no-any-return]
        state = torch.load(Path(checkpoint, OPTIMIZER), weights_only=True) if self._reads else {}
        set_optimizer_state_dict(
            self.model_wrapped, self._plain_optimizer, state, options=self._from_first
        )
        self.lr_scheduler.load_state_dict(
            torch.load(Path(checkpoint, SCHEDULER), weights_only=True)
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        state = load_file(Path(resume_from_checkpoint, MODEL)) if self._reads else {}
        set_model_state_dict(model or self.model, state, options=self._from_first)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_best_model()  # type: ignore[no-any-return]
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    @property
    def _reads(self) -> bool:
        """Whether this process reads a checkpoint; the others get it from process 0."""
        return bool(self.args.process_index == 0)

    @property
    def _from_first(self) -> StateDictOptions:
        return StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.args.world_size > 1)

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper, whose `step` may do nothing."""
        optimizer: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_pending()
        began = time.perf_counter()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with explaining(folder):
                super()._save_checkpoint(model, trial)
        except DataError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            last = folder / f"checkpoint-{self.state.global_step}"
            about = {
                "step": self.state.global_step,
                "layout": self.layout,
                "seconds": self.seconds(),
            }
            write_text(last / COMPLETE, json.dumps(about))
            keep = {last, Path(self.state.best_model_checkpoint or last)}
            for old in folder.glob("checkpoint-*"):
                if old not in keep:
                    shutil.rmtree(old)
        self.clock.other += time.perf_counter() - began


def find_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint; one that a kill left unfinished is not one."""
    found = [p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


@dataclass
class Clock:
    """Tokens over the time of training steps alone; the first one, which compiles, left out."""

    tokens: int = 0
    other: float = 0.0
    """Seconds of evaluations and checkpoints."""
    first: tuple[int, float] | None = None
    """Tokens and time when the first step ended."""
    began: float = field(default_factory=time.perf_counter)

    def end_first(self) -> None:
        self.first = self.tokens, time.perf_counter() - self.other

    def seconds(self) -> float:
        """Since the start, all in all."""
        return time.perf_counter() - self.began

    def tokens_per_s(self) -> float:
        now = time.perf_counter() - self.other
        if self.first is not None and self.tokens > self.first[0]:
            return (self.tokens - self.first[0]) / (now - self.first[1])
        return self.tokens / (now - self.began)


class _EveryStep(TrainerCallback):  # type: ignore[misc]
    """Progress, and an evaluation after the last step."""

    def __init__(self, trainer: LenVMTrainer, progress: Progress) -> None:
        self.trainer, self.progress = trainer, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.clock = Clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.clock.first is None:
            self.trainer.check_pending()
            self.trainer.clock.end_first()
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        self.progress("train", state.global_step, state.max_steps)


def find_trackers() -> list[str]:
    """Where metrics go besides the metrics file: TensorBoard where it is installed (its events lie
    with the run's states), W&B where it is installed and was told of: else it would ask."""
    found = []
    if is_tensorboard_available():
        found.append("tensorboard")
    if is_wandb_available() and any(os.environ.get(n) for n in ("WANDB_API_KEY", "WANDB_MODE")):
        found.append("wandb")
    return found


def build_arguments(config: TrainingConfig, use_bf16: bool) -> TrainingArguments:
    """transformers' settings; `plan_evaluations` completes them once the steps are known."""
    output = Path(config.output)
    use_cpu = not torch.cuda.is_available()
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed and config.precision in ("fp16", "fp32"):
        raise InputError(
            f"precision is {config.precision!r}; under DeepSpeed it is `torch_autocast` in its "
            "JSON file (bf16 in configs/zero*.json): change it there and use 'auto' here"
        )
    best = None if config.best_metric is None else f"eval_{config.best_metric}"
    return TrainingArguments(
        output_dir=str(output.with_name(output.name + ".state")),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        max_grad_norm=config.max_grad_norm,
        bf16=use_bf16
        and not deepspeed,  # its engine autocasts: `torch_autocast` in configs/zero*.json
        fp16=config.precision == "fp16",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        save_strategy="steps",
        metric_for_best_model=best,
        greater_is_better=None if best is None else False,
        load_best_model_at_end=best is not None,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and distributed else None,
        ddp_find_unused_parameters=False,
        report_to=find_trackers() or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def plan_evaluations(args: TrainingArguments, config: TrainingConfig, num_steps: int) -> None:
    """Set what depends on the number of steps."""
    args.warmup_steps = round(config.warmup_ratio * num_steps)
    args.logging_steps = max(1, num_steps // 50)
    args.eval_steps = args.save_steps = max(1, num_steps // config.evals)
