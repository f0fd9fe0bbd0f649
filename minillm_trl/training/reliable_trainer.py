"""`ReliableTrainer`: the overrides of transformers' `Trainer` that all trainers of this package need."""

import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from ..hardware.processes import check_processes
from ..models.activation_checkpointing import ignore_old_names
from ..models.generation_config import SaveableOnTrainBegin
from ..models.trained_products import use_onednn_products
from .checkpoint_folder import CheckpointFolder
from .checkpoints import STATE, UNFINISHED, record_files, replace_folder
from .evaluation_rows import FilledDataset
from .exact_resume import EpochOrder, ExactResume, LoopState, RestoreOnTrainBegin
from .finite_steps import StepGuard
from .interruption import SafeStop
from .resumed_settings import ResumedSettings, describe_inputs
from .run_metrics import RunMetrics


class ReliableTrainer(Trainer):
    """Add reliable runs and exact metrics to a trainer of TRL. List it before TRL's trainer in the bases.

    `GRPOTrainer` and `SFTTrainer` need the same overrides of the same base class, so these are here once. Each only
    calls the parts of the trainer, which hold all state:

    - `guard` ([`StepGuard`]) skips an optimizer step with a NaN or infinite number on any process, on all of them.
    - `stop` ([`SafeStop`]) saves a checkpoint after SIGTERM, and ends the process.
    - `checkpoints` ([`CheckpointFolder`]) writes them atomically and detects damage.
    - `resume` ([`ExactResume`]) saves and restores what transformers' checkpoints lack. A run that was stopped at any
      moment and resumed has the same weights and logged values as an uninterrupted run.
    - `settings` ([`ResumedSettings`]) lets changed settings take effect in a resumed run, and lists them.
    - `means` ([`RunMetrics`]) averages metrics over all tokens and completions.

    A process that does not know about the other processes of its launch is rejected, see [`check_processes`].
    """

    # transformers declares these as optional or more general; its constructor, and training, set them to these types
    args: Any  # with `max_nonfinite_steps`
    model: PreTrainedModel
    optimizer: AcceleratedOptimizer
    _metrics: dict[str, defaultdict[str, list[float]]]  # TRL's, by mode and name

    def __init__(self, *args: Any, **kwargs: Any):
        check_processes()
        ignore_old_names()
        super().__init__(*args, **kwargs)
        use_onednn_products(self.model)
        self.guard = StepGuard(self.accelerator, self.args)
        self.stop = SafeStop()
        self.checkpoints = CheckpointFolder(self.accelerator, self.args)
        self.settings = ResumedSettings(self.accelerator, self.args)
        self.means = RunMetrics(self.accelerator)
        self._epochs = EpochOrder()
        self._loop = LoopState(self, self.stop)
        self.resume = ExactResume(self.args, [self._epochs, self._loop, self.means, self.guard])

    @property
    def mode(self) -> str:
        """Return "train" or "eval", TRL's name for what the model is used for."""
        return "train" if self.model.training else "eval"

    @property
    def _deepspeed_engine(self) -> Any:
        return self.model_wrapped if self.is_deepspeed_enabled else None

    # Runs

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as transformers does. `True` resumes from the newest whole checkpoint, or starts if there is none.

        Raises:
            CheckpointError: if `output_dir` is not writable, or a checkpoint is damaged or cannot be written.
            UserError: if the checkpoint's optimizer or schedule is of another class, or the student's generation
                config cannot be saved.
            FloatingPointError: after `max_nonfinite_steps` skipped steps in a row.
            Terminated: after SIGTERM.
        """
        # transformers: fails without a checkpoint to resume from, does not notice damage, evaluates a start again
        checkpoint = self.checkpoints.find(resume_from_checkpoint)
        sharded = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None
        self.settings.compare(checkpoint, describe_inputs(self), sharded)
        self.resume.begin(checkpoint)
        restore = RestoreOnTrainBegin(self.resume, self._loop, self.settings, self.callback_handler)
        added = [restore, SaveableOnTrainBegin(), self.stop]
        for callback in added:
            self.add_callback(callback)
        eval_on_start = self.args.eval_on_start
        self.args.eval_on_start = eval_on_start and checkpoint is None
        try:
            with self.stop.listening():
                return super().train(checkpoint, *args, **kwargs)
        finally:
            for callback in added:
                self.remove_callback(callback)
            self.args.eval_on_start = eval_on_start

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the schedule, and store the hyperparameters before a checkpoint overrides them."""
        # transformers: calls this once the optimizer is final, then loads a checkpoint's optimizer and schedule
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if hasattr(self.optimizer, "param_groups"):  # DeepSpeed creates its optimizer later and calls this again
            self.settings.note_hyperparameters(self.optimizer, scheduler)
        return scheduler

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # transformers: also warns about tied weights, of which a checkpoint holds only one name
        names = defaultdict(set)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].add(name)
        missing = set(load_result.missing_keys)
        loaded = {name for tied in names.values() if not tied <= missing for name in tied}
        keys = [name for name in load_result.missing_keys if name not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=keys))

    def _run_epoch(self, **arguments: Any) -> None:  # type: ignore[override]  # transformers calls it by keywords
        # transformers: trains on in a run that had ended, and draws the order of a resumed epoch again
        if self.control.should_training_stop:
            return
        checkpoint, epoch = arguments["resume_from_checkpoint"], arguments["epoch"]
        resumes = checkpoint is not None and epoch == arguments["epochs_trained"]
        within = resumes and arguments["steps_trained_in_current_epoch"] > 0
        if resumes and not within:
            self._load_rng_state(checkpoint)
        self._epochs.begin(arguments["train_dataloader"], epoch, within=within)
        super()._run_epoch(**arguments)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # transformers: returns the norm after the backward passes of a step, before the optimizer's step
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.stop.agreed = self.guard.agree_on_step(
            norm, self.state.global_step, self.model, self.optimizer, self._deepspeed_engine, self.stop.requested
        )
        return norm

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        # transformers: returns the run's folder, to which it writes a checkpoint
        unfinished = self.checkpoints.unfinished
        return super()._get_output_dir(trial) if unfinished is None else str(unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # transformers: uploads in the background, so it has to wait for the final name
        if self.checkpoints.unfinished is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any, run_state: dict[str, Any] | None = None) -> None:
        # transformers: writes a checkpoint file by file, uploads it, and deletes old ones
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with self.checkpoints.replacing(run, name) as folder:
            super()._save_checkpoint(model, trial)
            self.resume.write(folder, run_state)
            self.accelerator.wait_for_everyone()
            self._set_best_checkpoint(run, name)
            if self.args.should_save:
                self.state.save_to_json(str(folder / STATE))
                self.settings.write(folder, self.optimizer, self.lr_scheduler)
                record_files(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)

    def _set_best_checkpoint(self, run: Path, name: str) -> None:
        """Set the final path of the best checkpoint, for which transformers has the unfinished folder."""
        best = f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == name or (run / best).is_dir()):
            self.state.best_model_checkpoint = str(run / best)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model as transformers does, and with an adapter the generation config, which has the end tokens."""
        # transformers: leaves the generation config to PEFT, which does not save it
        super().save_model(output_dir, *args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and isinstance(model, PeftModel) and folder.is_dir():
            model.generation_config.save_pretrained(folder)

    def save_whole_model(self) -> None:
        """Save the model to `output_dir`, every file atomically."""
        target = Path(self.args.output_dir)
        self.save_model(str(target / UNFINISHED))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in sorted((target / UNFINISHED).iterdir()):
                if path.is_dir():  # such as the folder of a tokenizer's further chat templates
                    replace_folder(path, target / path.name)
                else:
                    os.replace(path, target / path.name)
            shutil.rmtree(target / UNFINISHED)

    # Metrics

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as transformers does, but average the loss over all tokens (or sequences), not over batches."""
        # transformers: averages the losses of batches, and counts fillers as rows
        self.means.begin_evaluation()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if (loss := self.means.eval_loss()) is not None:
            assert output.metrics is not None  # a dict since transformers made it
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        if isinstance(dataloader.dataset, FilledDataset):
            output = output._replace(num_samples=len(dataloader.dataset.rows))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with our metrics, the number of skipped steps, and the name of the dataset of an evaluation."""
        # TRL: adds the means of its metrics, in an evaluation with the prefix `eval_` alone
        for name, value in self.means.take(self.mode):
            self._metrics[self.mode][name].append(value)
        loss = next((key for key in logs if key.startswith("eval_") and key.endswith("_loss")), "eval_loss")
        dataset = loss.removeprefix("eval_").removesuffix("loss")  # "" for a single dataset
        metrics = self._metrics["eval"]
        for key in list(metrics) if dataset else ():
            metrics[dataset + key] = metrics.pop(key)
        if "loss" in logs:
            logs = {**logs, "nonfinite_steps": float(self.guard.skipped)}
        super().log(logs, start_time)
