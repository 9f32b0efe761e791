"""Budgets of a plan: how much may fall back to float, and what must not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from qatgraph.errors import PlanError, nearest
from qatgraph.planning.fallback import Fallback, fallbacks, work_of
from qatgraph.planning.plan import Plan
from qatgraph.planning.user_files import UserModel

SHOWN = 5


def parse_share(value: Any) -> Any:
    """``"10%"`` or ``0.1`` -> 0.1.

    Raises:
        ValueError: it is no share.
    """
    if not isinstance(value, str):
        return value
    number = value.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        share = float("nan")
    if not 0 <= share <= 1:
        raise ValueError(f"'{value}' is no share, such as 10% or 0.1")
    return share


class Budget(UserModel):
    """``max_fallback``: the largest share of the work that may run in float although the target has an int8 kernel for
    its kind, or it is made of products; work is estimated float time, or multiply-accumulates where the target has no
    costs. ``require``: kinds of which every node is int8. What a pass or a recipe pins in float counts like the rest.
    """

    max_fallback: Annotated[float, BeforeValidator(parse_share), Field(ge=0, le=1)] | None = None
    require: tuple[str, ...] = ()

    def check(self, plan: Plan) -> None:
        """Refuse a plan that misses it.

        Raises:
            PlanError: QG310 the plan misses the budget, QG311 the model has no node of a kind that is required.
        """
        kinds = {f.kind for f in plan.nodes if not f.absent}
        unknown = next((k for k in self.require if k not in kinds), None)
        if unknown is not None:
            near = nearest(unknown, kinds)
            raise PlanError(
                "QG311",
                f"the model has no operation of the kind '{unknown}'",
                where="require",
                why=f"did you mean {near}?" if near else f"it has {', '.join(sorted(kinds))}",
                todo="name a kind that the model has; `qatgraph plan` lists what falls back",
            )
        found, work = fallbacks(plan), work_of(plan)
        missing = [f for f in found if f.kind in self.require]
        if missing:
            many = f"{len(missing)} operations are" if len(missing) > 1 else f"'{missing[0].node}' is"
            raise _missed(f"{many} not int8, though every {' and '.join(self.require)} is required to be", missing)
        share = work.share(f.node for f in found)
        if self.max_fallback is not None and share > self.max_fallback:
            what = f"{share:.1%} of the work ({work.unit}) falls back to float, the budget is {self.max_fallback:.1%}"
            raise _missed(what, [f for f in found if work.of(f.node)])


def _missed(what: str, found: Iterable[Fallback]) -> PlanError:
    lines = [f.text() for f in found]
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    remedies = dict.fromkeys(f.remedy for f in found if f.remedy)
    return PlanError(
        "QG310",
        f"the plan misses its budget: {what}",
        where="; ".join([*lines[:SHOWN], *more]),
        why="; ".join(dict.fromkeys(f"'{f.node}': {f.why}" for f in [*found][:SHOWN])),
        todo=next(iter(remedies), "") or "raise the budget, or choose another target",
    )
