import importlib.util
import json
import math
import random
import time
from contextlib import contextmanager

import pytest
import torch
import yaml
from torch.nn import functional as F
from typer.testing import CliRunner

from llm_surgeon import PruneConfig, load, prune
from llm_surgeon.cli import app
from llm_surgeon.errors import ConfigError, NonFiniteError
from llm_surgeon.evaluation import tasks as module
from llm_surgeon.evaluation.tasks import TaskSelection, accuracy_of, evaluate_tasks, find_tasks
from llm_surgeon.records import Evaluation, TaskMetric, TaskScores
from llm_surgeon.report.task_table import task_notes
from tiny import VOCABULARY, build, tokenizer

runner = CliRunner()
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

QUESTIONS = 24


def flat(text):
    return " ".join(text.split())


def words(generator, count):
    return " ".join(f"w{generator.randrange(VOCABULARY)}" for _ in range(count))


@pytest.fixture(scope="session")
def own_tasks(tmp_path_factory):
    """A directory with two tasks: a choice among answers of one to four words, and the last word of a text."""
    path = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)
    choices = [
        {
            "question": words(generator, generator.randint(3, 9)),
            "answers": [words(generator, generator.randint(1, 4)) for _ in range(3)],
            "right": generator.randrange(3),
        }
        for _ in range(QUESTIONS)
    ]
    write_task(
        path,
        "pick",
        choices,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "right",
            "doc_to_choice": "answers",
            "metric_list": [mean_of("acc"), mean_of("acc_norm")],
            "metadata": {"version": 3.0},
        },
    )
    model = build("llama")
    texts = [{"text": words(generator, 6)} for _ in range(QUESTIONS)]
    for number, text in enumerate(texts):
        # A third of them end as the model would end them, or the accuracy would be zero.
        if number % 3 == 0:
            text["text"] += f" w{int(model(encode(text['text'])[None]).logits[0, -1].argmax())}"
    write_task(
        path,
        "last_word",
        texts,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                mean_of("acc"),
            ],
            "metadata": {"version": 1.0},
        },
    )
    return path


def mean_of(metric):
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def write_task(path, name, samples, settings):
    data = path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf8")
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "training_split": "train",
        "test_split": "test",
    }
    (path / f"{name}.yaml").write_text(yaml.safe_dump(source | settings), encoding="utf8")


def read_samples(path, name):
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text(encoding="utf8").splitlines()]


def encode(text):
    return torch.tensor([int(word[1:]) for word in text.split()])


@torch.no_grad()
def log_likelihood(model, context, answer):
    """Of the answer after the context, from a plain pass of one sequence; and whether it is the model's own choice."""
    ids = torch.cat([encode(context), encode(answer)])
    start = len(encode(context))
    scores = F.log_softmax(model(ids[None]).logits[0, start - 1 : -1].double(), dim=-1)
    return float(scores.gather(1, ids[start:, None]).sum()), bool((scores.argmax(-1) == ids[start:]).all())


def picked(model, path, count=QUESTIONS):
    """Accuracy with and without the division by the answer's length in characters, by hand."""
    right, right_by_length = 0, 0
    for sample in read_samples(path, "pick")[:count]:
        scores = [log_likelihood(model, sample["question"], answer)[0] for answer in sample["answers"]]
        by_length = [score / len(answer) for score, answer in zip(scores, sample["answers"], strict=True)]
        right += scores.index(max(scores)) == sample["right"]
        right_by_length += by_length.index(max(by_length)) == sample["right"]
    return right / count, right_by_length / count


def ended(model, path):
    """Perplexity of the last words, and how often each is the model's own choice, by hand."""
    results = []
    for sample in read_samples(path, "last_word"):
        context, _, word = sample["text"].rpartition(" ")
        results.append(log_likelihood(model, context, word))
    return math.exp(-sum(value for value, _ in results) / QUESTIONS), sum(greedy for _, greedy in results) / QUESTIONS


@pytest.fixture(scope="session")
def export(checkpoint, tmp_path_factory):
    """A tiny Llama whose matrices have shrunk."""
    out = tmp_path_factory.mktemp("exports") / "pruned"
    text = out.parent / "text.txt"
    text.write_text(words(random.Random(1), 4_000), encoding="utf8")
    model, own = load(checkpoint)
    settings = {"sparsity": 0.3, "shots": 1, "samples": 8, "seq_len": 32, "evaluation": "none"}
    prune(model, own, PruneConfig(calibration=str(text), **settings), out=out)
    return out


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


@needs_lm_eval
@pytest.mark.parametrize("kind", ["dense", "masked", "export"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_equals_plain_passes_by_hand(models, own_tasks, kind, batch_size):
    model = models(kind)
    result = evaluate_tasks(
        model,
        tokenizer(),
        ["pick", "last_word"],
        include_path=own_tasks,
        batch_size=batch_size,
        precision="float32",
    )
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


@needs_lm_eval
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


@needs_lm_eval
def test_a_limit_takes_the_first_samples_and_says_so(own_tasks):
    model = build("llama")
    result = evaluate_tasks(model, tokenizer(), ["pick"], include_path=own_tasks, limit=7, precision="float32")
    assert result.scores[0].metrics["acc"].value == pytest.approx(picked(model, own_tasks, 7)[0])
    assert (result.scores[0].samples, result.scores[0].samples_total, result.limit) == (7, QUESTIONS, 7)


@needs_lm_eval
def test_shots_come_before_the_question_and_depend_on_the_seed_only(own_tasks):
    def measure(shots, seed):
        result = evaluate_tasks(
            *(build("llama"), tokenizer(), ["last_word"]),
            **{"include_path": own_tasks, "shots": shots, "seed": seed, "precision": "float32"},
        )
        return result.scores[0]

    none, first = measure(0, 0), measure(2, 0)
    assert (none.shots, first.shots) == (0, 2)
    assert first.metrics["perplexity"] != none.metrics["perplexity"]
    assert first.metrics == measure(2, 0).metrics
    assert first.metrics != measure(2, 1).metrics


@needs_lm_eval
def test_a_task_named_twice_counts_once(own_tasks):
    assert find_tasks(["pick", " pick ", "last_word", ""], own_tasks).names == ("pick", "last_word")


class Recorder:
    """Tokens announced and done, by phase."""

    def __init__(self):
        self.announced, self.done = {}, {}

    @contextmanager
    def phase(self, description, total_tokens):
        assert description not in self.announced
        self.announced[description], self.done[description] = total_tokens, 0
        self.name = description
        yield self

    def advance(self, tokens):
        self.done[self.name] += tokens


@needs_lm_eval
def test_progress_adds_up_to_what_was_announced(own_tasks):
    seen = Recorder()
    evaluate_tasks(build("llama"), tokenizer(), ["pick", "last_word"], include_path=own_tasks, progress=seen)
    assert seen.announced == seen.done
    assert seen.announced["last_word"] == sum(
        len(encode(sample["text"])) for sample in read_samples(own_tasks, "last_word")
    )


@needs_lm_eval
def test_a_task_without_an_accuracy_is_measured_and_not_in_the_mean(own_tasks, tmp_path):
    texts = [{"text": words(random.Random(number), 9)} for number in range(3)]
    word_perplexity = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    settings = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write_task(tmp_path, "whole", texts, settings | {"metric_list": [word_perplexity]})
    model, seen = build("llama"), Recorder()
    result = evaluate_tasks(
        *(model, tokenizer(), ["whole"]), include_path=tmp_path, progress=seen, precision="float32", batch_size=2
    )
    # The tokenizer has no token that begins a text; the configuration's is 1.
    total = sum(log_likelihood(model, "w1", text["text"])[0] for text in texts)
    assert result.scores[0].metrics["word_perplexity"].value == pytest.approx(math.exp(-total / 27), rel=1e-4)
    assert (result.scores[0].accuracy, result.mean) == (None, None)
    assert seen.announced == seen.done == {"whole": 27}
    assert "Not in the mean, for want of an accuracy: whole." in task_notes(result)


@needs_lm_eval
def test_questions_that_are_too_long_are_said_to_be_cut(own_tasks, caplog):
    model = build("llama")
    model.config.max_position_embeddings = 5
    evaluate_tasks(model, tokenizer(), ["last_word"], include_path=own_tasks)
    # Those of seven words; of six, the last is only scored.
    assert f"last_word: {QUESTIONS // 3} of {QUESTIONS} requests are longer than the model's 5 tokens" in caplog.text


@needs_lm_eval
def test_a_broken_model_is_an_error_and_not_an_accuracy(own_tasks):
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="pick"):
        evaluate_tasks(model, tokenizer(), ["pick"], include_path=own_tasks)


@needs_lm_eval
def test_one_task_that_fails_does_not_lose_the_others(own_tasks, tmp_path):
    write_task(tmp_path, "good", read_samples(own_tasks, "last_word"), settings_of(own_tasks, "last_word"))
    write_task(tmp_path, "lost", [{"text": "w1 w2"}], settings_of(own_tasks, "last_word"))
    (tmp_path / "lost.jsonl").unlink()
    write_task(tmp_path, "unlike", [{"other": "w1 w2"}], settings_of(own_tasks, "pick"))
    result = evaluate_tasks(build("llama"), tokenizer(), ["lost", "unlike", "good"], include_path=tmp_path)
    assert [score.task for score in result.scores] == ["good"]
    assert [failure.task for failure in result.failures] == ["lost", "unlike"]
    assert "lost.jsonl" in result.failures[0].cause
    assert "--tasks-path" in result.failures[0].remedy
    assert result.mean == result.scores[0].metrics["acc"].value


def settings_of(path, name):
    """All settings of a task but its name and data."""
    settings = yaml.safe_load((path / f"{name}.yaml").read_text(encoding="utf8"))
    return {key: value for key, value in settings.items() if key not in ("task", "dataset_kwargs")}


@needs_lm_eval
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "'int4'"),
        ({"limit": 0}, "limit=0"),
        ({"shots": -1}, "shots=-1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_options_that_make_no_sense_are_refused(own_tasks, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_tasks(build("llama"), tokenizer(), ["pick"], include_path=own_tasks, **options)


def test_what_enters_the_mean():
    def chosen(*names):
        return accuracy_of({name: TaskMetric(value=0.5, stderr=None) for name in names})

    assert chosen("acc_norm", "acc") == "acc"
    assert chosen("perplexity", "acc_norm") == "acc_norm"
    assert chosen("exact_match,strict-match", "exact_match,flexible-extract") == "exact_match,strict-match"
    assert chosen("word_perplexity", "accuracy_of_nothing") is None


def test_without_lm_eval_the_extra_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    done = runner.invoke(app, ["eval", str(tmp_path / "no-such-model"), "--tasks", "boolq"])
    assert done.exit_code == 1
    assert 'pip install "llm-surgeon[tasks]"' in flat(done.output)
    assert "Traceback" not in done.output


@needs_lm_eval
def test_the_command_prints_and_writes_what_it_measured(export, own_tasks, tmp_path):
    out = tmp_path / "scores.json"
    options = ["--tasks", "pick,last_word,pick", "--tasks-path", str(own_tasks), "--precision", "float32"]
    done = runner.invoke(app, ["eval", str(export), *options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    model = load(export)[0]
    mean = (picked(model, own_tasks)[0] + ended(model, own_tasks)[1]) / 2
    assert f"mean {100 * mean:.2f} %" in flat(done.stdout)
    assert "acc over 2 of the 2 tasks" in flat(done.stdout)
    assert "tokens scored" not in done.stdout
    written = Evaluation.model_validate_json(out.read_text(encoding="utf8"))
    assert written.tasks.mean == pytest.approx(mean)
    assert written.perplexity is None


@needs_lm_eval
def test_the_command_keeps_results_and_ends_with_one_if_a_task_failed(checkpoint, own_tasks, text_file, tmp_path):
    write_task(tmp_path, "good", read_samples(own_tasks, "last_word"), settings_of(own_tasks, "last_word"))
    write_task(tmp_path, "lost", [{"text": "w1 w2"}], settings_of(own_tasks, "last_word"))
    (tmp_path / "lost.jsonl").unlink()
    out = tmp_path / "scores.json"
    texts = ["--data", str(text_file), "--window", "32", "--tokens", "128"]
    options = ["--tasks", "good,lost", "--tasks-path", str(tmp_path), "--limit", "4", "--out", str(out)]
    done = runner.invoke(app, ["eval", str(checkpoint), *texts, *options])
    assert done.exit_code == 1
    assert "124 tokens scored" in flat(done.stdout)
    assert "acc over 1 of the 2 tasks" in flat(done.stdout)
    assert "because they failed: lost" in flat(done.stdout)
    assert "only the first 4 samples" in flat(done.stdout).lower()
    assert "The data set json" in flat(done.stderr)
    assert "Traceback" not in done.output
    written = Evaluation.model_validate_json(out.read_text(encoding="utf8"))
    assert ([one.task for one in written.tasks.scores], written.perplexity.tokens) == (["good"], 124)


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", " , "], "No task is named"),
        (["--tasks", "pick", "--tasks-path", "missing"], "missing"),
        (["--limit", "3"], "no tasks"),
        (["--tasks", "pick", "--out", "missing/scores.json"], "No file can be made"),
        (["--tasks", "pick", "--out", "."], "exists"),
    ],
)
def test_mistakes_are_messages_before_the_model_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = runner.invoke(app, ["eval", str(tmp_path / "no-such-model"), *arguments])
    assert done.exit_code == 1
    assert message in flat(done.output)
    assert "Traceback" not in done.output


@pytest.fixture(scope="module")
def published():
    """The tasks of the README, in the index of all of lm-eval's; reading that takes seconds."""
    names = "boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa,copa,lambada_openai,wsc273"
    return find_tasks(names.split(","))


@needs_lm_eval
def test_names_close_to_an_unknown_one_are_suggested_and_groups_are_refused(published, monkeypatch):
    monkeypatch.setattr("llm_surgeon.evaluation.harness.index_tasks", lambda names, path: published.index)
    with pytest.raises(ConfigError, match=r"'helaswag' is not known.*: .*hellaswag"):
        find_tasks(["boolq", "helaswag"])
    with pytest.raises(ConfigError, match="'mmlu' is a group of tasks"):
        find_tasks(["mmlu"])


@needs_lm_eval
def test_without_network_a_data_set_is_a_message_within_seconds(published, tmp_path, monkeypatch):
    """The switch is read when the hub's client is imported, so it is set where it is kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    start = time.perf_counter()
    result = evaluate_tasks(build("llama"), tokenizer(), TaskSelection(("boolq",), published.index))
    assert time.perf_counter() - start < 5
    (failure,) = result.failures
    assert failure.task == "boolq"
    assert "aps/super_glue, boolq" in failure.cause
    assert "Connect to the network" in failure.remedy
    assert result.mean is None
