"""Sampling completions, and the buffer that holds them.

A coin is tossed before each token, so that only the model that draws it runs. Sampling computes the hidden states that
predict each token, and the scores come from these states without another forward pass.

- `sampling`: from the student or the teacher-student mixture, in batches by length
- `keyed_random`: random numbers as functions of seed, step and row
- `slots`: rows that decode together, their columns and KV caches; `slot_sampling`: the loop that refills them
- `coins`: which model draws a token; `speculative`: the student drafts, the teacher corrects; `draws`: inverse CDFs
- `engine_drafts`: an inference engine drafts, and both models correct
- `decoding`: several tokens at a time; `ngram_block`: no repeated n-grams
- `compiled_steps`: a step as one graph; `compiled_sampling`: the loop that runs a batch in them
- `rollout_sampler`: prompts and keys in, completions with their scores out
- `teacher_replacement`: SKD, in which the teacher replaces improbable tokens of the student
- `spans`, `cross_tokenizer`: a teacher with another tokenizer, by aligned spans of text
- `rollout_teacher`: the teacher's hidden states; `several_teachers`: those of each row's own teacher
- `scores`: log-probs and expected rewards of a rollout under both models
- `buffer`: the rows of a rollout, and how they are dealt to optimizer steps
- `prompts`: completions of one model for a list of prompts, as evaluation and SeqKD need them
- `logits_processor`: teacher-mixed sampling within `generate` of transformers
"""
