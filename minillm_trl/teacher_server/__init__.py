"""A teacher that runs on servers, and not in the training processes.

A server returns, for each token of a completion, its log-prob, the teacher's k largest log-probs, and the log of the
probability of all other tokens. Rewards are exact. The single step treats all other tokens as one.

- `top_k`: these numbers, and the teacher's distribution completed from them: formulas only
- `protocol`: requests and answers between the trainer and `minillm-trl serve-teacher`
- `service`: what that server computes; `server`: its HTTP routes (aiohttp)
- `identity`: what a server says about its model and tokenizer, and the comparison with the student's
- `scoring_server`, `vllm_server`: the two kinds of server, as the trainer sees them
- `server_pool`: several servers share the rows of a rollout; retries
- `remote_teacher`: the teacher of `MiniLLMTrainer`
- `stored`: the same scores in a folder, for training without a teacher or a server
- `failed_rollout`: the checkpoint of a run whose servers fail
- `settings`, `addresses`: the checks of the fields `teacher_server_*`
"""
