"""Evaluate models: measures, sampling, benchmarks, a judge, and comparison reports.

What is measured, as functions of texts, numbers or models:

- `metrics`: Rouge-L, exact match, repetition and diversity of texts
- `statistics`: bootstrap intervals, sign-flip test, Holm's correction
- `calibration`: expected calibration error
- `divergence`, `exposure_bias`: KL divergence and loss per token, excess accumulated error
- `label_words`: probabilities of label words
- `frontier`: curves of a measure over entropy, and differences at equal entropy

`minillm-trl evaluate`, one model on one dataset:

- `tasks`: names of tasks to datasets; `decodings`: temperatures and greedy decoding to folders
- `evaluate`: [`evaluate_model`], settings to summary; `task_measures` samples and scores its prompts, `parts` stores
  finished parts so that an evaluation resumes
- `classify`: [`classify_model`], zero-shot classification

`minillm-trl benchmark` runs lm-eval: `general_benchmarks` finds and checks tasks, `lm_eval_results` runs them.

`minillm-trl judge` asks an LLM: `judge` (prompt, pairs, scores), `verdicts` (collects replies), `chat_client` (HTTP).

`minillm-trl compare`, from the result folders of several models to a report:

- `results`, `training_history`: read results and training logs; `comparable` checks that results can be compared
- `significance`: paired differences from a baseline
- `frontier_results`: chosen temperature, curves and differences of models evaluated at several temperatures
- `comparison`: assembles the report from `comparison_tables`, `frontier_tables`, `figures` and `answers`
- `report`, `plots`: tables, samples and plots as data; `report_files` writes HTML, Markdown and CSV
"""
