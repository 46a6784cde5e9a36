import logging

import pytest

from llm_surgeon.system.logs import log_to_stderr


@pytest.mark.parametrize(("process", "said"), [(0, "as usual\ncareful"), (2, "process 2: careful")])
def test_processes_but_the_first_log_warnings_only_and_say_who_they_are(process, said, capsys):
    logger = logging.getLogger("llm_surgeon")
    level, handlers = logger.level, logger.handlers
    try:
        log_to_stderr(process)
        logger.info("as usual")
        logger.warning("careful")
    finally:
        logger.setLevel(level)
        logger.handlers = handlers
    assert "\n".join(line.strip() for line in capsys.readouterr().err.splitlines()) == said
