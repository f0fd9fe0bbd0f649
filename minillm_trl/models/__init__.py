"""Student and teacher: loading, checking and running them.

The body of a model and its LM head run separately: the body gives hidden states, and the head turns them into logits
for a chunk of tokens at a time, so that the logits of a whole batch never exist.

- `loading`, `init_kwargs`, `adapters`, `files`: from a folder or the hub to a model
- `pickled_weights`, `weight_formats`, `multimodal`: unsupported models; `bitsandbytes_layout`: 4-bit layers on CPUs
- `teacher`: loads, freezes, places and shards the teacher, and checks that it fits the student
- `shrink`: a student made from a teacher's layers; `layers` finds them, `layer_importance` ranks them
- `context`: the longest sequence that models take, and LongRoPE's limit
- `generation_config`: makes a model's generation config one that can be saved
- `encoding`, `end_tokens`: text to token ids, and what ends a completion; `token_bytes`: the bytes of each token
- `lm_head`: the head of any family, with its bias, scale and soft cap
- `fused_head`: log-probs, entropy and KL from hidden states, in chunks of `CHUNK_ELEMENTS`; `token_scores`: those of
  one chunk, with the gradient of the logits in closed form; `divergence_gradients`: the choices of the KL;
  `head_gradients`: from the gradient of a chunk's logits to those of hidden states and head
- `packed_weights`: products with oneDNN on x86 CPUs, and the layout of weights for them; `trained_products`: those of
  updates, with their gradients
- `student_copy`: the copy of the student that samples rollouts; `merged_adapters`: adapters merged into its weights
- `reference`: checks of the reference model of `beta`; `fingerprints`: digests of models and datasets
- `dropout`: switches off dropout that modules keep as a float instead of an `nn.Dropout`
- `forward_methods`, `activation_checkpointing`, `attention`: replaced `forward` methods, attention while decoding
"""
