import math
import random
from pathlib import Path

import pytest
import torch

from evaluation.own_tasks import (
    LAST_WORD,
    PICK,
    QUESTIONS,
    Recorder,
    encode,
    ended,
    log_likelihood,
    mean_of,
    measure,
    needs_lm_eval,
    next_word,
    picked,
    read_samples,
    words,
    write_lost,
    write_task,
)
from llm_surgeon import load
from llm_surgeon.errors import ConfigError, NonFiniteError
from llm_surgeon.evaluation.tasks import evaluate_tasks
from llm_surgeon.records import TaskScores
from llm_surgeon.report.task_table import task_notes
from tiny import build, tokenizer

pytestmark = needs_lm_eval


@pytest.fixture
def models(checkpoint, export):
    def make(kind):
        if kind == "export":
            return load(export)[0]
        model = load(checkpoint)[0]
        if kind == "masked":
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.mlp.down_proj.weight[:, ::2] = 0
        return model

    return make


@pytest.mark.parametrize("kind", ["dense", "masked", "export"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_equals_plain_passes_by_hand(models, own_tasks, kind, batch_size):
    model = models(kind)
    result = measure(["pick", "last_word"], own_tasks, model, batch_size=batch_size, precision="float32")
    acc, acc_norm = picked(model, own_tasks)
    perplexity, last = ended(model, own_tasks)
    # Else the comparison could not tell one metric from the other.
    assert acc != acc_norm or kind != "dense"
    pick, last_word = result.scores
    assert pick.metrics["acc"].value == pytest.approx(acc)
    assert pick.metrics["acc_norm"].value == pytest.approx(acc_norm)
    assert pick.metrics["acc"].stderr == pytest.approx(math.sqrt(acc * (1 - acc) / (QUESTIONS - 1)))
    assert last_word.metrics["perplexity"].value == pytest.approx(perplexity, rel=1e-4)
    assert last_word.metrics["perplexity"].stderr is None
    assert last_word.metrics["acc"].value == pytest.approx(last)
    assert result.mean == pytest.approx((acc + last) / 2)
    assert (pick.samples, pick.samples_total, pick.shots, pick.version) == (QUESTIONS, QUESTIONS, 0, "3.0")
    assert result.failures == ()
    assert TaskScores.model_validate_json(result.model_dump_json()) == result


def test_the_model_the_tokenizer_and_the_generators_stay_as_they_were(own_tasks):
    model, own = build("llama"), tokenizer()
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    own.pad_token = None
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    draws = random.getstate(), torch.get_rng_state()
    evaluate_tasks(model, own, ["last_word"], include_path=own_tasks, limit=2)
    assert [part.training for part in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert own.pad_token is None
    assert random.getstate() == draws[0]
    assert torch.equal(torch.get_rng_state(), draws[1])


def test_a_limit_takes_the_first_samples_and_says_so(own_tasks):
    model = build("llama")
    result = measure(["pick"], own_tasks, model, limit=7, precision="float32")
    assert result.scores[0].metrics["acc"].value == pytest.approx(picked(model, own_tasks, 7)[0])
    assert (result.scores[0].samples, result.scores[0].samples_total, result.limit) == (7, QUESTIONS, 7)


def test_a_limit_beyond_the_data_is_no_estimate(own_tasks):
    result = measure(["last_word"], own_tasks, limit=1_000)
    assert (result.scores[0].samples, result.scores[0].samples_total) == (QUESTIONS, QUESTIONS)
    assert "estimate" not in " ".join(task_notes(result))


def test_shots_come_before_the_question_and_depend_on_the_seed_only(own_tasks):
    def score(shots, seed):
        return measure(["last_word"], own_tasks, shots=shots, seed=seed, precision="float32").scores[0]

    none, first = score(0, 0), score(2, 0)
    assert (none.shots, first.shots) == (0, 2)
    assert first.metrics["perplexity"] != none.metrics["perplexity"]
    assert first.metrics == score(2, 0).metrics
    assert first.metrics != score(2, 1).metrics


def test_examples_from_the_measured_samples_are_said_and_never_the_question_itself(own_tasks, tmp_path, prompts):
    texts = [{"text": f"w{number} w{number + 20}"} for number in range(4)]
    others = [{"text": f"w{number} w{number + 20}"} for number in range(10, 16)]
    for name, train in (("same", texts), ("partly", [*others, texts[0]]), ("apart", others)):
        write_task(tmp_path, f"of_{name}", train, LAST_WORD)
        files = {"test": "test.jsonl", "train": f"of_{name}.jsonl"}
        write_task(tmp_path, name, [], LAST_WORD | {"dataset_kwargs": {"data_files": files}})
    write_task(tmp_path, "test", texts, LAST_WORD | {"training_split": None})
    names = ["test", "same", "partly", "apart"]
    result = measure(names, tmp_path, shots=3)
    assert [(score.examples, score.examples_measured) for score in result.scores] == [(4, 4), (4, 4), (7, 1), (6, 0)]
    for name in ("test", "same"):
        for *examples, question in (prompt.split("\n\n") for prompt in prompts[name]):
            assert len(set(examples)) == 3
            assert not any(example.startswith(f"{question} ") for example in examples)
    (note,) = [note for note in task_notes(result) if "measured samples" in note]
    assert note.endswith("test, same, partly (1 of 7).")
    assert "measured samples" not in " ".join(task_notes(measure(names, tmp_path)))
    failures = measure(names, tmp_path, shots=4).failures
    assert [failure.task for failure in failures] == ["test", "same"]
    assert "4 documents to draw 4 solved examples from" in failures[0].cause


def test_progress_adds_up_to_what_was_announced(own_tasks):
    seen = Recorder()
    measure(["pick", "last_word"], own_tasks, progress=seen)
    assert seen.announced == seen.done
    assert seen.announced["last_word"] == sum(
        len(encode(sample["text"])) for sample in read_samples(own_tasks, "last_word")
    )


def test_a_task_without_an_accuracy_is_measured_and_not_in_the_mean(own_tasks, tmp_path):
    texts = [{"text": words(random.Random(number), 9)} for number in range(3)]
    word_perplexity = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    settings = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write_task(tmp_path, "whole", texts, settings | {"metric_list": [word_perplexity]})
    model, seen = build("llama"), Recorder()
    result = measure(["whole"], tmp_path, model, progress=seen, precision="float32", batch_size=2)
    # The tokenizer has no token that begins a text; the configuration's is 1.
    total = sum(log_likelihood(model, "w1", text["text"])[0] for text in texts)
    assert result.scores[0].metrics["word_perplexity"].value == pytest.approx(math.exp(-total / 27), rel=1e-4)
    assert (result.scores[0].accuracy, result.mean) == (None, None)
    assert seen.announced == seen.done == {"whole": 27}
    assert "No mean: no task gave an accuracy." in task_notes(result)


def test_questions_that_are_too_long_are_said_to_be_cut(own_tasks, caplog):
    model = build("llama")
    model.config.max_position_embeddings = 5
    measure(["last_word"], own_tasks, model)
    # Those of seven words; of six, the last is only scored.
    assert f"last_word: {QUESTIONS // 3} of {QUESTIONS} requests are longer than the model's 5 tokens" in caplog.text


def test_a_broken_model_is_an_error_and_not_an_accuracy(own_tasks):
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="pick"):
        measure(["pick"], own_tasks, model)


def test_one_task_that_fails_does_not_lose_the_others(own_tasks, tmp_path):
    write_task(tmp_path, "good", read_samples(own_tasks, "last_word"), LAST_WORD)
    write_lost(tmp_path)
    write_task(tmp_path, "unlike", [{"other": "w1 w2"}], PICK)
    result = measure(["lost", "unlike", "good"], tmp_path)
    assert [score.task for score in result.scores] == ["good"]
    assert [failure.task for failure in result.failures] == ["lost", "unlike"]
    assert f"{tmp_path / 'lost.jsonl'} does not exist" in result.failures[0].cause
    assert f"data_files in {tmp_path / 'lost.yaml'}" in result.failures[0].remedy
    assert result.mean == result.scores[0].metrics["acc"].value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "'int4'"),
        ({"limit": 0}, "limit=0"),
        ({"shots": -1}, "shots=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_that_make_no_sense_are_refused(own_tasks, options, message):
    with pytest.raises(ConfigError, match=message):
        measure(["pick"], own_tasks, **options)


def test_a_task_that_generates_is_measured_with_progress(own_tasks, tmp_path):
    model, right = build("llama"), 0
    samples = read_samples(own_tasks, "last_word")
    for number, sample in enumerate(samples):
        word = next_word(model, sample["text"])
        # The tokenizer has no token that ends texts; the configuration's is 2, and a text is cut before it.
        sample["next"] = word if number % 2 and not word.startswith("w2") else "never"
        right += sample["next"] == word
    assert 0 < right < QUESTIONS
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{next}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 1, "do_sample": False},
        "metric_list": [mean_of("exact_match")],
    }
    write_task(tmp_path, "writes", samples, settings)
    write_task(tmp_path, "too_long", samples, settings | {"generation_kwargs": {"max_gen_toks": 500}})
    seen = Recorder()
    result = measure(["writes", "too_long"], tmp_path, model, progress=seen, precision="float32")
    assert [failure.task for failure in result.failures] == ["too_long"], result.failures
    assert result.scores[0].metrics["exact_match"].value == pytest.approx(right / QUESTIONS)
    assert result.mean == pytest.approx(right / QUESTIONS)
    assert seen.done["writes"] == seen.announced["writes"] == sum(len(encode(sample["text"])) for sample in samples)
    assert "(500) must be less than model's maximum sequence length (128)" in result.failures[0].cause


def test_the_chat_template_is_applied_and_recorded(own_tasks, prompts):
    talking = tokenizer()
    messages = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    talking.chat_template = f"{messages}w0"
    model, options = build("llama"), {"include_path": own_tasks, "limit": 1, "shots": 1}
    plain = evaluate_tasks(model, talking, ["last_word"], **options)
    (asked,) = prompts["last_word"]
    chat = evaluate_tasks(model, talking, ["last_word"], **options, apply_chat_template=True)
    example, question = asked.split("\n\n")
    first, answer = example.split("  ")
    assert prompts["last_word"] == [f"user {first} assistant  {answer} user {question} w0"]
    assert (plain.chat_template, chat.chat_template) == (False, True)
    assert "chat template" in task_notes(chat)[-1]
    assert "chat template" not in task_notes(plain)[-1]


LOCAL = Path(__file__).parents[3] / "shared" / "data" / "lm_tasks" / "tasks"


@pytest.mark.skipif(not LOCAL.is_dir(), reason="the local task files are not beside the repository")
def test_the_local_task_files_beside_the_repository_are_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = sorted(file.stem for file in LOCAL.glob("*.yaml"))
    model = build("llama")
    model.config.max_position_embeddings = 2048
    result = measure(names, LOCAL, model, limit=2, shots=1)
    assert result.failures == ()
    assert [score.task for score in result.scores] == names
    # All have one split only; some fix the examples at none.
    assert all(score.examples_measured == score.examples for score in result.scores)
    assert sum(score.shots for score in result.scores) >= 10
