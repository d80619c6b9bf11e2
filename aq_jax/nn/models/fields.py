"""Fields of config.json that every family has: names of activations, and what changes no number."""

# Hugging Face's names of activations, and ours.
ACTS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_new"}
ACTS |= {"gelu_pytorch_tanh": "gelu_new"}
# How to generate with a model, in folders that have no generation_config.json.
GENERATION = (
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
# Fields that change no hidden state and no logit: how a model was trained and saved, and how to generate with it.
# A family that needs one of them, as scorers need pad_token_id, reads it itself.
IDLE = (
    "model_type", "architectures", "auto_map", "_name_or_path", "name_or_path", "transformers_version", "dtype",
    "torch_dtype", "torchscript", "initializer_range", "use_cache", "attention_dropout", "gradient_checkpointing",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
    "decoder_start_token_id", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params",
    "output_attentions", "output_hidden_states", "return_dict", "tokenizer_class", "chunk_size_feed_forward",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "cache_implementation",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "sentence_transformers",
    "sbert_ce_default_activation_function",
    "quantization_config", *GENERATION,
)  # fmt: skip
