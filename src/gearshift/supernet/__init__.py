"""The model: a Transformers causal language model whose every layer holds several mixers."""

from transformers import AutoConfig, AutoModelForCausalLM

from gearshift.supernet.cache import CacheError, CacheSnapshot, MixerState, SupernetCache
from gearshift.supernet.checkpoint import CheckpointError, checkpoint_digest, load_supernet, save_supernet
from gearshift.supernet.config import ConfigError, SupernetConfig
from gearshift.supernet.context import BatchError, SequenceContext
from gearshift.supernet.mixers import Mixer, register_mixer
from gearshift.supernet.modeling import SupernetForCausalLM, SupernetModel, SupernetOutput

AutoConfig.register(SupernetConfig.model_type, SupernetConfig, exist_ok=True)
AutoModelForCausalLM.register(SupernetConfig, SupernetForCausalLM, exist_ok=True)

__all__ = [
    "BatchError",
    "CacheError",
    "CacheSnapshot",
    "CheckpointError",
    "ConfigError",
    "Mixer",
    "MixerState",
    "SequenceContext",
    "SupernetCache",
    "SupernetConfig",
    "SupernetForCausalLM",
    "SupernetModel",
    "SupernetOutput",
    "checkpoint_digest",
    "load_supernet",
    "register_mixer",
    "save_supernet",
]
