"""A run in several processes that ends inside a shot, goes on, and is compared with one that did not end."""

import sys
from pathlib import Path

from llm_surgeon import prune_checkpoint
from llm_surgeon.session import marks as marks_module
from llm_surgeon.session.marks import Marks

OPTIONS = {
    "preset": "fast",
    "samples": 8,
    "seq_len": 16,
    "batch_size": 2,
    "precision": "float32",
    "evaluation": "none",
    "device": "cpu",
}
# The second model of cross-fitting is under way by then.
END = 9


class EndedError(Exception):
    """The end of a process."""


def main(checkpoint: str, text: str, folder: Path) -> None:
    """Run three times; states are kept as often as possible."""
    marks_module.OFTEN = marks_module.WORTH = 0.0
    write, kept = Marks.write, [0]

    def counted(self, *given) -> None:
        write(self, *given)
        kept[0] += 1
        if kept[0] == END:
            raise EndedError

    def run(name: str) -> None:
        prune_checkpoint(checkpoint, folder / name, OPTIONS | {"calibration": text})

    run("whole")
    Marks.write = counted
    try:
        run("ended")
    except EndedError:
        assert (folder / "ended.run" / "inside-first.sha256").exists()
        run("ended")
        return
    raise AssertionError("the run did not keep as many states")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
