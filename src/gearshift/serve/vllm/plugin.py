"""What vLLM is told when it loads this plugin: the model's class, its settings, its kinds of cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from gearshift.errors import GearshiftError
from gearshift.placement import Placement
from gearshift.presets import read_presets
from gearshift.serve.vllm.geometry import CacheTypes, check_servable, default_block_tokens, held_mixers
from gearshift.serve.vllm.http import offer_presets
from gearshift.serve.vllm.options import Options
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.mixer_configs import AttentionConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

ARCHITECTURE = "SupernetForCausalLM"
MODEL_CLASS = "gearshift.serve.vllm.model:ServedSupernet"
SCHEDULER = "gearshift.serve.vllm.scheduler.PlacementScheduler"
WORKER = "gearshift.serve.vllm.worker.PlacementWorker"


class EngineSettingError(GearshiftError, ValueError):
    """A setting of vLLM that this plugin cannot honour."""


class SupernetSettings:
    """vLLM asks this class to check and complete the settings of an engine that runs a supernet."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Give vLLM the one number that a supernet has only in its mixers.

        It plans attention by the model's key/value heads; the layers' own numbers are used where it counts.
        """
        config = cast(SupernetConfig, model_config.hf_config)
        heads = [m.num_key_value_heads for _, _, m in held_mixers(config) if isinstance(m, AttentionConfig)]
        config.num_key_value_heads = heads[0] if heads else config.num_attention_heads

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what would not work, by name, and bring the scheduler.

        Raises:
            EngineSettingError: a setting cannot be honoured.
            UnservableError: the supernet has something that cannot be served.
        """
        config = cast(SupernetConfig, vllm_config.model_config.hf_config)
        _refuse(vllm_config)
        check_servable(config, vllm_config.parallel_config.tensor_parallel_size)
        _choose_block_size(vllm_config, config)
        _choose_graphs(vllm_config)
        scheduler = vllm_config.scheduler_config
        if scheduler.scheduler_cls is None:
            scheduler.scheduler_cls = SCHEDULER
        offer_presets()


def _choose_block_size(vllm_config: VllmConfig, config: SupernetConfig) -> None:
    """Unless the user did: vLLM's own default makes pages far smaller than a state."""
    cache = vllm_config.cache_config
    slots = Options.read(vllm_config.additional_config).slots_for(config.placement_space.num_layers)
    if not cache.user_specified_block_size:
        ranks = vllm_config.parallel_config.tensor_parallel_size
        cache.block_size = default_block_tokens(config, cache_types(vllm_config), ranks, slots)
        cache.user_specified_block_size = True


def _choose_graphs(vllm_config: VllmConfig) -> None:
    """Full graphs of decode steps; no compilation, which gains nothing beside them and takes a minute."""
    from vllm.config.compilation import CompilationMode, CUDAGraphMode

    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    if vllm_config.device_config.device_type != "cuda":
        return
    if parallel.worker_cls in ("auto", "vllm.v1.worker.gpu_worker.Worker"):
        parallel.worker_cls = WORKER
    if vllm_config.model_config.enforce_eager:
        return
    compilation.mode, compilation.cudagraph_mode = CompilationMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY
    if compilation.cudagraph_capture_sizes is None:
        compilation.cudagraph_capture_sizes = graph_sizes(vllm_config.scheduler_config.max_num_seqs)


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that get graphs of their own: each at most a quarter larger than the next smaller one."""
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(4, (1 << (sizes[-1].bit_length() - 1)) // 4))
    return sorted({min(size, most) for size in sizes})


def graph_placements(vllm_config: VllmConfig) -> list[str]:
    """The placements that get CUDA graphs, as texts: the default one, and those of the presets."""
    model = vllm_config.model_config
    config = cast(SupernetConfig, model.hf_config)
    presets = read_presets(Path(model.model), config.placement_space) if Path(model.model).is_dir() else {}
    default = str(Placement.parse(cast(str, config.placement)))
    return list(dict.fromkeys([default, *(str(preset.placement) for preset in presets.values())]))


def _refuse(vllm_config: VllmConfig) -> None:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    for refused, what in (
        (not vllm_config.use_v2_model_runner, "model runner V1; set VLLM_USE_V2_MODEL_RUNNER=1"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism; use tensor parallelism"),
        (parallel.decode_context_parallel_size > 1, "context parallelism; use tensor parallelism"),
        (vllm_config.speculative_config is not None, "speculative decoding"),
        (vllm_config.kv_transfer_config is not None, "KV connectors"),
        (vllm_config.lora_config is not None, "LoRA"),
        (vllm_config.quant_config is not None, "quantisation; give a supernet in bf16"),
        (cache.cache_dtype != "auto", f"kv_cache_dtype={cache.cache_dtype!r}; leave it at 'auto'"),
    ):
        if refused:
            raise EngineSettingError(f"the Gearshift plugin does not work with {what}")


def cache_types(vllm_config: VllmConfig) -> CacheTypes:
    """Keys and values in the model's dtype; states in float32, or as ``--mamba-ssm-cache-dtype`` says."""
    dtype = vllm_config.model_config.dtype
    wanted = str(vllm_config.cache_config.mamba_ssm_cache_dtype)
    return CacheTypes(dtype, torch.float32 if wanted == "auto" else getattr(torch, wanted), dtype)


def register() -> None:
    """See `gearshift.serve.vllm.register`."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import gearshift  # noqa: F401 - makes the config known to Transformers
    from gearshift.serve.vllm.managers import register_specs

    ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    known: dict[str, Any] = MODELS_CONFIG_MAP
    known[ARCHITECTURE] = SupernetSettings
    register_specs()
