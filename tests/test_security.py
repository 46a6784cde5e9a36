"""What is read is data: nothing is unpickled, no code is run unasked, and the network is left alone."""

import json
import os
import pickle
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fresh
import llm_surgeon.models as families
from llm_surgeon import PruneConfig, load, prune, prune_checkpoint
from llm_surgeon.benchmark.measuring import bench
from llm_surgeon.cli import app
from llm_surgeon.comparison.cell import measure_cell
from llm_surgeon.comparison.directory import ComparisonDirectory
from llm_surgeon.data.corpora import load_corpus
from llm_surgeon.errors import ConfigError, DataError, ModelError, OutputError, SurgeonError
from llm_surgeon.models.loading import load_model, load_tokenizer
from llm_surgeon.models.trust import is_own_export
from llm_surgeon.recipe.config import read_recipe
from llm_surgeon.records import PruneReport
from llm_surgeon.report.card import model_card
from llm_surgeon.report.page import report_page
from llm_surgeon.run.run import plan
from llm_surgeon.system.files import check_output
from llm_surgeon.system.progress import SilentProgress
from tiny import build, tokenizer

SMALL = {
    "preset": "none",
    "samples": 4,
    "seq_len": 16,
    "eval_window": 32,
    "eval_tokens": 64,
    "shots": 1,
    "sparsity": 0.2,
}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def config(text, **changes):
    return PruneConfig.from_mapping({**SMALL, "calibration": str(text), **changes})


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """What must not be there when the test is over."""
    path = tmp_path / "exploded"
    yield path
    assert not path.exists(), "foreign code was run"


@pytest.fixture
def bomb(mark):
    return pickle.dumps(Bomb(mark), protocol=2)


def test_the_bomb_is_one(tmp_path):
    path = tmp_path / "bomb.bin"
    torch.save(Bomb(tmp_path / "torch"), path)
    torch.load(path, weights_only=False)
    pickle.loads(pickle.dumps(Bomb(tmp_path / "pickle")))
    assert (tmp_path / "torch").exists()
    assert (tmp_path / "pickle").exists()


@pytest.fixture
def copied(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture(scope="module")
def export(checkpoint, tmp_path_factory):
    """A pruned model with its modelling file."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(f"w{(5 * i + i % 3) % 64}" for i in range(2000)), encoding="utf8")
    out = tmp_path_factory.mktemp("export") / "pruned"
    prune_checkpoint(str(checkpoint), out, config(text))
    return out


class TestPickles:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_weights_as_a_pickle_are_refused_with_the_remedy(self, copied, name, bomb):
        (copied / "model.safetensors").unlink()
        (copied / name).write_bytes(bomb)
        for attempt in (lambda: load_model(str(copied)), lambda: plan(str(copied), PruneConfig())):
            with pytest.raises(ModelError, match=rf"{re.escape(name)}.*save_pretrained") as refused:
                attempt()
            assert "safetensors" in refused.value.cause

    @pytest.mark.parametrize("shard", ["pytorch_model.bin", "../model.safetensors", "/etc/model.safetensors"])
    def test_an_index_cannot_name_anything_else(self, copied, shard, bomb):
        (copied / "pytorch_model.bin").write_bytes(bomb)
        (copied / "model.safetensors").rename(copied.parent / "model.safetensors")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=r"Only safetensors are read|not in its directory, and is not read"):
            load_model(str(copied))

    def test_adapters_are_refused(self, copied, bomb):
        (copied / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/model"}')
        (copied / "adapter_model.bin").write_bytes(bomb)
        with pytest.raises(ModelError, match="merge_and_unload"):
            load_model(str(copied))

    def test_pickles_beside_the_weights_are_left_alone(self, copied, bomb):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl", "tokenizer.pkl"):
            (copied / name).write_bytes(bomb)
        load_model(str(copied))
        load_tokenizer(str(copied))

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_a_pickle_by_another_name_is_not_read(self, copied, name, bomb, text_file, tmp_path):
        (copied / name).write_bytes(bomb)
        with pytest.raises(SurgeonError):
            prune_checkpoint(str(copied), tmp_path / "out", config(text_file))

    @pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.parquet"])
    def test_texts(self, tmp_path, name, bomb):
        (tmp_path / name).write_bytes(b"\xff" + bomb)
        with pytest.raises(DataError):
            load_corpus(str(tmp_path / name))

    def test_recipes(self, tmp_path, mark, bomb):
        for content in (bomb, f"sparsity: !!python/object/apply:os.mkdir ['{mark}']".encode()):
            (tmp_path / "recipe.yaml").write_bytes(content)
            with pytest.raises(ConfigError, match="cannot be read"):
                read_recipe(tmp_path / "recipe.yaml")

    def test_comparisons(self, checkpoint, text_file, tmp_path, bomb):
        (tmp_path / "comparison.json").write_bytes(bomb)
        with pytest.raises(OutputError, match="cannot be read"):
            ComparisonDirectory(tmp_path).former("model", {})
        (tmp_path / "dense.safetensors").write_bytes(bomb)
        with pytest.raises(DataError, match=r"dense\.safetensors cannot be read"):
            measure_cell(str(checkpoint), config(text_file), tmp_path / "dense.safetensors", None, SilentProgress())


def add_code(directory, mark, **settings):
    """Let a checkpoint bring code that leaves a mark, as configuration, model and tokenizer."""
    (directory / "evil.py").write_text(
        f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'evil'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Words(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = directory / "config.json"
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": code} | settings))


@pytest.fixture
def private_modules(tmp_path, monkeypatch):
    """Where transformers copies foreign code to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


class TestForeignCode:
    def test_a_known_architecture_is_loaded_without_it(self, copied, mark, text_file):
        add_code(copied, mark)
        plan(str(copied), config(text_file))
        model, words = load(copied, device="cpu")
        assert type(model).__module__.startswith("transformers.models.llama")
        prune(model, words, config(text_file))

    def test_what_needs_it_is_refused_with_the_option(self, copied, mark, text_file, tmp_path, monkeypatch):
        add_code(copied, mark, model_type="evil")
        monkeypatch.setitem(families.FAMILIES, "evil", families.FAMILIES["llama"])
        asked = config(text_file)
        for attempt in (
            lambda: prune_checkpoint(str(copied), tmp_path / "out", asked),
            lambda: plan(str(copied), asked),
            lambda: load(copied),
        ):
            with pytest.raises(ModelError, match=r"not run unasked.*--trust-remote-code"):
                attempt()
        done = CliRunner().invoke(
            app, ["prune", str(copied), f"--out={tmp_path / 'out'}", f"--calibration={text_file}", *OPTIONS]
        )
        assert done.exit_code == 1
        assert "--trust-remote-code" in done.output

    @pytest.mark.usefixtures("private_modules")
    def test_it_runs_if_asked(self, copied, text_file, tmp_path, monkeypatch):
        add_code(copied, tmp_path / "ran", model_type="evil")
        monkeypatch.setitem(families.FAMILIES, "evil", families.FAMILIES["llama"])
        plan(str(copied), config(text_file, trust_remote_code=True))
        assert (tmp_path / "ran").exists()

    def test_tokenizers_bring_none(self, copied, mark):
        add_code(copied, mark)
        path = copied / "tokenizer_config.json"
        settings = {"auto_map": {"AutoTokenizer": ["evil.Words", "evil.Words"]}, "tokenizer_class": "Words"}
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        with pytest.raises(ModelError, match="--trust-remote-code"):
            load_tokenizer(str(copied))


class TestExports:
    """The modelling file of an export is run unasked, and nothing else is."""

    @pytest.fixture
    def tampered(self, export, tmp_path):
        return Path(shutil.copytree(export, tmp_path / "tampered"))

    def test_what_this_version_writes_is_loaded(self, export):
        assert is_own_export(export)
        load(export, device="cpu")

    def test_dense_checkpoints_are_none(self, checkpoint):
        assert not is_own_export(checkpoint)

    def change_file(self, directory, mark):
        path = directory / "modeling_pruned.py"
        path.write_text(path.read_text() + f"\nimport os\nos.mkdir({str(mark)!r})\n")

    def name_another_file(self, directory, mark):
        add_code(directory, mark)

    def name_another_repository(self, directory, mark):
        path = directory / "config.json"
        settings = json.loads(path.read_text())
        settings["auto_map"]["AutoConfig"] = "someone/evil--" + settings["auto_map"]["AutoConfig"]
        path.write_text(json.dumps(settings))

    def bring_a_tokenizer(self, directory, mark):
        path = directory / "tokenizer_config.json"
        add_code(directory, mark)
        shutil.copy(directory / "config.json", directory / "old.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.W", None]}}))

    def bring_a_way_to_generate(self, directory, mark):
        (directory / "custom_generate").mkdir()
        (directory / "custom_generate" / "generate.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")

    @pytest.mark.parametrize(
        "tamper", ["change_file", "name_another_file", "name_another_repository", "bring_a_tokenizer"]
    )
    def test_what_was_tampered_with_is_refused(self, tampered, mark, tamper, text_file):
        getattr(self, tamper)(tampered, mark)
        assert not is_own_export(tampered)
        with pytest.raises(ModelError, match="--trust-remote-code"):
            load(tampered, device="cpu")
        done = CliRunner().invoke(app, ["eval", str(tampered), f"--data={text_file}", "--window=32", "--tokens=64"])
        assert done.exit_code == 1
        assert "--trust-remote-code" in done.output

    def test_more_code_than_ours_is_too_much(self, tampered, mark):
        self.bring_a_way_to_generate(tampered, mark)
        assert not is_own_export(tampered)

    def test_measuring_refuses_in_its_own_process_too(self, tampered, mark):
        self.change_file(tampered, mark)
        with pytest.raises(ModelError, match="--trust-remote-code"):
            bench(tampered, prompt=4, generate=2, repeats=1, batches=(1,))


FORBID = """
import os, socket
def _refuse(*arguments, **_):
    with open({record!r}, "a") as file:
        print(os.getpid(), arguments, file=file)
    raise OSError("the network is not to be used")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = _refuse
"""


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Records and refuses every connection of this process and of those that it starts."""
    record = tmp_path / "connections.txt"
    patches = tmp_path / "site"
    patches.mkdir()
    (patches / "sitecustomize.py").write_text(FORBID.format(record=str(record)))
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, getattr(socket, name))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, getattr(socket.socket, name))
    exec((patches / "sitecustomize.py").read_text(), {})
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(patches), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield record
    assert not record.exists(), record.read_text()


class TestNetwork:
    @pytest.mark.parametrize("python", ["played", "real"])
    def test_the_ban_holds_in_processes_too(self, tmp_path, monkeypatch, python):
        import subprocess
        import sys

        if python == "real":
            monkeypatch.setattr(sys, "executable", fresh.REAL)
        record = tmp_path / "connections.txt"
        (tmp_path / "sitecustomize.py").write_text(FORBID.format(record=str(record)))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        subprocess.run([sys.executable, "-P", "-c", "import socket; socket.getaddrinfo('localhost', 1)"], check=False)
        assert "localhost" in record.read_text()

    @pytest.mark.usefixtures("no_network")
    def test_a_local_run_asks_nobody(self, checkpoint, text_file, tmp_path):
        model, text, out = str(checkpoint), f"--calibration={text_file}", tmp_path / "out"
        for arguments in (
            ["plan", model, text, *OPTIONS],
            ["prune", model, text, f"--out={out}", *OPTIONS],
            ["eval", str(out), f"--data={text_file}", "--window=32", "--tokens=64"],
            ["bench", str(out), f"--against={model}", "--batch=1", "--prompt=4", "--generate=2", "--repeats=1"],
        ):
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, done.output

    @pytest.mark.usefixtures("no_network")
    @pytest.mark.parametrize(
        "name",
        [
            "./gone",
            "/gone",
            "~/gone",
            "../gone",
            "gone/",
            "a/b/c",
            "folder\\gone",
            "C:\\gone",
            "a b",
            "",
            "x\0y",
            "x/" * 3000,
        ],
    )
    def test_paths_are_never_sent_to_the_hub(self, name, text_file, tmp_path):
        for attempt in (
            lambda: load(name),
            lambda: prune_checkpoint(name, tmp_path / "out", config(text_file)),
            lambda: plan(name, config(text_file)),
            lambda: bench(name),
        ):
            with pytest.raises(ModelError, match="There is no directory"):
                attempt()

    @pytest.mark.usefixtures("no_network")
    @pytest.mark.parametrize(
        "name", ["./gone", "/gone", "~/gone", "../gone", "folder\\gone", "C:\\gone", "x\0y", "/a:b"]
    )
    def test_paths_are_never_sent_to_the_hub_of_data(self, name):
        with pytest.raises(DataError, match="does not exist"):
            load_corpus(name)


@pytest.mark.parametrize("name", ["x" * 300, "deep/" * 2000 + "x", "nul\0name"])
def test_outputs_that_no_file_system_takes_are_refused(name, tmp_path):
    with pytest.raises(OutputError, match="cannot be an output"):
        check_output(tmp_path / name)


HOSTILE = "<script>alert(1)</script>"


def test_names_cannot_become_markup(tmp_path):
    """In card and page: names of model and text."""
    text = tmp_path / f"<img src=x onerror=alert(1)>{HOSTILE.replace('/', '')}.txt"
    text.write_text("w1 w2 w3 w4 " * 500, encoding="utf8")
    source = f"{HOSTILE}\n{HOSTILE} | **x** [a](javascript:b)"
    report = prune(build("llama"), tokenizer(), config(text), source=source)
    assert not re.search(r"<(script|img)", report_page(report))
    card = model_card(report).partition("\n---\n")[2]
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1\n", "", card, flags=re.DOTALL | re.MULTILINE)
    assert "alert" in outside
    assert not re.search(r"(?<!\\)<", outside)
    assert "[a](" not in outside


def test_a_command_cannot_leave_its_fence(export):
    report = PruneReport.model_validate_json((export / "report.json").read_text())
    card = model_card(report.model_copy(update={"command": f"llm-surgeon ```\n{HOSTILE}\n````"}))
    assert f"`````bash\nllm-surgeon ```\n{HOSTILE}\n````\n`````\n" in card
