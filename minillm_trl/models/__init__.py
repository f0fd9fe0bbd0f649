"""Student and teacher: loading, checking and running them.

- `loading`, `init_kwargs`, `adapters`, `files`: from a folder or the hub to a model
- `pickled_weights`, `weight_formats`, `multimodal`: unsupported models; `quantization`: 4-bit layers on CPUs
- `teacher`: loads, freezes, places and shards the teacher, and checks that it fits the student
- `shrink`: a student made from a teacher's layers
- `context`: the longest sequence that models take, and LongRoPE's limit
- `encoding`, `end_tokens`: text to token ids, and what ends a completion
- `lm_head`, `fused_head`, `token_scores`: the LM head, run separately from the body; log-probs, entropy and KL in
  chunks of tokens, with closed-form gradients
- `student_copy`: the copy of the student that samples rollouts
- `reference`: checks of the reference model of `beta`; `fingerprints`: digests of models and datasets
- `dropout`: dropout that modules keep as plain numbers
- `forward_methods`, `activation_checkpointing`, `attention`: replaced `forward` methods, attention kernels
"""
