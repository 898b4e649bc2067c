"""Trajectories -> a value model: `train`, from a configuration to a checkpoint.

Started again, it continues; finished, it returns its result; with other settings or data, it
refuses. Under torchrun or `accelerate launch` every process calls it.
"""

import atexit
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from lenvm import returns
from lenvm.data.dataset import SPLITS, ControlPrefix, Sequences, Split, TokenStore, mixing_weights
from lenvm.data.packing import BatchPlan, Hidden
from lenvm.data.stats import describe_truncated
from lenvm.errors import DataError, DataWarning, InputError
from lenvm.files import JsonlWriter, claiming, read_json, read_jsonl, write_json, write_text
from lenvm.model.bundled import resolve_model
from lenvm.model.config import CONFIG_FILE, LenVMConfig
from lenvm.model.device import has_fast_bf16, pick_device
from lenvm.model.head import DistributionHead
from lenvm.model.loading import split_name
from lenvm.model.tokenization import encode_control, hash_tokenizer, load_tokenizer
from lenvm.model.value_model import LengthValueModel
from lenvm.training.attention import restore_attention
from lenvm.training.config import TrainingConfig
from lenvm.training.evaluation import name_metrics
from lenvm.training.frozen import run_frozen, split_upper
from lenvm.training.loop import (
    COMPLETE,
    LenVMTrainer,
    Progress,
    build_arguments,
    find_checkpoint,
    plan_evaluations,
)
from lenvm.training.model import (
    add_adapter,
    choose_parameters,
    compile_layers,
    train_adapter,
    use_liger,
)
from lenvm.training.steps import Packer, RunSteps, plan_evaluation
from lenvm.training.vision import freeze_tower, prepare_images

ADAPTERS = ("lora", "dora")


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
    """Of all legs of a run that was killed and continued, each up to its last checkpoint."""
    num_endless: int = 0
    """Sequences taught as answers that never end (`loops_above`, `rewards_below`)."""


@dataclass(frozen=True)
class Splits:
    """The sequences of the run, and how often an epoch sees each file."""

    train: Sequences
    validation: Sequences
    weights: Any


def leave_group() -> None:
    """End the processes' connection after the last training, and this process where it is one of
    several: threads of torch that outlive Python abort it now and then on its way out ("terminate
    called without an active exception"), and the launcher calls the finished training failed."""
    state = PartialState()
    state.destroy_process_group()
    if state.num_processes > 1:
        atexit._run_exitfuncs()  # trackers finish their runs there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def train(config: TrainingConfig, progress: Progress = lambda *_: None) -> TrainingResult:
    """Train, or continue a run that was killed; a finished one returns its result at once.

    Raises DataError (no usable sequence, another tokenizer), InputError (changed settings) and
    TrainingError (a loss that is not finite) before anything is lost; a run that fails before its
    first checkpoint leaves `output` free for other settings. Warns (DataWarning) of truncated,
    repeated and misspelt completions.
    """
    prefix = _control_prefix(config)
    stores = [TokenStore.load(Path(p), prefix) for p in config.data]
    args = build_arguments(config, _use_bf16(config))
    is_first = args.process_index == 0
    output = Path(config.output)
    settings = {**config.model_dump(), "data_sha256": [s.sha256 for s in stores]}
    result_path = output.with_name(output.name + ".result.json")
    with ExitStack() as claimed:
        with args.main_process_first(desc="claim"):
            has_begun = functools.partial(find_checkpoint, Path(args.output_dir))
            claimed.enter_context(claiming(output, "value_model", settings, has_begun))
        if result_path.exists():
            return TrainingResult(**read_json(result_path))
        result = _train(config, stores, args, progress)
        if is_first:
            write_json(result_path, asdict(result))
        PartialState().wait_for_everyone()
        return result


def _train(
    config: TrainingConfig, stores: list[TokenStore], args: TrainingArguments, progress: Progress
) -> TrainingResult:
    splits = _select(stores, config)
    _check_best_metric(config, splits.validation)
    objective = config.objective(int(splits.train.lengths.max()))
    if config.init_from is None:
        objective.check(config.head)
    torch.manual_seed(config.seed)  # the fresh head
    model = _build_model(config, splits.train, args).to(args.device)
    objective.check(model.config.head)
    for sequences in (splits.train, splits.validation):
        sequences.check_vocabulary(model.backbone.get_input_embeddings().num_embeddings)
    with warnings.catch_warnings():
        if args.process_index:  # one process tells
            warnings.simplefilter("ignore", DataWarning)
        _warn(config, splits.train)
        for store in stores:
            if model.tokenizer is not None:
                store.check_tokenizer(model.tokenizer, model.config.generator or config.backbone)
            store.warn_of_repeated()
    images = [
        prepare_images(model, s, trainable=config.trainable, share_prompts=config.share_prompts)
        for s in (splits.train, splits.validation)
    ]
    add_images = images[0] or images[1]
    trained, hidden = _prepare(model, config, splits, args, progress)
    steps = RunSteps(_plan(splits, config, args), objective, config.epochs, args.process_index)
    plan_evaluations(args, config, len(steps))
    packers = {
        name: Packer(
            sequences,
            args.device,
            share_prompts=config.share_prompts and name == "train",
            hidden=hidden.get(name),
            add_images=add_images,
        )
        for name, sequences in (("train", splits.train), ("validation", splits.validation))
    }
    shares = plan_evaluation(splits.validation, config.batch_tokens, args.world_size)
    trainer = LenVMTrainer(
        trained, config, args, objective, steps, packers, shares[args.process_index], progress
    )
    try:
        seconds = _run(trainer, config)
    finally:
        if trainer.writer is not None:
            trainer.writer.close()
    result = TrainingResult(
        num_sequences=len(splits.train),
        num_tokens=int(splits.train.totals.sum()),
        num_dropped=dict(splits.train.dropped),
        tokens_per_s=trainer.clock.tokens_per_s(),
        val_loss_first=trainer.val_losses[0],
        val_loss_last=trainer.val_losses[-1],
        gamma=model.config.gamma,
        seconds=seconds,
        num_endless=int(splits.train.is_endless.sum()),
    )
    _save(trainer, model, config)
    return result


def _run(trainer: LenVMTrainer, config: TrainingConfig) -> float:
    """Train to the end, from the last checkpoint where there is one; returns the seconds."""
    last = find_checkpoint(Path(trainer.args.output_dir))
    if last is not None:
        _check_layout(Path(last), trainer)
    trainer.args.eval_on_start = last is None
    _forget_after(trainer, last)
    if last is not None:
        trainer.seconds_before = read_json(Path(last) / COMPLETE).get("seconds", 0.0)
    trainer.train(resume_from_checkpoint=last)
    best = trainer.state.best_model_checkpoint
    if config.best_metric is not None and best is not None:
        step = int(best.rpartition("-")[2])
        if step != trainer.state.global_step:
            trainer.evaluate(of_step=step)  # the best one's weights are back
    return trainer.seconds()


def _check_layout(checkpoint: Path, trainer: LenVMTrainer) -> None:
    """InputError where another layout wrote the checkpoint in a form that this one cannot read."""
    written = read_json(checkpoint / COMPLETE).get("layout")
    if written != trainer.layout:
        raise InputError(
            f"{checkpoint} is of a run on {written}, and this one is on {trainer.layout}; launch "
            f"it as before, or remove {checkpoint.parent} to begin anew"
        )


def _forget_after(trainer: LenVMTrainer, checkpoint: str | None) -> None:
    """Cut what the metrics file holds beyond the checkpoint, and recall the validation losses."""
    path = _metrics_path(Path(trainer.lenvm.output))
    step = -1 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    rows = [row for _, row in read_jsonl(path)] if path.exists() else []
    kept = [row for row in rows if row["step"] <= step]
    trainer.val_losses = [row["eval_loss"] for row in kept if "eval_loss" in row]
    trainer.accelerator.wait_for_everyone()  # all have read it
    if trainer.args.process_index == 0:
        if len(kept) < len(rows):
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        trainer.writer = JsonlWriter(path)


def _metrics_path(output: Path) -> Path:
    return output.with_name(output.name + ".metrics.jsonl")


def _use_bf16(config: TrainingConfig) -> bool:
    device = pick_device()
    if config.precision == "fp16" and device == "cpu":
        raise InputError("precision is 'fp16', which needs a GPU; use 'auto', 'bf16' or 'fp32'")
    return config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))


def _select(stores: list[TokenStore], config: TrainingConfig) -> Splits:
    splits: dict[Split, Sequences] = {}
    names: tuple[Split, ...] = ("train", "validation")
    for name in names:
        sampling = (
            {"max_prompts": config.max_prompts, "max_per_prompt": config.max_per_prompt}
            if name == "train"
            else {}
        )
        found = Sequences.select(
            stores,
            name,
            max_tokens=config.max_tokens,
            censoring=config.censoring,
            loops_above=config.loops_above,
            rewards_below=config.rewards_below,
            seed=config.seed,
            **sampling,
        )
        if not len(found):
            raise DataError(_describe_empty(name, found, stores))
        if found.is_endless.all():
            raise DataError(
                f"with {config.endless} every {name} sequence counts as one that never ends, and "
                "no length is left to learn: raise loops_above, or lower rewards_below"
            )
        splits[name] = found
    weights = mixing_weights(config.weights, stores) if config.weights else None
    return Splits(splits["train"], splits["validation"], weights)


def _describe_empty(split: Split, found: Sequences, stores: list[TokenStore]) -> str:
    """Why a split has nothing to train or validate on, and what to do."""
    counts = {
        s: sum(int((t.index["split"] == i).sum()) for t in stores) for i, s in enumerate(SPLITS)
    }
    files = ", ".join(str(store.path) for store in stores)
    there = ", ".join(f"{n} of split {s}" for s, n in counts.items() if n)
    told = f"no usable {split} sequence in {files}: there are {there}"
    if counts[split]:
        dropped = ", ".join(f"{n} {why}" for why, n in found.dropped.items())
        return f"{told}; dropped of {split}: {dropped}. See censoring, max_tokens and max_prompts"
    return (
        f"{told}. Training needs `train` and `validation`: sample more prompts (a prompt's split "
        "is drawn by its hash, 80/10/10, where its row names none), or write "
        f'"split": "{split}" into the lines of some of the prompts'
    )


def _check_best_metric(config: TrainingConfig, validation: Sequences) -> None:
    names = name_metrics(validation)
    if config.best_metric is not None and config.best_metric not in names:
        raise InputError(
            f"best_metric is {config.best_metric!r}; allowed in this run: {', '.join(names)}"
        )


def _warn(config: TrainingConfig, train: Sequences) -> None:
    """DataWarning where truncated completions were left out, or a file was given twice."""
    cut = train.dropped["truncated"]
    names = ", ".join(config.data)
    if message := describe_truncated(f"{names}, split train", cut, cut + len(train)):
        warnings.warn(message, DataWarning, stacklevel=2)
    hashes = [store.sha256 for store in train.stores]
    twice = [str(s.path) for i, s in enumerate(train.stores) if s.sha256 in hashes[:i]]
    if twice:
        warnings.warn(
            f"{', '.join(twice)}: the same content as another file of the run, so that each "
            "completion trains twice; give a file once, and `weights` to see it more often",
            DataWarning,
            stacklevel=2,
        )


def _plan(splits: Splits, config: TrainingConfig, args: TrainingArguments) -> BatchPlan:
    return BatchPlan(
        splits.train,
        config.batch_tokens,
        step_sequences=config.batch_sequences,
        step_tokens=config.batch_tokens * config.accumulation,
        world_size=args.world_size,
        seed=config.seed,
        grouped=config.grouped or config.share_prompts,
        share_prompts=config.share_prompts,
        weights=splits.weights,
    )


def _control_prefix(config: TrainingConfig) -> ControlPrefix | None:
    """How guided completions are marked, where they are; a model to go on from decides itself."""
    wanted, source = config.control_input, config.backbone
    if config.init_from is not None:
        source = str(split_name(config.init_from)[0])
        own = Path(source) / CONFIG_FILE
        wanted = own.exists() and read_json(own).get("control_input", False)
    if not wanted:
        return None
    tokenizer = load_tokenizer(resolve_model(source))
    name = f"control-{hash_tokenizer(tokenizer)[:8]}"
    return ControlPrefix(name, functools.partial(encode_control, tokenizer))


def _build_model(
    config: TrainingConfig, sequences: Sequences, args: TrainingArguments
) -> LengthValueModel:
    """The value model to train: of `init_from`, else the backbone with a fresh head."""
    if args.deepspeed_plugin is not None:
        # whole on each process until the Trainer shares it out: built in parts, the head would
        # start from other random numbers than elsewhere
        unset_hf_deepspeed_config()
    # a frozen base needs no fp32 weights; adapters and head have them
    low = config.trainable in ADAPTERS and _use_bf16(config) and args.device.type == "cuda"
    dtype = torch.bfloat16 if low else torch.float32
    if config.init_from is not None:
        goes_on = config.trainable in ADAPTERS
        model = LengthValueModel.from_pretrained(
            config.init_from, dtype=dtype, merge_adapter=not goes_on
        )
        if goes_on and not (split_name(config.init_from)[0] / "adapter_config.json").exists():
            raise InputError(
                f"trainable is {config.trainable!r}, but {config.init_from} has no adapter to go "
                "on with; use trainable = 'full', 'last' or 'head'"
            )
        if config.endless and not model.config.loops:
            raise InputError(
                f"training with {config.endless}, but {config.init_from} was trained without: "
                "its head knows no answers that never end; train on a backbone"
            )
        model.set_guide(None)  # it does not learn along
        return model.train()
    gamma = config.gamma
    if gamma == "auto":
        gamma = returns.compute_gamma(sequences.lengths.tolist())
    model = LengthValueModel.build(
        config.backbone,
        LenVMConfig(
            gamma=gamma,
            head=config.head,
            target=config.target,
            control_input=config.control_input,
            num_layers=config.num_layers,
            loops=bool(config.endless),
        ),
        dtype=dtype,
    )
    start_from_marginal(model, sequences.lengths[~sequences.is_endless])
    return model.train()


def start_from_marginal(model: LengthValueModel, lengths: np.ndarray[Any, Any]) -> None:
    """Let a fresh head say what is true on average, so that training starts from there."""
    times = torch.bincount(torch.from_numpy(np.asarray(lengths)))
    at_least = times.flip(0).cumsum(0).flip(0)  # states with n tokens left
    remaining = torch.arange(1, len(at_least))
    weight = at_least[1:].double()
    head = model.head
    with torch.no_grad():
        if isinstance(head, DistributionHead):
            index = head.bins.index(remaining)
            counts = torch.full((len(head.bins),), 0.05, dtype=torch.float64)
            counts.index_add_(0, index, weight)
            head.summary.bias.copy_(counts.log() - counts.log().mean())
        else:
            u = -returns.length_to_value(remaining, model.config.gamma).double()
            head.summary.bias.copy_(torch.logit((u * weight).sum() / weight.sum()))


def _prepare(
    model: LengthValueModel,
    config: TrainingConfig,
    splits: Splits,
    args: TrainingArguments,
    progress: Progress,
) -> tuple[LengthValueModel, dict[str, Hidden]]:
    """What the Trainer gets (the whole model, or its upper layers), and kept hidden states."""
    if config.liger:
        use_liger(model.backbone)
    left_out = freeze_tower(model.backbone, train_vision=config.train_vision)
    if config.trainable in ADAPTERS:
        if config.init_from is None:
            alpha = config.lora_alpha or 2 * config.lora_rank
            dora = config.trainable == "dora"
            add_adapter(
                model, config.lora_rank, alpha, config.lora_dropout, dora=dora, left_out=left_out
            )
        train_adapter(model)
        model.to(args.device)
    else:
        choose_parameters(model, config.trainable, config.last_layers)
    trained, hidden = model, {}
    cached = config.cache_frozen if config.cache_frozen is not None else args.world_size == 1
    if config.trainable == "last" and cached and not config.share_prompts:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=_use_bf16(config)):
            for name, sequences in (("train", splits.train), ("validation", splits.validation)):
                hidden[name] = run_frozen(
                    model,
                    sequences,
                    config.last_layers,
                    config.batch_tokens,
                    _stage(progress, "frozen layers"),
                )
        trained = split_upper(model, config.last_layers)
    if config.compile:
        compile_layers(trained.backbone)
    return trained, hidden


def _stage(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _save(trainer: LenVMTrainer, model: LengthValueModel, config: TrainingConfig) -> None:
    """Write the checkpoint; where the weights are spread over processes, they are gathered."""
    if config.trainable not in ADAPTERS:
        model.config.base_model = None
    elif config.init_from is None:
        model.config.base_model = config.backbone
    restore_attention(model.backbone)
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # process 0 gets it
        named = trainer.model.part_weights(whole) if whole else {}
        state = {k.removeprefix("value_model."): v for k, v in named.items()}
    if trainer.args.process_index == 0:
        model.save_pretrained(Path(config.output), state_dict=state)
    trainer.accelerator.wait_for_everyone()
