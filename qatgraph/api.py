"""The public verbs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatgraph.errors import PlanError, TargetError, VerifyError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from qatgraph.engines import Simulator
    from qatgraph.frontend.inputs import DynamicShapes
    from qatgraph.ir.graph import Batch, Graph
    from qatgraph.planning.plan import Plan
    from qatgraph.planning.recipe import Recipe
    from qatgraph.planning.target import Target
    from qatgraph.probing.report import EngineDiff, ProbeReport
    from qatgraph.report.report import Report
    from qatgraph.rewriting.passes import Pass


def capture(
    model: torch.nn.Module | ExportedProgram,
    inputs: Batch | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    *,
    output_names: tuple[str, ...] | None = None,
    share_with: Graph | None = None,
) -> Graph:
    """Trace a model into a graph, or take over an exported program; see ``qatgraph.frontend.capture``."""
    from qatgraph.frontend import capture as run

    return run(model, inputs, dynamic_shapes, output_names=output_names, share_with=share_with)


def canonicalize(
    graph: Graph,
    passes: Sequence[Pass] = (),
    *,
    data: Sequence[Batch] | None = None,
    target: str | Target = "ort-cpu",
    recipe: str | Recipe = "int8",
) -> Graph:
    """Run the canonical pipeline, then the graph passes among ``passes``; every pass is checked.

    Args:
        graph: what ``capture`` returned.
        passes: further passes.
        data: calibration batches, for passes that search by the error on them (``scale-outliers``); they see the grids
            of the plan that ``target`` and ``recipe`` give. Plan and prepare the graph that this returns.

    Raises:
        PassError: QG2xx a pass failed or broke its contract; QG218 a pass needs data.
    """
    from qatgraph.passes import CANONICALIZE
    from qatgraph.rewriting.evidence import Evidence
    from qatgraph.rewriting.manager import PassManager
    from qatgraph.rewriting.registry import make_pass

    pipeline = [*(make_pass(p) for p in CANONICALIZE), *passes]
    evidence = None if data is None else Evidence(data, lambda g: decide(g, target, recipe), progress=True)
    return PassManager(pipeline, evidence=evidence).run(graph)


def plan(
    graph: Graph,
    target: str | Target = "ort-cpu",
    recipe: str | Recipe = "int8",
    *,
    passes: Sequence[Pass] = (),
) -> Plan:
    """Decide what becomes int8 on a target, and why. The graph stays as it is.

    Args:
        graph: what ``capture`` or ``canonicalize`` returned.
        target: a built-in name, the path of a TOML file, or a Target.
        recipe: ``"int8"``, the path of a TOML file, or a Recipe.
        passes: further passes; rewrites run at the end of canonicalization, planning passes after the built-in ones.

    Raises:
        PlanError: QG301 a selector matches nothing, QG305 constraints contradict each other.
        TargetError: QG401, QG402 the target is unknown or not valid.
    """
    return decide(canonicalize(graph, passes), target, recipe, passes)


def decide(canonical: Graph, target: str | Target, recipe: str | Recipe, passes: Sequence[Pass] = ()) -> Plan:
    """The plan of a graph as it is; ``plan`` canonicalizes it before."""
    from qatgraph.planning.build import PlanningContext, build_plan
    from qatgraph.planning.facts import facts_of
    from qatgraph.planning.recipe import load_recipe
    from qatgraph.planning.stated import stated
    from qatgraph.planning.target import Target, load_target

    table = target if isinstance(target, Target) else load_target(target)
    wish = load_recipe(recipe)
    context = PlanningContext(table, wish, facts_of(canonical))
    constraints = stated([*_asked(table), *passes], canonical, context)
    hashes = {
        "graph": canonical.structural_hash(),
        "weights": canonical.weights_hash(),
        "target": table.hash(),
        "recipe": wish.hash(),
    }
    return build_plan(context, constraints, hashes)


def _asked(table: Target) -> tuple[Pass, ...]:
    """The planning passes of a target."""
    from qatgraph.rewriting.passes import PlanningPass
    from qatgraph.rewriting.pipeline import Pipeline

    steps = Pipeline.parse(table.pipeline).steps
    other = next((s for s in steps if not isinstance(s, PlanningPass)), None)
    if other is not None:
        raise TargetError(
            "QG402",
            f"the pipeline of the target '{table.name}' holds '{other.name}', which changes graphs",
            where=f"pipeline = '{table.pipeline}'",
            why="a plan is made for a graph as it is",
            todo=f"leave it out, and give '{other.name}' to canonicalize, or to a job with --passes",
        )
    return steps


def prepare(graph: Graph, plan: Plan, *, passes: Sequence[Pass] = ()) -> torch.nn.Module:
    """The trainable model: the captured model with the plan's fake quantizers, and the model's signature.

    Its parameters are the graph's (not the user's model's). Quantizers pass values through until ``calibrate``.

    Raises:
        PlanError: QG307 the plan was made for another model.
    """
    from qatgraph.ir.stages import Stage
    from qatgraph.passes.insert_quantizers import InsertQuantizers
    from qatgraph.rewriting.manager import PassManager

    canonical = canonicalize(graph, passes)
    if plan.hashes.get("graph") != canonical.structural_hash():
        raise PlanError(
            "QG307",
            "the plan was made for another model",
            where=f"plan for {plan.target}, {len(plan.nodes)} nodes",
            why="the structural hash of the graph differs: another architecture, input, torch version or set of passes",
            todo="make a new plan with `qatgraph plan JOB.toml`, and compare with `qatgraph diff`",
        )
    prepared = PassManager([InsertQuantizers(plan)], leaves=Stage.PREPARED).run(canonical)
    prepared.set_info(plan=plan)
    return prepared.module


def calibrate(qat: torch.nn.Module, batches: Iterable[Batch], *, progress: bool = True) -> list[str]:
    """Find the grids on batches; returns what is odd about them. See ``qatgraph.calibration.calibrate``."""
    from qatgraph.calibration import calibrate as run

    return run(qat, batches, progress=progress)


def correct_biases(qat: torch.nn.Module, batches: Sequence[Batch], *, progress: bool = True) -> None:
    from qatgraph.bias_correction import correct_biases as run

    run(qat, batches, progress=progress)


def lower(qat: torch.nn.Module, path: str | Path) -> Path:
    """Convert a calibrated model and write the artifact of its plan's target, atomically.

    Raises:
        LowerError: QG5xx not calibrated, not exportable, or not writable.
        TargetError: QG403 the target has no backend.
    """
    from qatgraph.conversion import convert
    from qatgraph.ir.graph import Graph

    prepared = Graph.prepared(qat)
    backend = load_backend(prepared.info.plan)
    data: bytes = backend.lower(convert(prepared), prepared.info.plan)
    backend.write(Path(path), data)
    return Path(path)


def load_backend(plan: Plan) -> Any:
    """The module that lowers, loads and audits for the plan's target.

    Raises:
        TargetError: QG403 its table names none, or one that is not there, does not import, or cannot lower.
    """
    if not plan.backend:
        raise TargetError(
            "QG403",
            f"the target '{plan.target}' can be planned for, but not lowered to",
            where=plan.target,
            why="its table names no backend",
            todo="write a module with lower(graph, plan), write, load and audit beside backends/ort_cpu.py, "
            "and name it in the table: backend = '...'",
        )
    try:
        found = import_module(f"qatgraph.backends.{plan.backend}")
    except ImportError as error:
        raise _no_backend(plan, str(error)) from error
    if not hasattr(found, "lower"):
        raise _no_backend(plan, f"qatgraph.backends.{plan.backend} has no function lower(graph, plan)")
    return found


def _no_backend(plan: Plan, why: str) -> TargetError:
    from qatgraph.planning.target import backend_names

    known = backend_names()
    return TargetError(
        "QG403",
        f"the backend '{plan.backend}' cannot be used",
        where=f"backend = '{plan.backend}' in the table of the target '{plan.target}'",
        why=why,
        todo=f"name one that exists ({', '.join(known)}), or leave the key out, to plan only",
    )


def verify(
    qat: torch.nn.Module,
    artifact: str | Path,
    batches: Sequence[Batch],
    *,
    float_model: torch.nn.Module | None = None,
    labels: Sequence[torch.Tensor] | None = None,
) -> Report:
    """Prove an artifact: kernels, overflow, every region against the integer reference, distance to the models.

    With an engine of a version that the target was not tested with, the rows that the plan uses are probed as well.

    Args:
        qat: the model that was lowered.
        artifact: the file.
        batches: evaluation batches.
        float_model: the user's model; without it the distance to float is not reported.
        labels: one tensor a batch, for top-1.

    Returns:
        The report; ``report.check()`` raises if anything failed.
    """
    from qatgraph.ir.graph import Graph
    from qatgraph.proof import prove
    from qatgraph.tested import check_version

    path = Path(artifact)
    if not path.is_file():
        raise VerifyError("QG604", f"there is no file '{path.name}'", where=str(path.parent), todo="lower first")
    plan = Graph.prepared(qat).info.plan
    backend = load_backend(plan)
    report = prove(backend, qat, path.read_bytes(), list(batches), float_model, labels)
    check_version(report, plan, backend)
    return report


def probe(
    target: str | Target,
    *,
    engine: Simulator | None = None,
    isa: str = "native",
    version: str = "",
    rows: str = "*",
    examples: int = 50,
    progress: bool = True,
) -> ProbeReport:
    """Run every row of a target as small models, and find the smallest that its engine does not honour.

    Args:
        target: a name, a TOML file, or a table.
        engine: a function ``Case -> Realized`` in place of the engine of the target's backend.
        isa: the instruction set; other ones than the machine's own are emulated.
        version: the version of the engine, by default the installed one; another is fetched once, into a cache.
        rows: a glob of row ids.
        examples: so many models a row.
        progress: show a bar.

    Raises:
        TargetError: QG406 an operation of which there is no small model, QG407 no such row, QG408 hypothesis is not
            installed, QG409 no such instruction set, QG410 no engine, QG411 the engine gives something else.
        VerifyError: QG608 there is no emulator, QG609 it died, QG611 what is not installed cannot be fetched.
    """
    from qatgraph.planning.target import load_target

    _check_hypothesis()
    from qatgraph.engines import open_engine
    from qatgraph.probing.search import probe as run

    table = load_target(target) if isinstance(target, str) else target
    with open_engine(table, isa, version, engine) as ready:
        return run(table, ready, rows=rows, examples=examples, progress=progress)


def probe_diff(
    target: str | Target,
    other: str,
    *,
    isa: str = "native",
    version: str = "",
    rows: str = "*",
    examples: int = 50,
    progress: bool = True,
) -> EngineDiff:
    """Run the same small models on two engines of a target: what changed, row by row.

    Args:
        other: the version of the second engine, or its instruction set; the rest is as in the first.

    The other arguments and what is raised are those of ``probe``.
    """
    from qatgraph.planning.target import load_target

    _check_hypothesis()
    from qatgraph.engines import open_engine
    from qatgraph.probing.comparing import compare

    table = load_target(target) if isinstance(target, str) else target
    second = (isa, other) if other[:1].isdigit() else (other, version)
    with open_engine(table, isa, version) as one, open_engine(table, *second) as two:
        return compare(table, one, two, rows=rows, examples=examples, progress=progress)


def _check_hypothesis() -> None:
    try:
        import hypothesis  # noqa: F401
    except ModuleNotFoundError as error:
        todo = "install it: pip install 'qatgraph[probe]'"
        raise TargetError("QG408", "probing needs hypothesis", where="probe", why=str(error), todo=todo) from error
