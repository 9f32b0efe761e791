"""A pass and a target in a package of their own; pyproject.toml names them as entry points."""

from importlib import resources

import qatgraph as qg

MINI_NPU = resources.files(__name__) / "mini_npu.toml"


class FoldDoubleAbs(qg.RewritePass):
    """Remove the absolute value of an absolute value.

    What: ``abs(abs(x))`` becomes ``abs(x)``.
    Why: the second one changes nothing.
    Before and after: as above.
    Refuses: nothing.
    Numerics: same.
    """

    name = "fold-double-abs"
    numerics = qg.same
    pattern = qg.Op("abs", qg.Op("abs", name="inner"), name="outer")

    def rewrite(self, match: qg.Match, edit: qg.Edit) -> None:
        edit.bypass(match["outer"], match["inner"])
