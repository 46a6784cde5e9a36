import logging
import time
from types import SimpleNamespace

from evaluation.own_tasks import LAST_WORD, measure, needs_lm_eval, read_samples, write_code, write_task

pytestmark = needs_lm_eval


def test_without_network_all_data_sets_are_messages_within_seconds(few_published, unreachable, capfd):
    before = switches()
    start = time.perf_counter()
    result = measure(["boolq", "piqa", "hellaswag"])
    assert time.perf_counter() - start < 5
    assert [failure.task for failure in result.failures] == ["boolq", "piqa", "hellaswag"]
    assert "aps/super_glue, boolq" in result.failures[0].cause
    assert all("Connect to the network" in failure.remedy for failure in result.failures)
    assert result.mean is None
    # Asked once, and briefly: the hub's own client would ask six times.
    (seconds,) = unreachable
    assert seconds <= 5
    assert switches() == before
    assert "".join(capfd.readouterr()) == ""


def test_a_hub_that_is_switched_off_is_not_asked_and_the_switch_is_named(few_published, unreachable, monkeypatch):
    """The switch is read when the hub's client is imported, so it is also set where it is kept."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = measure(["boolq"])
    assert "without HF_HUB_OFFLINE" in result.failures[0].remedy
    assert unreachable == []
    assert switches()[0] is True


def switches():
    from datasets import config
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE


def test_code_that_finds_no_network_stops_the_questions_of_those_that_follow(unreachable, tmp_path):
    """A task's own code may ask anything, but an error of its connection tells whether to ask the hub."""
    write_code(tmp_path, "asks", "raise ConnectionError('no route')")
    write_code(tmp_path, "local", "pass")
    result = measure(["asks", "local"], tmp_path)
    assert [score.task for score in result.scores] == ["local"]
    assert "hub cannot be reached" in result.failures[0].cause
    assert len(unreachable) == 1


def test_a_broken_connection_to_elsewhere_is_not_laid_on_the_hub(tmp_path, monkeypatch):
    hub = SimpleNamespace(head=lambda url, timeout: None)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: hub)
    write_code(tmp_path, "asks", "raise ConnectionError('no route to example.org')")
    (failure,) = measure(["asks"], tmp_path).failures
    assert "no route to example.org" in failure.cause
    assert "Connect" not in failure.remedy


def test_lines_and_bars_of_other_packages_are_out_while_tasks_run_and_back_afterwards(
    own_tasks, tmp_path, capfd, caplog
):
    body = (
        "import logging, sys, tqdm, tqdm.auto\n"
        "    logging.getLogger('huggingface_hub.utils').warning('Retrying in 1s')\n"
        "    list(tqdm.tqdm(range(3))); list(tqdm.auto.tqdm(range(3), disable=False))"
    )
    write_code(tmp_path, "loud", body)
    write_task(tmp_path, "quiet", read_samples(own_tasks, "last_word"), LAST_WORD)
    result = measure(["loud", "quiet"], tmp_path)
    assert result.failures == ()
    assert "".join(capfd.readouterr()) + caplog.text == ""
    from datasets import Dataset

    Dataset.from_list([{"a": 1}] * 3).map(lambda row: {"b": 2})
    logging.getLogger("huggingface_hub.utils").warning("afterwards")
    assert "Map" in capfd.readouterr().err
    assert "afterwards" in caplog.text
