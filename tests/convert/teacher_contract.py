"""The suite that every family of teachers must pass. Subclass it; see tests/convert/teachers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gearshift.convert import ConversionError, convert_teacher
from gearshift.convert.export import export_placement
from gearshift.convert.teachers import Teacher, read_teacher
from gearshift.placement import FULL_ATTENTION, MIXERS, SLIDING_ATTENTION, Placement
from gearshift.supernet import SupernetForCausalLM, load_supernet
from gearshift.supernet.checkpoint import tensor_shapes
from tests.convert.tiny_teachers import SIZES, Variant, all_tensors, laid_over, random_tokens, save_teacher

EVERY_FAMILY = {
    "as it is": Variant(),
    "bfloat16": Variant(dtype=torch.bfloat16),
    "sharded": Variant(max_shard_size="20KB"),
}


class TeacherContract:
    """What conversion may expect of a family.

    Attributes:
        model_class: the family's own class in Transformers.
        variants: what the family's configs can say, each in a tiny model.
        rich: fields of a config with as much as possible of what the family has besides Llama.
        broken: changes of a tiny model's ``config.json``, and what the error says (a regular expression).
    """

    model_class: ClassVar[type[PreTrainedModel]]
    variants: ClassVar[dict[str, Variant]]
    rich: ClassVar[dict[str, Any]] = {}
    broken: ClassVar[list[tuple[dict[str, Any], str]]]

    @classmethod
    def make_config(cls, fields: dict[str, Any]) -> PreTrainedConfig:
        """The config of a tiny model."""
        assert cls.model_class.config_class is not None
        return cls.model_class.config_class(**SIZES | fields)

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        if "directory" in metafunc.fixturenames:
            variants = EVERY_FAMILY | cls.variants
            metafunc.parametrize(
                "directory", variants.values(), ids=list(variants), indirect=True, scope="class"
            )
        if "change" in metafunc.fixturenames:
            metafunc.parametrize(("change", "said"), cls.broken)

    @pytest.fixture(scope="class")
    @classmethod
    def directory(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A tiny teacher."""
        config = cls.make_config(request.param.fields)
        return save_teacher(cls.model_class, config, request.param, tmp_path_factory.mktemp("teacher") / "t")

    @pytest.fixture(scope="class")
    @classmethod
    def converted(cls, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The teacher's supernet, with the mixers that are copies of its attention."""
        out = tmp_path_factory.mktemp("converted") / "out"
        return convert_teacher(directory, out, mixers=("fa", "swa"), window=40)

    def teacher_of(self, directory: Path) -> Teacher:
        config = json.loads((directory / "config.json").read_text())
        return read_teacher(config, str(directory / "config.json"), tensor_shapes(directory))

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, directory: Path) -> PreTrainedModel:
        """The teacher in its own class."""
        return cls.model_class.from_pretrained(directory, dtype=torch.float32).eval()

    @pytest.fixture(scope="class")
    @classmethod
    def supernet(cls, converted: Path) -> SupernetForCausalLM:
        """The supernet, all full attention."""
        supernet = load_supernet(converted)
        supernet.set_placement(Placement.uniform(FULL_ATTENTION, supernet.placement_space.num_layers))
        return supernet

    @torch.no_grad()
    def test_all_full_attention_is_the_teacher(
        self, model: PreTrainedModel, supernet: SupernetForCausalLM
    ) -> None:
        for length in (40, 7):  # longer than any window, and shorter
            expected = model(random_tokens(length)).logits
            assert expected.std() > 0.01  # a teacher that says nothing proves nothing
            given = supernet(random_tokens(length)).logits
            assert (given - expected).abs().max() < 1e-4
            assert torch.equal(given.argmax(-1), expected.argmax(-1))

    @torch.no_grad()
    def test_a_left_padded_row_is_the_teachers(
        self, model: PreTrainedModel, supernet: SupernetForCausalLM
    ) -> None:
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[0, :11] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        expected = model(random_tokens(30), **inputs).logits
        given = supernet(random_tokens(30), **inputs).logits
        assert (given - expected)[mask.bool()].abs().max() < 1e-4

    def test_tensors_are_copied_bit_for_bit(self, directory: Path, converted: Path) -> None:
        teacher, given, tensors = self.teacher_of(directory), all_tensors(converted), all_tensors(directory)
        copies = [*teacher.shared_tensors().items()]
        for layer in range(len(teacher.layer_windows())):
            prefix = f"model.layers.{layer}"
            copies += [(f"{prefix}.{name}", own) for name, own in teacher.layer_tensors(layer).items()]
            for mixer in (FULL_ATTENTION, SLIDING_ATTENTION):
                attention = teacher.attention_tensors(layer).items()
                copies += [(f"{prefix}.mixers.{mixer}.{name}", own) for name, own in attention]
        for name, own in copies:
            assert given[name].dtype == tensors[own].dtype
            assert torch.equal(given[name], tensors[own])

    @torch.no_grad()
    def test_all_full_attention_leaves_as_it_came(
        self, directory: Path, converted: Path, model: PreTrainedModel, tmp_path: Path
    ) -> None:
        layers = len(self.teacher_of(directory).layer_windows())
        export_placement(converted, tmp_path / "out", Placement.uniform(FULL_ATTENTION, layers))
        assert (tmp_path / "out/config.json").read_bytes() == (directory / "config.json").read_bytes()
        given, tensors = all_tensors(tmp_path / "out"), all_tensors(directory)
        unused = self.teacher_of(directory).unused_tensors(tensors)
        assert given.keys() == tensors.keys() - set(unused)
        for name, tensor in given.items():
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name])
        again = self.model_class.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert torch.equal(again(random_tokens()).logits, model(random_tokens()).logits)

    def test_every_tensor_is_used_or_declared(self, directory: Path) -> None:
        teacher, names = self.teacher_of(directory), tensor_shapes(directory)
        layers = range(len(teacher.layer_windows()))
        used = list(teacher.shared_tensors().values())
        for layer in layers:
            used += teacher.layer_tensors(layer).values()
            used += teacher.attention_tensors(layer).values()
        assert len(set(used)) == len(used)
        declared = [*teacher.extra_tensors(names), *teacher.unused_tensors(names)]
        assert sorted([*used, *declared]) == sorted(names)
        assert {teacher.input_norm(layer) for layer in layers} <= set(used)

    def test_layers_keep_the_teachers_windows(self, directory: Path, supernet: SupernetForCausalLM) -> None:
        layers = range(supernet.placement_space.num_layers)
        windows = [supernet.config.mixer_config(FULL_ATTENTION, layer).window for layer in layers]
        assert tuple(windows) == self.teacher_of(directory).layer_windows()

    @torch.no_grad()
    def test_every_mixer_starts_from_the_teacher(self, tmp_path: Path) -> None:
        config = self.make_config(self.rich)
        teacher = save_teacher(self.model_class, config, Variant(), tmp_path / "teacher")
        supernet = load_supernet(convert_teacher(teacher, tmp_path / "out", window=6))
        layers = supernet.placement_space.num_layers
        fa, swa, gdn, kda = (
            supernet(random_tokens(), placement=f"{mixer}*{layers}").logits for mixer in MIXERS
        )
        for one, other in itertools.combinations((fa, swa, gdn), 2):
            assert one.isfinite().all() and other.isfinite().all()
            assert (one - other).abs().max() > 1e-3
        # Both delta rules read the same memory until training tells them apart.
        assert (gdn - kda).abs().max() < 1e-3 * gdn.abs().max()

    def test_a_broken_config_is_refused(self, change: dict[str, Any], said: str) -> None:
        config = laid_over(json.loads(self.make_config({}).to_json_string(use_diff=False)), change)
        with pytest.raises(ConversionError, match=said):
            read_teacher(config, "x/config.json")
