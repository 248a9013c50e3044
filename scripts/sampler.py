"""Optuna in place of the full grid: it proposes points of a cell's grid, scored on validation.

What was scored already, by whomever, is told to it first, so an interrupted search goes on from the
records alone. With `halving`, a point first trains with fewer epochs (a full schedule of its own),
and only the best of those tried go on (ASHA, Li et al., MLSys 2020, arXiv:1810.05934).
"""

import math
from collections.abc import Mapping

from omegaconf import DictConfig

from peft import ledger
from peft.cells import Cell, Run


class Sampled(Cell):
    """A cell whose points are proposed one after the other."""

    def __init__(
        self,
        cfg: DictConfig,
        points: list[dict],
        seeds: list[int] | None,
        *,
        sampler: str,
        trials: int,
        halving: int | None,
        seed: int,
        ahead: int = 4,
    ) -> None:
        if sampler not in ("tpe", "random"):
            raise ValueError(f"sampler.sampler={sampler} is neither tpe nor random")
        if not points:
            raise ValueError("sampler=optuna needs a sweep with a grid, whose points it proposes")
        super().__init__(cfg, points, seeds)
        self.kind, self.trials, self.seed, self.ahead = (
            sampler,
            min(trials, len(points)),
            seed,
            ahead,
        )
        self.eta = halving
        epochs = cfg.optim.epochs
        cuts = [halving**2, halving, 1] if halving else [1]
        self.rungs = [
            [
                run
                if cut == 1
                else self.variant(run.point | self.common | {"optim.epochs": -(-epochs // cut)})
                for run in self.grid
            ]
            for cut in cuts
        ]
        self.axes = {path: [point[path] for point in points] for path in points[0]}
        self.started: list[int] = []  # points in the order in which they were proposed

    @property
    def common(self) -> dict:
        return {"phase": "grid", "seed": self.seeds[0]}

    def look(self, index: ledger.Index) -> "Sampled":
        for rung in self.rungs:
            for run in rung:
                run.look(index)
        for i in range(len(self.grid)):
            known = any(rung[i].settled for rung in self.rungs)
            if known and i not in self.started:
                self.started.append(i)
        for run in self.finals():
            run.look(index)
        return self

    @property
    def candidates(self) -> list[Run]:
        return [self.grid[i] for i in sorted(self.started)]

    @property
    def tuned(self) -> bool:
        return len(self.started) >= self.trials and all(run.settled for run in self._going())

    def _score(self, run: Run) -> float:
        return run.entry["metrics"]["top1_val"] if run.entry else -math.inf

    def _going(self) -> list[Run]:
        """The runs of the points that were proposed, up to the rung that each has reached."""
        runs = []
        reached = list(self.started)
        for rung in self.rungs:
            runs += [rung[i] for i in reached]
            settled = [i for i in reached if rung[i].settled]
            best = sorted(settled, key=lambda i: (-self._score(rung[i]), i))
            count = len(settled) // self.eta if self.eta else 0
            if len(settled) == len(reached) and len(self.started) >= self.trials:
                count = max(1, count)  # the last one goes on in any case
            reached = [i for i in best[:count] if rung[i].entry]
        return runs

    def _propose(self) -> None:
        """Adds proposals until enough are under way."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        options = {"multivariate": True, "constant_liar": True} if self.kind == "tpe" else {}
        space: Mapping = {
            path: optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))
            for path, values in self.axes.items()
        }
        study = optuna.create_study(
            direction="maximize",
            sampler=kinds[self.kind](seed=self.seed + len(self.started), **options),
        )
        running = 0
        for i in self.started:
            scored = [rung[i] for rung in self.rungs if rung[i].settled]
            value = self._score(scored[-1]) if scored else None
            finished = value is not None and math.isfinite(value)
            running += not scored
            study.add_trial(
                optuna.trial.create_trial(
                    params=self.grid[i].point,
                    distributions=dict(space),
                    value=value if finished else None,
                    state=(
                        optuna.trial.TrialState.COMPLETE
                        if finished
                        else optuna.trial.TrialState.RUNNING
                        if not scored
                        else optuna.trial.TrialState.FAIL
                    ),
                )
            )
        by_point = {
            tuple(run.point[path] for path in self.axes): i for i, run in enumerate(self.grid)
        }
        while running < self.ahead and len(self.started) < self.trials:
            params = study.ask(dict(space)).params
            i = by_point.get(tuple(params[path] for path in self.axes))
            if i is None or i in self.started:  # proposed before: the next one in order instead
                i = next(j for j in range(len(self.grid)) if j not in self.started)
            self.started.append(i)
            running += 1

    def wanted(self) -> list[Run]:
        if len(self.started) < self.trials:
            self._propose()
        return [*self._going(), *self.finals()]

    @property
    def expected(self) -> int:
        if self.eta is None:
            return max(self.trials, len(self.started)) + len(self.seeds)
        more = max(0, self.trials - len(self.started))
        return len(self._going()) + more + len(self.seeds)
