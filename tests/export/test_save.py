import ast

import pytest

from llm_surgeon.errors import DiskSpaceError, OutputError
from llm_surgeon.export import save
from llm_surgeon.export.save import save_model
from llm_surgeon.models import FAMILIES, examine, family_of
from llm_surgeon.models.modeling_text import modeling_text
from llm_surgeon.system.files import check_disk_space, check_output
from tiny import build, tokenizer


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_modelling_file_stands_alone(model_type):
    tree = ast.parse(modeling_text(FAMILIES[model_type]))
    modules = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules <= {"__future__", "typing", "torch", "transformers"}
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    family = FAMILIES[model_type]
    assert {"PrunedLinear", f"Pruned{family.model_class}", f"Pruned{family.config_class}"} <= names


def test_output_that_is_a_file_or_full_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(OutputError, match="is not empty"):
        check_output(tmp_path)
    check_output(tmp_path / "new" / "deep")


def test_too_little_disk_names_both_figures(tmp_path):
    with pytest.raises(DiskSpaceError, match=r"need about [\d,.]+ MiB.* MiB are free"):
        check_disk_space(tmp_path / "out", 2**60)
    check_disk_space(tmp_path / "out", 1)


def test_a_disk_that_fills_while_writing_is_an_error_of_ours(tmp_path, monkeypatch):
    model = build("llama")
    anatomy = examine(model, family_of("llama"))

    def full(_model, _directory, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(DiskSpaceError, match="The disk is full"):
        save_model(model, tokenizer(), anatomy, anatomy.dense_masks(), tmp_path)


def test_an_export_has_a_type_of_its_own():
    assert save.export_type(FAMILIES["opt"]) == "llm_surgeon_opt"
