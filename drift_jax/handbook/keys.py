"""Every key that an alignment-handbook DPO file may hold, as tables.

The keys are the fields of alignment-handbook's arguments, of TRL's DPOConfig, ModelConfig and ScriptArguments, and of
transformers' TrainingArguments, old names included. Keys whose meaning depends on another key have a rule in
`rules.py` or `mixture.py`; all others are here:

    DIRECT        the value goes to keys of ours as it is
    CHOICES       the value is one of a few words, each with a value of ours
    ONLY          accepted with the values that change nothing; anything else is refused
    NOT_NULL      null means something that is not offered here; elsewhere null is the default
    IGNORED       does not change what a run computes here, with the reason
    STACKS        what an absent key meant, which depends on the versions the file was written for

Sources: alignment-handbook `src/alignment/configs.py` (its DPOConfig makes rmsprop the default optimizer until
2025-07), TRL `dpo_config.py` 0.9 to 1.16, transformers `training_args.py` 4.46 and 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# key -> another name of the same thing
ALIASES: Mapping[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",
    "dataset_config_name": "dataset_config",
}

DIRECT: Mapping[str, tuple[str, ...]] = {
    "model_name_or_path": ("model.path",),
    "model_revision": ("model.revision",),
    "output_dir": ("run_dir",),
    "beta": ("train.beta",),
    "label_smoothing": ("train.label_smoothing",),
    "learning_rate": ("train.learning_rate",),
    "weight_decay": ("train.weight_decay",),
    "adam_beta1": ("train.adam_beta1",),
    "adam_beta2": ("train.adam_beta2",),
    "adam_epsilon": ("train.adam_epsilon",),
    "max_length": ("data.max_length",),
    "max_prompt_length": ("data.max_prompt_length",),
    "num_train_epochs": ("train.epochs", "recipe.seed_epochs"),
    "wandb_project": ("tracking.project",),
}

_ADAMW = ("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_apex_fused")
_ADAMW_32BIT = ("adamw_bnb_32bit", "paged_adamw", "paged_adamw_32bit")

# key -> (our key, its value for each word)
CHOICES: Mapping[str, tuple[str, Mapping[Any, str]]] = {
    "bf16": ("model.compute_dtype", {True: "bfloat16", False: "float32"}),
    "gradient_checkpointing": ("model.remat", {True: "layer", False: "none"}),
    "optim": ("train.optimizer", {"rmsprop": "rmsprop"} | dict.fromkeys(_ADAMW + _ADAMW_32BIT, "adamw")),
    "lr_scheduler_type": (
        "train.schedule",
        {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"},
    ),
}

# key -> (accepted values, why others are refused and what to do); null is accepted as well
ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "fp16": ((False,), "float16 needs loss scaling, which is not offered; use bf16: true"),
    "bf16_full_eval": ((False,), "evaluation computes in the dtype of training"),
    "fp16_full_eval": ((False,), "evaluation computes in the dtype of training"),
    "use_peft": ((False,), "adapters are not offered: all weights are trained"),
    "load_in_8bit": ((False,), "quantised weights are not offered"),
    "load_in_4bit": ((False,), "quantised weights are not offered"),
    "reference_free": ((False,), "the reference is the model that a stage starts from"),
    "force_use_ref_model": ((False,), "it belongs to adapters, which are not offered"),
    "sync_ref_model": ((False,), "the reference stays as it is while a stage trains"),
    "ref_model_init_kwargs": (({},), "the reference is the model that a stage starts from"),
    "model_init_kwargs": (({},), "name what it holds with keys of their own (model_revision, bf16)"),
    "f_divergence_type": (("reverse_kl",), "other divergences are not offered"),
    "use_weighting": ((False,), "weighted DPO is not offered"),
    "ld_alpha": ((1.0,), "the length-desensitised loss is not offered"),
    "disable_dropout": ((True,), "there is no dropout here"),
    "is_encoder_decoder": ((False,), "only decoder models are trained"),
    "max_completion_length": ((), "completions are cut by max_length only"),
    "chat_template": ((), "the template is that of the model's tokenizer; put it into the model's directory"),
    "system_prompt": ((), "write the system message into the rows"),
    "auto_insert_empty_system_msg": (
        (True,),
        "leave it out, and choose with --set data.template (see `drift presets`)",
    ),
    "tools": ((), "tools are not rendered"),
    "dataset_streaming": ((False,), "pairs are shuffled as a whole"),
    "lr_scheduler_kwargs": (({},), "the schedules have no further parameters"),
    "optim_args": (("", {}), "the optimizers have no further parameters"),
    "optim_target_modules": (([],), "all weights get the same optimizer"),
    "adafactor": ((False,), "use optim: adamw_torch or rmsprop"),
    "label_smoothing_factor": ((0.0,), "it is for classifiers; DPO's is label_smoothing"),
    "neftune_noise_alpha": ((0.0,), "noise on embeddings is not offered"),
    "auto_find_batch_size": ((False,), "a batch that shrinks is another run; see `drift plan` for what fits"),
    "eval_delay": ((0,), "evaluation starts with the first interval"),
    "load_best_model_at_end": ((False,), "the last update is what a stage hands on"),
    "dataloader_drop_last": ((False,), "all pairs are used: the last batch of an epoch may be smaller"),
    "train_sampling_strategy": (("random",), "pairs come in random order"),
    "group_by_length": ((False,), "pairs come in random order"),
    "accelerator_config": (({},), "what it changes (splitting of batches, order) is not offered"),
    "split_batches": ((False,), "per_device_train_batch_size is that of one device"),
    "per_gpu_train_batch_size": ((), "use per_device_train_batch_size"),
    "per_gpu_eval_batch_size": ((), "use per_device_eval_batch_size"),
}

NOT_NULL: Mapping[str, str] = {
    "model_name_or_path": "there is no model to start from",
    "max_grad_norm": "gradients are always clipped; 1.0e+9 clips none",
}

_IGNORED = {
    "code of a model's repository is never executed here": "trust_remote_code model_code_revision",
    "master weights are float32 in any case, as DeepSpeed kept them; bf16 sets the dtype of the matmuls": "torch_dtype "
    "dtype",
    "every implementation computes the same attention": "attn_implementation use_flash_attention_2",
    "saves memory or time in torch; what is computed is the same": "gradient_checkpointing_kwargs use_cache "
    "activation_checkpointing_kwargs activation_offloading use_liger_kernel liger_kernel_config use_liger_loss "
    "padding_free pad_to_multiple_of use_logits_to_keep use_num_logits_to_keep torch_empty_cache_steps torch_compile "
    "torch_compile_backend torch_compile_mode torchdynamo jit_mode_eval use_ipex eval_accumulation_steps",
    "float32 matmuls have the precision that JAX gives them on the device": "tf32",
    "devices and how they share the work are set in section mesh": "deepspeed fsdp fsdp_config fsdp_min_num_params "
    "fsdp_transformer_layer_cls_to_wrap parallelism_config local_rank ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout sharded_ddp mp_parameters tpu_num_cores use_cpu "
    "no_cuda use_mps_device xpu_backend ray_scope dispatch_batches ignore_bias_buffers",
    "nothing is uploaded; `hf upload` takes the hf directory of a stage": "push_to_hub hub_model_id hub_strategy "
    "hub_token hub_private_repo hub_always_push hub_revision hub_model_revision push_to_hub_revision "
    "overwrite_hub_revision push_to_hub_model_id push_to_hub_organization push_to_hub_token",
    "changes what is printed, not what is computed": "log_level log_level_replica log_on_each_node disable_tqdm "
    "logging_first_step logging_nan_inf_filter include_num_input_tokens_seen include_tokens_per_second "
    "skip_memory_metrics debug tpu_metrics_debug",
    "metrics lie in metrics.jsonl of the stage; trackers name runs by its directory": "run_name logging_dir project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id wandb_entity wandb_run_group wandb_log_unique_prompts",
    "rows are read and tokenised before training, in one process": "preprocessing_num_workers dataset_num_proc "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns length_column_name label_names",
    "has no effect on the tokens of DPO in TRL either": "truncation_side text_column max_target_length",
    "padding is known by position, never by id": "padding_value label_pad_token_id pad_token",
    "log-probabilities of the reference are always computed before training": "precompute_ref_log_probs "
    "precompute_ref_batch_size precompute_ref_eval_batch_size",
    "a stage is resumed by running it again": "resume_from_checkpoint ignore_data_skip overwrite_output_dir "
    "restore_callback_states_from_checkpoint enable_jit_checkpoint save_only_model save_on_each_node save_safetensors",
    "train.nll_reduction says over which tokens the NLL is a mean": "average_tokens_across_devices",
    "the held-out pairs are scored after the last update in any case": "do_train do_predict prediction_loss_only "
    "eval_on_start eval_do_concat_batches eval_use_gather_object include_for_metrics include_inputs_for_metrics "
    "batch_eval_metrics generate_during_eval benchmarks callbacks",
    "runs are deterministic on the same devices": "full_determinism",
    "only for models with experts, which are not trained here": "router_aux_loss_coef",
    "read only with adapters or quantised weights, which are not offered": "lora_r lora_alpha lora_dropout "
    "lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora "
    "bnb_4bit_quant_type bnb_4bit_quant_storage use_bnb_nested_quant base_model_revision model_adapter_name "
    "ref_adapter_name base_model_attribute_name",
    "read only with another loss": "f_alpha_divergence_coef discopop_tau",
    "read only with sync_ref_model, which is not offered": "ref_model_mixup_alpha ref_model_sync_steps",
    "read only with load_best_model_at_end, which is not offered": "metric_for_best_model greater_is_better",
    "read only with fp16, which is not offered": "fp16_opt_level fp16_backend half_precision_backend",
    "no model of this family reads it": "past_index use_legacy_prediction_loop",
}
IGNORED: Mapping[str, str] = {key: reason for reason, keys in _IGNORED.items() for key in keys.split()}


@dataclass(frozen=True)
class Stack:
    """The versions a file was written for: what its keys mean, and what an absent one meant."""

    name: str
    preset: str
    truncation: Mapping[str, str]  # truncation_mode -> data.truncation
    defaults: Mapping[str, Any]  # handbook key -> value
    settings: Mapping[str, Any] = field(default_factory=dict)  # ours, where they differ from the preset's
    ignored: Mapping[str, str] = field(default_factory=dict)  # handbook key -> reason
    not_null: Mapping[str, str] = field(default_factory=dict)


_DEFAULTS: Mapping[str, Any] = {
    "model_revision": None,
    "beta": 0.1,
    "label_smoothing": 0.0,
    "rpo_alpha": None,
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 8,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "logging_steps": 500,
    "report_to": "none",
    "seed": 42,
    "loss_type": "sigmoid",
    "truncation_mode": "keep_end",
}
_LATER = {"bf16": True, "gradient_checkpointing": True, "logging_steps": 10, "max_length": 1024}
_NO_CUT = {"max_length": "leaving rows uncut is not offered; give the number of tokens of the longest row"}

STACKS: Mapping[str, Stack] = {
    "handbook": Stack(
        "alignment-handbook before 2025-07 with TRL <= 0.11",
        preset="paper",
        truncation={"keep_end": "trl<=0.11", "keep_start": "trl<=0.11 keep_start"},
        # TRL's own learning rate, 1e-6, came with 0.12; before, the Trainer's held.
        defaults={
            **_DEFAULTS,
            "learning_rate": 5e-5,
            "optim": "rmsprop",
            "max_length": 512,
            "max_prompt_length": 128,
        },
    ),
    # Rows go to TRL as messages: no handbook templating. Rows above max_length lose their start there, their end here.
    "handbook2": Stack(
        "alignment-handbook from 2025-07 with TRL 0.19 to 0.28",
        preset="paper",
        settings={"data.template": "reply_text"},
        truncation=dict.fromkeys(("keep_end", "keep_start"), "trl0.12"),
        defaults={**_DEFAULTS, **_LATER, "max_prompt_length": 512},
        not_null=_NO_CUT | {"max_prompt_length": "leaving prompts uncut is not offered; give a number of tokens"},
    ),
    "trl1": Stack(
        "TRL >= 0.29",
        preset="trl1",
        settings={"train.label_smoothing": 0.0},
        truncation={"keep_start": "keep_start"},
        defaults={**_DEFAULTS, **_LATER, "truncation_mode": "keep_start"},
        ignored={
            "max_prompt_length": "TRL 1.x has one cut, by max_length",
            "label_smoothing": "TRL 1.x does not read it for the sigmoid loss",
        },
        not_null=_NO_CUT,
    ),
}
