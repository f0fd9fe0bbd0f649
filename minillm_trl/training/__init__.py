"""Everything around a training step: sampling within GRPO, exact resume, checkpoints, metrics, checks.

`MiniLLMTrainer` overrides methods of TRL. Its bases are in these modules, from the most derived class down to TRL's:

- `teacher_mixed_trainer`: sampling and scoring with a teacher; `rollout_in_progress`: the state of one rollout;
  `mixing_choice`: how it is sampled, as configured or measured
- `measured_rollouts`: advantages; with `measured_trainer` and `logged_metrics`: metrics over all completions
- `resumable_rollouts`: the rollout buffer, and resuming mid-buffer
- `reliable_trainer`, `checkpoints`, `random_state`, `interruption`: atomic checkpoints, exact resume, SIGTERM
- `resumed_settings`, `run_settings`, `hyperparameters`: resuming with changed settings
- `finite_steps`, `nonfinite_rows`: skipping steps and masking rows with a NaN or infinite number

Besides these: `config_checks` (fields, and those of GRPO that are refused), `checks` (other arguments),
`trained_weights` (refuses a dtype in which updates would be lost to rounding), `language_modeling` (the corpus of
L_PT), `ends_of_run` (the end tokens of a run), `evaluation_rows`, `metric_directions` and `metric_names` (for
`metric_for_best_model`), `model_card`, `run_record` (`run.json`), `trl_version`.
"""
