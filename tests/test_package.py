"""What importing the package does, seen from a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gearshift

HEAVY = ("torch", "transformers", "sklearn", "scipy", "plotly", "matplotlib")
TINY = """
tiny = dict(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
    mixers={"full_attention": dict(num_heads=2, num_key_value_heads=1, head_dim=4)},
)
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    assert run_python(f"import sys, gearshift; print([m for m in {HEAVY} if m in sys.modules])") == "[]\n"


@pytest.mark.parametrize(
    "first_imports",
    [
        "import gearshift; from transformers import LlamaForCausalLM, AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import gearshift",
    ],
)
def test_auto_classes_know_the_supernet_in_any_order_of_imports(first_imports: str):
    code = f"{first_imports}{TINY}config = AutoConfig.for_model('gearshift_supernet', **tiny)\n"
    code += "print(type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)\n"
    code += "import sys; print([f for f in sys.meta_path if type(f).__module__.startswith('gearshift')])"
    assert run_python(code) == "SupernetConfig SupernetForCausalLM\n[]\n"


@pytest.mark.parametrize("name", [name for name in gearshift.__all__ if name != "__version__"])
def test_every_public_name_can_be_loaded(name: str):
    assert getattr(gearshift, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="gearshift.*nonsense"):
        gearshift.nonsense  # noqa: B018 - the access is the test
