"""Progress as a run has shown it, for comparison with what was announced."""

from contextlib import contextmanager


class Shown:
    """A display that remembers its phases.

    Attributes:
        announced: Units of each phase by its words, in order.
        counted: Units that each phase has advanced by.
        planned: Phases that the plan of the run foresaw, by their words; empty without a plan.
    """

    def __init__(self):
        self.announced, self.counted, self.planned = {}, {}, {}

    def expect(self, planned):
        self.planned = dict(planned)

    @contextmanager
    def phase(self, description, total, unit="tokens"):
        assert description not in self.announced, "each phase has words of its own"
        self.announced[description], self.counted[description] = total, 0
        self._now = description
        yield self

    def advance(self, count):
        self.counted[self._now] += count
