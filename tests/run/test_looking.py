"""What models write side by side, and several exports on the same text."""

import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from llm_surgeon import compare_exports, evaluate, load, prune_checkpoint, sample, write_chats
from llm_surgeon.cli import app
from llm_surgeon.data.texts import evaluation_text
from llm_surgeon.errors import ConfigError, NonFiniteError
from llm_surgeon.evaluation.divergence import perplexity_and_divergence, reference_states
from llm_surgeon.evaluation.sampling import PROMPTS, QUESTIONS, Drawing, drawn_tokens
from llm_surgeon.records import ExportComparison, SampleComparison
from llm_surgeon.run.chats import padded
from tiny import build, tokenizer

OPTIONS = {"samples": 8, "seq_len": 16, "eval_window": 32, "eval_tokens": 64, "device": "cpu", "sparsity": 0.4}
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def smaller(checkpoint, tmp_path_factory, text):
    out = tmp_path_factory.mktemp("export") / "smaller"
    prune_checkpoint(str(checkpoint), out, calibration=text, preset="none", shots=1, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{number * 7 % 60}" for number in range(4000)))
    return str(path)


def called(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_greedy_texts_are_those_of_generate_and_drawn_ones_are_those_of_the_seed(checkpoint):
    prompts = ["w1 w2 w3", "w10 w4"]
    found = sample(checkpoint, prompts=prompts, tokens=8, device="cpu").models[0]
    model, words = load(checkpoint, device="cpu")
    for prompt, made in zip(prompts, found.continuations, strict=True):
        ids = torch.tensor([words(prompt).input_ids])
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert made.greedy == words.decode(ids[0, -8:], skip_special_tokens=True)
    state = torch.get_rng_state()
    again, other = (sample(checkpoint, prompts=prompts, tokens=8, seed=seed, device="cpu") for seed in (0, 1))
    assert again.models[0] == found
    assert other.models[0].continuations[0].greedy == found.continuations[0].greedy
    assert [one.sampled for one in other.models[0].continuations] != [one.sampled for one in found.continuations]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_export_beside_the_dense_model(checkpoint, smaller, tmp_path):
    done = called(
        *("sample", smaller, "--against", checkpoint, "--prompt", "w1 w2 [bold]w3", "--tokens", 4),
        *("--out", tmp_path / "texts.json", "--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    said = done.stdout
    assert said.index("tiny-llama") < said.index("smaller")
    assert "w1 w2 [bold]w3" in said
    found = SampleComparison.model_validate_json((tmp_path / "texts.json").read_text())
    assert [model.model for model in found.models] == [str(checkpoint), str(smaller)]
    assert not found.models[0].chat


def test_prompts_are_a_fixed_set_unless_they_are_given(checkpoint, tmp_path):
    assert [one.prompt for one in sample(checkpoint, tokens=1, device="cpu").models[0].continuations] == [*PROMPTS]
    (tmp_path / "prompts.txt").write_text("w1 w2\n\nw3\n")
    done = called("sample", checkpoint, "--prompts", tmp_path / "prompts.txt", "--prompt", "w4", "--tokens", 1)
    titles = re.findall(r"^(w\d.*?) *$", done.stdout, re.M)
    assert titles == ["w4", "w1 w2", "w3"]


def test_a_chat_model_answers_in_its_template(tmp_path):
    words = tokenizer()
    words.chat_template = TEMPLATE
    build("llama").save_pretrained(tmp_path / "chats")
    words.save_pretrained(tmp_path / "chats")
    talking = sample(tmp_path / "chats", prompts=["w1"], tokens=4, device="cpu").models[0]
    as_text = sample(tmp_path / "chats", prompts=["<user> w1\n"], chat=False, tokens=4, device="cpu").models[0]
    assert talking.chat
    assert talking.continuations[0].greedy == as_text.continuations[0].greedy
    assert [one.prompt for one in sample(tmp_path / "chats", tokens=1, device="cpu").models[0].continuations] == [
        *QUESTIONS
    ]


def test_texts_come_to_the_page_of_the_run(checkpoint, smaller):
    before = (smaller / "report.html").read_text(encoding="utf8")
    assert "No texts were written" in before
    sample(smaller, checkpoint, prompts=["w1 <b>"], tokens=4, page=True, device="cpu")
    page, report = ((smaller / name).read_text(encoding="utf8") for name in ("report.html", "report.json"))
    assert "w1 &lt;b&gt;" in page
    assert "<b>" not in page
    assert json.loads(report)["samples"]["models"][1]["model"] == "smaller"
    assert str(smaller.parent) not in page + report


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, "0 tokens"),
        ({"temperature": 0.0}, "temperature of 0"),
        ({"top_p": 1.5}, "top-p of 1.5"),
        ({"prompts": ["w1", " "]}, "prompt is empty"),
        ({"chat": True}, "no template for chats"),
        ({"page": True}, "no report.json"),
        ({"seed": 2**64}, "The seed is"),
        ({"prompts": "w1 w2"}, "a list of prompts"),
        ({"prompts": ["w1 \udcff"]}, "broken character"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(checkpoint, options, said, monkeypatch):
    monkeypatch.setattr("llm_surgeon.run.sampling.load", None)
    with pytest.raises(ConfigError, match=said):
        sample(checkpoint, device="cpu", **options)


def test_settings_of_the_checkpoint_for_generation_do_not_matter(checkpoint, tmp_path):
    model, words = load(checkpoint, device="cpu")
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path / "other")
    words.save_pretrained(tmp_path / "other")
    ours, others = (
        sample(path, prompts=["w1 w2"], tokens=8, device="cpu") for path in (checkpoint, tmp_path / "other")
    )
    assert ours.models[0].continuations == others.models[0].continuations


def test_texts_end_before_the_token_that_ends_them(checkpoint, tmp_path):
    model, words = load(checkpoint, device="cpu")
    (written,) = sample(checkpoint, prompts=["w1 w2"], tokens=8, device="cpu").models[0].continuations
    said = written.sampled.split()
    place = next(number for number in range(1, 8) if said[number] not in said[:number])
    model.generation_config.eos_token_id = [words(said[place]).input_ids[-1], 0]
    model.save_pretrained(tmp_path / "other")
    words.save_pretrained(tmp_path / "other")
    (cut,) = sample(tmp_path / "other", prompts=["w1 w2"], tokens=8, device="cpu").models[0].continuations
    assert cut.sampled.split() == said[:place]


def test_the_first_token_of_a_vocabulary_may_end_a_text(checkpoint, tmp_path):
    model, words = load(checkpoint, device="cpu")
    words.eos_token = None
    model.generation_config.eos_token_id = 0
    head = model.get_output_embeddings()
    torch.nn.init.zeros_(head.weight)
    head.bias = torch.nn.Parameter(torch.eye(1, len(head.weight))[0] * 10)
    (new,) = drawn_tokens(model, words, *padded(words, ["w1 w2"]), Drawing(tokens=4, temperature=0.1), 0)
    assert len(new) == 0


def test_a_template_that_refuses_prompts_is_a_message(tmp_path, monkeypatch):
    words = tokenizer()
    words.chat_template = "{{ raise_exception('a system message is needed') }}"
    build("llama").save_pretrained(tmp_path / "strict")
    words.save_pretrained(tmp_path / "strict")
    monkeypatch.setattr("llm_surgeon.run.sampling.load", None)
    monkeypatch.setattr("llm_surgeon.run.chats.load", None)
    with pytest.raises(ConfigError, match="a system message is needed"):
        sample(tmp_path / "strict", device="cpu")
    with pytest.raises(ConfigError, match="a system message is needed"):
        write_chats(tmp_path / "strict", tmp_path / "chats.jsonl", device="cpu")


def test_what_does_not_fit_into_learned_positions_is_said_before_the_model_is_loaded(tmp_path, monkeypatch):
    model = build("gpt2")
    positions = model.config.max_position_embeddings
    words = tokenizer()
    words.chat_template = "{% for m in messages %}" + "w1 " * (positions - 8) + "{{ m.content }}{% endfor %}"
    model.save_pretrained(tmp_path / "short")
    words.save_pretrained(tmp_path / "short")
    fitting = sample(tmp_path / "short", prompts=["w2 w3"], tokens=6, device="cpu")
    assert fitting.models[0].chat
    monkeypatch.setattr("llm_surgeon.run.sampling.load", None)
    with pytest.raises(ConfigError, match="do not fit into") as caught:
        sample(tmp_path / "short", prompts=["w2 w3"], tokens=7, device="cpu")
    assert "Use --tokens 6 or less" in caught.value.remedy


def test_models_of_the_same_name_and_texts_with_paths_on_the_page(checkpoint, smaller, tmp_path):
    other = tmp_path / "elsewhere" / smaller.name
    shutil.copytree(smaller, other)
    sample(smaller, other, prompts=["w1 /etc/nginx/nginx.conf"], tokens=4, page=True, device="cpu")
    report = json.loads((smaller / "report.json").read_text(encoding="utf8"))
    assert report["samples"]["models"][0]["continuations"][0]["prompt"] == "w1 /etc/nginx/nginx.conf"
    assert len({model["model"] for model in report["samples"]["models"]}) == 2
    assert str(tmp_path) not in json.dumps(report)
    sample(checkpoint, checkpoint, prompts=["w1"], tokens=1, device="cpu")


def test_a_model_with_broken_weights_is_no_stack_trace(tmp_path):
    model = build("llama")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError):
        sample(tmp_path / "broken", prompts=["w1"], tokens=2, device="cpu")


def test_exports_are_measured_on_the_same_tokens(checkpoint, smaller, text, tmp_path):
    done = called(
        *("compare-exports", checkpoint, smaller, checkpoint, "--data", text, "--data", "demo:fr", "--window", 32),
        *("--tokens", 320, "--device", "cpu", "--out", tmp_path / "all.json"),
    )
    assert done.exit_code == 0, done.output
    assert "tiny-llama" in done.stdout
    found = ExportComparison.model_validate_json((tmp_path / "all.json").read_text())
    dense, pruned, again = found.models
    assert dense.divergences == (None, None)
    assert again.perplexities == dense.perplexities
    assert all(divergence == pytest.approx(0, abs=1e-6) for divergence in again.divergences)
    assert pruned.weight_bytes == (smaller / "model.safetensors").stat().st_size < dense.weight_bytes
    assert pruned.parameters < dense.parameters

    network, words = load(smaller, device="cpu")
    alone = evaluate(network, words, text, window=32, max_tokens=320)
    assert pruned.perplexities[0] == alone
    whole = evaluation_text(words, text, window=32, stride=None, max_tokens=320, precision="bfloat16")
    _, states = reference_states(load(checkpoint, device="cpu")[0], whole)
    assert pruned.divergences[0] == pytest.approx(perplexity_and_divergence(network, whole, states)[1], rel=1e-3)


def test_exports_that_cannot_be_compared_are_refused_before_one_is_loaded(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_surgeon.run.compare_exports.load", None)
    with pytest.raises(ConfigError, match="Two models"):
        compare_exports([checkpoint], [text], window=32)
    with pytest.raises(ConfigError, match="Two models"):
        compare_exports([checkpoint, checkpoint], [], window=32)
    for models, data in ((str(checkpoint), [text]), ([checkpoint, checkpoint], text)):
        with pytest.raises(ConfigError, match="a list"):
            compare_exports(models, data, window=32)
    other = tokenizer()
    other.add_tokens(["w1 w8"])
    build("llama").save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="different tokens"):
        compare_exports([checkpoint, tmp_path / "other"], [text], window=32)
    (tmp_path / "there.json").write_text("")
    done = called("compare-exports", checkpoint, checkpoint, "--data", text, "--out", tmp_path / "there.json")
    assert done.exit_code == 1
    assert "Traceback" not in done.output
