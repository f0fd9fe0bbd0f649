"""What surrounds a training step: sampling within GRPO, exact resume, checkpoints, metrics and refusals.

`MiniLLMTrainer` overrides TRL's methods; what they call is here, from the top:

- `teacher_mixed_trainer`: sampling and scoring with a teacher; `rollout_in_progress`: the state of one rollout
- `measured_rollouts`: advantages; with `measured_trainer`, `logged_metrics`: metrics over all completions
- `resumable_rollouts`: the rollout buffer, and resuming in the middle of it
- `reliable_trainer`, `checkpoints`, `random_state`, `interruption`: checkpoints that are whole, exact resume, SIGTERM
- `finite_steps`, `nonfinite_rows`: what is skipped or masked when a number is NaN or infinite

- `resumed_settings`, `run_settings`, `hyperparameters`: resuming with other settings than before

Next to them: `checks` (everything that is refused), `trained_weights` (weights that cannot move), `language_modeling`
(the corpus of L_PT), `ends_of_run` (the end tokens of a run), `evaluation_rows`, `metric_directions` and
`metric_names` (for `metric_for_best_model`), `model_card`, `run_record` (`run.json`), `trl_version`.
"""
