"""The contract of export formats: a test class inherits it, and says which format and what it can hold."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from llm_surgeon import PruneConfig
from llm_surgeon.errors import ConfigError, ExportMismatchError
from llm_surgeon.export.format import Exported
from llm_surgeon.export.formats import FORMATS, check_formats, formats_of, loaders
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import cut_out
from llm_surgeon.pruning.shapes import Shapes
from llm_surgeon.recipe.formats import FORMATS as KNOWN
from tiny import build, tokenizer, tokens

RECIPES = {
    "zeros": {"structure": "unstructured"},
    "equal widths": {"structure": "neurons", "uniform": True, "round_to": 4},
    "any shapes": {"structure": "rows-columns"},
}


class FormatContract:
    """What recipe, plan, report and the run rely on.

    Attributes:
        form: The format, as it is in the table.
        holds: Which of ``RECIPES`` it can say.
        families: Models that it is for.
        tokenizer: Function that makes a tokenizer that it can say.
        tolerance: Largest difference of what was written, as a fraction of the largest logit.
    """

    form = None
    holds: tuple = tuple(RECIPES)
    families: tuple = ("llama", "llama-biased")
    tokenizer = staticmethod(tokenizer)
    tolerance = 1e-4

    def config(self, kind, **changes):
        options = {"preset": "none", "sparsity": 0.3, "formats": [self.form.name], **RECIPES[kind], **changes}
        return PruneConfig.from_mapping(options)

    def exported(self, kind, family="llama"):
        """A model that has lost something, as it comes to be written."""
        model, config = build(family), self.config(kind)
        anatomy = examine(model, family_of(model.config.model_type))
        if not config.parts:
            for name in anatomy.layers:
                weight = model.get_submodule(name).weight.data
                weight[weight.abs() < weight.abs().median()] = 0
            return Exported(model, self.tokenizer(), anatomy.family, anatomy, None)
        keep = Shapes(config, anatomy).random_masks(0.3, seed=1)
        cut_out(model, anatomy, keep)
        return Exported(model, self.tokenizer(), anatomy.family, anatomy, keep)

    def test_recipes_know_it(self):
        assert FORMATS[self.form.name] is self.form
        assert KNOWN[self.form.name].summary
        assert formats_of(self.config(self.holds[0])) == [self.form]

    def test_a_plan_can_say_what_loads_it(self):
        for kind in self.holds:
            found = loaders(self.config(kind), build("llama").config)
            assert found
            assert all(line.strip() for line in found)

    def test_what_it_cannot_hold_is_refused_with_a_remedy(self):
        model = build("llama")
        anatomy = examine(model, family_of("llama"))
        for kind in RECIPES:
            if kind in self.holds:
                check_formats(self.config(kind), anatomy, model.config)
                continue
            with pytest.raises(ConfigError) as refused:
                check_formats(self.config(kind), anatomy, model.config)
            assert self.form.name in refused.value.cause
            assert "--" in refused.value.remedy

    def test_what_was_written_computes_what_the_model_does(self, tmp_path):
        for number, (family, kind) in enumerate((family, kind) for family in self.families for kind in self.holds):
            exported, directory = self.exported(kind, family), tmp_path / str(number)
            directory.mkdir()
            ids = tokens(2, 12, seed=5)
            with torch.no_grad():
                before = exported.model(ids).logits
            plain = self.form.write(exported, directory)
            assert isinstance(plain, bool)
            check = self.form.verify(exported, directory, plain)
            assert 0 <= check.difference < self.tolerance * check.scale
            with torch.no_grad():
                assert torch.equal(exported.model(ids).logits, before), "writing leaves the model as it was"
            assert [path.name for path in tmp_path.iterdir()].count(str(number)) == 1
            assert len(list(tmp_path.iterdir())) == number + 1, "nothing stands beside the directory"

    def test_bytes_are_those_of_the_plan_but_for_names(self, tmp_path):
        for number, kind in enumerate(self.holds):
            exported, directory = self.exported(kind), tmp_path / str(number)
            directory.mkdir()
            self.form.write(exported, directory)
            parameters = sum(parameter.numel() for parameter in exported.model.parameters())
            planned = self.form.nbytes(parameters, exported.model.dtype)
            indices = sum(buffer.nbytes for buffer in exported.model.buffers())
            assert planned <= self.form.weight_bytes(directory) <= planned + indices + 16_000
            # A format may have fractions of a byte for a parameter.
            assert self.form.nbytes(2 * parameters, exported.model.dtype) - 2 * planned in (0, 1)

    def test_files_of_another_model_are_a_mismatch(self, tmp_path):
        exported = self.exported(self.holds[0])
        plain = self.form.write(exported, tmp_path)
        other = copy.deepcopy(exported.model)
        with torch.no_grad():
            next(other.model.layers[0].mlp.parameters()).mul_(1.5)
        with pytest.raises(ExportMismatchError) as found:
            self.form.verify(replace(exported, model=other), tmp_path, plain)
        assert found.value.remedy

    def test_lines_of_python_load_the_files(self, tmp_path):
        exported = self.exported(self.holds[0])
        self.form.write(exported, tmp_path)
        lines = [line.replace("{place}", repr(str(tmp_path))) for line in self.form.loading()]
        # What from_pretrained loads needs none of its own.
        assert bool(lines) or not self.form.own_directory
        exec("\n".join(lines), {})
