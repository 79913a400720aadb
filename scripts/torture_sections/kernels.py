"""The C++ kernels against PyTorch in float64, all their memory between guard bytes, for shapes of any kind."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import strategies as st

from torture_sections.children import value_of
from torture_sections.section import Section, check, drawn

LINEAR_SHAPES, STEP_SHAPES = 60, 20
"""Of one trial."""


class KernelsSection(Section):
    """A trial is a process with some dozens of shapes: one that overwrites memory ends with it."""

    name = "kernels"
    share = 6
    short_trials = 1
    reason: str | None = None

    def set_up(self) -> None:
        """Find out whether there are kernels, and why not."""

        def status() -> str | None:
            from lit_gpt.inference import native

            return None if native.load() is not None else native.status()

        self.reason = value_of(status)
        if self.reason is not None:
            self.tally("skipped").remark = self.reason

    def trial(self, random: Random) -> None:
        """Linear layers, then whole steps."""
        if self.reason is not None:
            return
        import test_guard_zones as zones

        number = random.randrange(2**31)
        share = 3 if self.short else 1
        linear = drawn(st.tuples(*zones.LINEAR), LINEAR_SHAPES // share, number)
        steps = drawn(st.tuples(*zones.STEP), STEP_SHAPES // share, number)
        self._compare("linear layers of random shapes, in all forms", "check_linear", linear)
        self._compare("steps of random models, in all forms, 1 to 3 threads", "check_step", steps)

    def _compare(self, what: str, function: str, arguments: list[Any]) -> None:
        def compare() -> list[str]:
            import test_guard_zones as zones
            import torch

            wrong = []
            with torch.inference_mode():
                for values in arguments:
                    try:
                        getattr(zones, function)(*values)
                    except AssertionError as error:
                        wrong.append(f"{values}: {str(error).splitlines()[:1]}")
            return wrong

        with self.trying(what, len(arguments)) as tally:
            tally.how = f"shapes {arguments[0]} and after"
            wrong = value_of(compare)
            check(not wrong, f"{len(wrong)} of {len(arguments)} shapes are wrong, first {wrong[:1]}")
