"""What a trained supernet stores in which type."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file, save_file

from gearshift.convert import convert_teacher, export_placement
from gearshift.train.run import train


def test_what_is_not_trained_keeps_its_own_type(teacher_directory, make_recipe, tmp_path):
    """All-FA leaves a distilled supernet bit for bit as the teacher, a bfloat16 one too."""
    teacher = shutil.copytree(teacher_directory, tmp_path / "teacher")
    narrow = {name: t.bfloat16() for name, t in load_file(teacher / "model.safetensors").items()}
    save_file(narrow, teacher / "model.safetensors", metadata={"format": "pt"})
    train(make_recipe(supernet=convert_teacher(teacher, tmp_path / "start"), steps=1), progress=False)
    export_placement(tmp_path / "run" / "supernet", tmp_path / "out", "fa*3")
    given = load_file(tmp_path / "out" / "model.safetensors")
    assert given.keys() == narrow.keys()
    for name, tensor in narrow.items():
        assert given[name].dtype == torch.bfloat16
        assert torch.equal(given[name], tensor)
    trained = load_file(tmp_path / "run" / "supernet" / "model.safetensors")
    assert trained["model.layers.0.mixers.sliding_attention.q_proj.weight"].dtype == torch.float32
