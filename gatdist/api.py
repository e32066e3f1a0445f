"""The functions behind the commands, for Python: each takes what its command takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gatdist.config import Config
from gatdist.errors import CheckpointError, ClusterError, InterruptedRunError
from gatdist.storage import absolute

if TYPE_CHECKING:
    from gatdist.monitor.console import Console


def train(
    config: Config, run_dir: str, *, local: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train, or resume the run in ``run_dir``.

    Args:
        config: from :func:`gatdist.load_config`.
        run_dir: any fsspec URL or path.
        local: in this process, without Ray; else ``cluster.workers`` workers under Ray Train.
        console: shows progress; None shows nothing.

    Returns:
        ``status`` ("finished" or "converged"), ``reason``, ``samples_seen``, ``metrics`` of the
        last evaluation.

    Raises:
        InterruptedRunError: asked to stop; a checkpoint was written and the same call resumes.
        GatdistError: see :mod:`gatdist.errors`.
    """
    run_dir = absolute(run_dir)
    if local:
        if config.cluster.max_workers > 1:
            raise ClusterError(
                "--local", "runs one process", value=True, mend="Leave out --workers, or --local"
            )
        from gatdist.training.local import run_here

        outcome = run_here(config, run_dir, console)
    else:
        from gatdist.cluster.launch import fit
        from gatdist.training.plan import check

        check(config, run_dir)  # here, since Ray takes a while to start
        outcome = fit(config, run_dir, console)
    if outcome["status"] == "interrupted":
        raise InterruptedRunError(
            f"interrupted at {outcome['samples_seen']:,} samples; everything is saved in {run_dir} "
            "and the same command goes on from there"
        )
    return outcome


def sample(run: str, num: int, *, out: str, seed: int = 0, grid: bool = False) -> list[str]:
    """Write ``num`` fakes of the run's averaged generator into the folder ``out``.

    Args:
        run: a run directory.
        num: how many (> 0).
        out: a folder (``000000.png`` …), or with ``grid`` one picture.
        seed: of the noise; the same seed gives the same fakes, whatever ``num`` is.
        grid: one picture of all.

    Returns:
        The URLs of the files written.

    Raises:
        CheckpointError: ``run`` is no run, or has no whole checkpoint.
    """
    from gatdist.runs import load_generator
    from gatdist.sampling import write_samples
    from gatdist.storage import Store

    generator = load_generator(Store(absolute(run)), default_device())
    return write_samples(generator, num, seed=seed, out=absolute(out), grid=grid)


def evaluate(run: str, metrics: list[str] | None = None, num: int | None = None) -> dict[str, Any]:
    """Measure the averaged generator of a run against its data.

    Args:
        run: a run directory.
        metrics: names; None takes the run's ``evaluate.metrics``.
        num: fakes to generate; None takes the run's ``evaluate.num_samples``.

    Returns:
        ``metrics``, ``num_samples``, ``samples_seen`` and the ``protocol`` that the numbers were
        made by.

    Raises:
        CheckpointError: ``run`` is no run, has no whole checkpoint, or its data has changed.
        ConfigError: a metric that is not known.
    """
    from gatdist.data import open_dataset
    from gatdist.evaluation import Evaluator
    from gatdist.parallel.communicator import LocalCommunicator
    from gatdist.runs import load_generator
    from gatdist.storage import Store

    comm = LocalCommunicator(default_device())
    generator = load_generator(Store(absolute(run)), comm.device)
    dataset = open_dataset(generator.config.data)
    state = generator.checkpoint.state
    if dataset.fingerprint != state["order"]["fingerprint"]:
        raise CheckpointError(
            f"{run}: fingerprint",
            f"the run was trained on other data ({state['order']['fingerprint'][:16]}…)",
            value=dataset.fingerprint[:16] + "…",
            mend="Restore the data at data.url",
        )
    asked = {k: v for k, v in {"metrics": metrics, "num_samples": num}.items() if v is not None}
    evaluator = Evaluator(
        generator.config.evaluate.model_copy(update=asked), dataset, comm, comm.device
    )
    seed = generator.config.run.seed
    evaluation = evaluator(generator.sampler(seed, "evaluation"))
    return {
        "metrics": evaluation.metrics,
        "num_samples": evaluation.protocol["num_generated"],
        "samples_seen": state["samples_seen"],
        "protocol": evaluation.protocol,
    }


def default_device() -> Any:
    """The first CUDA device if there is one, else the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
