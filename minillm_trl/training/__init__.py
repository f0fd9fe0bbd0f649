"""Everything around a training step: sampling within GRPO, exact resume, checkpoints, metrics, checks.

The trainers override methods of TRL and transformers: `MiniLLMTrainer` those of `GRPOTrainer`, `FineTuningTrainer`
those of `SFTTrainer`, and `reliable_trainer` once what both need. `teacher_mixed_trainer` samples with the teacher
that `teacher_setup` places, or finds on servers. An override calls the parts of its trainer, each an object in a
module of its own:

- `finite_steps`, `nonfinite_rows`: skip steps, and mask rows, with a NaN or infinite number
- `interruption`: SIGTERM
- `checkpoint_folder`, `checkpoints`: atomic checkpoints
- `exact_resume`, `random_state`: what transformers' checkpoints lack, saved and restored by the parts that have it
- `resumed_settings`, `run_settings`, `hyperparameters`: resuming with changed settings
- `run_metrics`, `logged_metrics`: means over all tokens and completions
- `rollout_scoring`, `rollout_rewards`: the training batch of a rollout, its rewards and advantages
- `overlapped_rollouts`, `turns`: the next rollout, sampled during updates; what fixes its samples
- `rollout_device`: the device on which a process samples them
- `rollout_buffer`, `prompt_order`: micro-batches of a rollout; the order of prompts
- `rollout_metrics`, `rollout_in_progress`: metrics of rollouts and updates; the state of one rollout
- `mixing_choice`: how the mixture is sampled, as configured or measured; `vllm_drafts`: with drafts of vLLM
- `teacher_choice`: the teacher that the user gives, or several by name, and the teacher of each row

Besides these: `config_checks` (fields, and those of GRPO that are refused), `family_checks` (of the family of
methods), `checks` (other arguments), `data_checks` (datasets), `given_completions` (of the dataset, for `lmbda`),
`trained_weights` (refuses a dtype in which updates would be lost to rounding), `language_modeling` (the corpus of
L_PT), `ends_of_run` (the end tokens of a run), `evaluation_rows`, `metric_directions` and `metric_names` (for
`metric_for_best_model`), `model_card`, `run_record` (`run.json`), `trl_version`.
"""
