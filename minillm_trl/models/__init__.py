"""Student and teacher: loading, checking and running them.

- `loading`, `init_kwargs`, `adapters`, `files`: from a folder or the hub to a model
- `pickled_weights`, `weight_formats`, `multimodal`: models that are refused; `quantization`: 4-bit layers on a CPU
- `teacher`: loads, freezes, places and shards the teacher, and refuses one that does not fit the student
- `shrink`: a student made out of the teacher's layers
- `encoding`, `end_tokens`: text to token ids, and what ends a completion
- `lm_head`, `fused_head`: the head run apart from the body; log-probs, entropy and KL in chunks of tokens
- `student_copy`: the copy of the student that rollouts are sampled from
- `reference`: the student as it was at the start; `fingerprints`: digests of models and datasets
- `forward_methods`, `activation_checkpointing`, `attention`: replaced `forward` methods, attention kernels
"""
